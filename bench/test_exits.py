"""A guest's exit and back: through Vcpu.run(), a typed exit and the Machine's handler, beside a bare KVM_RUN loop.

The guest is a few instructions of real-mode code that exit again and again; both sides run the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from bench.c_twins import MinimalVm, Twins
from bench.comparison import Comparison
from bench.published_clock import MSR_SYSTEM_TIME
from pvclock import Machine
from pvclock.kvm import Kvm
from pvclock.machine import CONSOLE_PORT, EXIT_PORT

MSR_WALL_CLOCK = 0x4B564D00
MSR_TIME_REF_COUNT = 0x40000020
TIME_PAGE_ENABLED = 0x1000 | 1
UNUSED_PORT = 0x80

EXITS = 3000
"""In a run: a Machine's start and end (0.3 ms) are then 0.1 us of each."""

ROUNDS = 15


class Kind(NamedTuple):
    """An instruction of two bytes that exits, with ecx and eax in it; edx is 0."""

    title: str
    code: bytes
    ecx: int = MSR_SYSTEM_TIME
    eax: int = 0
    provider: str = "KVM"


WRMSR, RDMSR, OUT_AL = b"\x0f\x30", b"\x0f\x32", b"\xe6"

KINDS = (
    Kind("WRMSR, nothing to publish", WRMSR, MSR_WALL_CLOCK),
    Kind("WRMSR that registers and publishes a page", WRMSR, MSR_SYSTEM_TIME, TIME_PAGE_ENABLED),
    Kind("RDMSR", RDMSR),
    Kind("RDMSR of the reference counter", RDMSR, MSR_TIME_REF_COUNT, provider="HyperV"),
    Kind("out to an unused port", OUT_AL + bytes([UNUSED_PORT])),
    Kind("out to the console port", OUT_AL + bytes([CONSOLE_PORT])),
)


def payload(kind: Kind) -> bytes:
    """Return code that exits EXITS times, writes the exit port, and begins again if the vCPU is run on."""
    loop = kind.code + b"\x66\x4e" + b"\x75\xfa"  # dec %esi; jnz loop
    load = b"\x66\xb9" + kind.ecx.to_bytes(4, "little") + b"\x66\xb8" + kind.eax.to_bytes(4, "little")
    begin = b"\x66\xbe" + EXITS.to_bytes(4, "little") + load + b"\x66\x31\xd2"  # mov to %esi, %ecx, %eax; xor %edx
    end = b"\xb0\x00" + OUT_AL + bytes([EXIT_PORT])
    again = b"\xeb" + (256 - len(begin + loop + end) - 2).to_bytes(1, "little")
    return begin + loop + end + again


@pytest.fixture(params=KINDS, ids=lambda kind: kind.title.replace(" ", "-"))
def kind(request: pytest.FixtureRequest) -> Kind:
    """Return a kind of exit."""
    assert isinstance(request.param, Kind)
    return request.param


@pytest.fixture
def minimal(twins: Twins, kind: Kind) -> Iterator[MinimalVm]:
    """Return the guest in a bare KVM_RUN loop, checked to exit EXITS times."""
    with MinimalVm(twins.library, payload(kind), kind.ecx) as vm:
        assert vm.run() == EXITS
        yield vm


@pytest.mark.kvm
def test_round_trip(comparison: Comparison, kvm: Kvm, minimal: MinimalVm, kind: Kind) -> None:
    """The whole way of an exit, the guest's own loop included, on both sides."""

    def run(machine: Machine) -> None:
        machine.start()
        machine.wait()

    comparison.measure(
        f"exit: {kind.title}",
        run,
        ("KVM_RUN in C", minimal.run),
        operations=EXITS,
        rounds=ROUNDS,
        prepare=lambda: (Machine(payload(kind), kvm=kvm, tick_interval_s=None, provider=kind.provider),),
        finish=Machine.close,
    )
