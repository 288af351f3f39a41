"""What some errors and results say: in words and numbers that the caller knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final

import pytest

from pvclock import ConfigError, GuestClock, GuestMemory, HostTsc, PvclockError, RangeError, SimulatedBackend
from pvclock.errors import GuestCrashed
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.kvm.access import advice
from pvclock.kvm.exits import Exit, FailEntry, Halt, InternalError, Shutdown, SystemEvent, UnknownExit
from pvclock.timekeeping.catchup import Advance, parse, settle

pytestmark = pytest.mark.row("E13")

HZ = 10**9


def a_clock(backend: SimulatedBackend | None = None, **options: Any) -> GuestClock:  # noqa: ANN401  # wrong ones, too
    """A clock with those options."""
    return GuestClock(GuestMemory(bytearray(64)), backend=backend or SimulatedBackend(HZ), **options)


class OwnVcpus(SimulatedBackend):
    """A VMM's own backend, which knows its vCPUs and what runs them."""

    vcpu_count = 2
    vcpu_host = "kvm"


SAID: dict[str, tuple[type[PvclockError], Callable[[], object]]] = {
    "features 0x1000000000000000 cannot be served here; choose from CLOCKSOURCE|": (
        ConfigError,
        lambda: a_clock(features=1 << 60),
    ),
    "features MMU_OP|0x1000000000000000 cannot be served here; choose from CLOCKSOURCE|": (
        ConfigError,
        lambda: a_clock(features=1 << 60 | 1 << 2),
    ),
    "host TSC 9223372036854775808 is 9223372036854775808 ticks before the oldest segment": (
        RangeError,
        lambda: a_clock().at(HostTsc(2**63)),
    ),
    "host TSC 9223372036854775809 is 9223372036854775807 ticks before the oldest segment": (
        RangeError,
        lambda: a_clock().at(HostTsc(2**63 + 1)),
    ),
    "policy 'advance:': options are written as NAME=NUMBER": (ConfigError, lambda: parse("advance:")),
    "policy 'freeze:': options are written as NAME=NUMBER": (ConfigError, lambda: parse("freeze:")),
    "policy 'advance:max_ns=': options are written as NAME=NUMBER": (ConfigError, lambda: parse("advance:max_ns=")),
    "a clock of 1 vCPUs on a backend of 2": (ConfigError, lambda: a_clock(OwnVcpus(HZ), vcpu_host="kvm")),
    "a clock of 3 vCPUs on a backend of 2": (ConfigError, lambda: a_clock(OwnVcpus(HZ), vcpus=3, vcpu_host="kvm")),
    "a clock of 1 vCPUs on a backend of 2, which its": (
        ConfigError,
        lambda: GuestClock(GuestMemory(bytearray(64)), backend=ExecutionTimeBackend(OwnVcpus(HZ)), vcpu_host="kvm"),
    ),
    "vcpu_host 'emulator' on a backend whose vCPUs run on": (
        ConfigError,
        lambda: GuestClock(GuestMemory(bytearray(64)), 2, backend=ExecutionTimeBackend(OwnVcpus(HZ))),
    ),
    "vcpu_host 'emulator' on a backend whose vCPUs run on 'kvm'; give vcpu_host='kvm'": (
        ConfigError,
        lambda: a_clock(OwnVcpus(HZ), vcpus=2),
    ),
}
"""What is said, and of what."""


@pytest.mark.parametrize("message", SAID)
def test_what_is_said(message: str) -> None:
    """The error says it in the words and numbers of who called."""
    kind, call = SAID[message]
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        call()


def test_a_mistyped_keyword() -> None:
    """It may be the provider's or GuestClock's own, so the error lists what both take, and what restore() does."""
    with pytest.raises(ConfigError) as caught:
        a_clock(vcpu=2)
    said = str(caught.value)
    assert said.startswith("unknown key 'vcpu' := 2 for provider 'KVM'; keys are 'provider', ")
    assert "; GuestClock itself takes memory, vcpus, provider, backend, vcpu_host, " in said
    assert said.endswith("and a saved clock's restore() policy and any_tsc_hz")


def test_a_mistyped_key_of_a_configuration() -> None:
    """There no keyword can be meant."""
    with pytest.raises(ConfigError, match="unknown key 'vcpu'") as caught:
        a_clock(provider={"provider": "KVM", "vcpu": 2})
    assert "GuestClock" not in str(caught.value)


def test_the_clock_and_its_backend_agree_when_it_is_restored() -> None:
    """A saved clock of one vCPU is none for a backend of two."""
    state = a_clock().save()
    with pytest.raises(ConfigError, match="a clock of 1 vCPUs on a backend of 2"):
        GuestClock.restore(state, GuestMemory(bytearray(64)), backend=OwnVcpus(HZ), vcpu_host="kvm")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (Shutdown(), "a triple fault (KVM_EXIT_SHUTDOWN)"),
        (Halt(), "HLT, and there is no interrupt controller to wake it"),
        (SystemEvent(3), "system event 3 (KVM_EXIT_SYSTEM_EVENT)"),
        (FailEntry(0x80000021), "the CPU refused the guest's state, reason 0x80000021 (KVM_EXIT_FAIL_ENTRY)"),
        (
            InternalError(1, (2, 255)),
            "KVM cannot emulate an instruction, suberror 1, data 0x2, 0xff (KVM_EXIT_INTERNAL_ERROR)",
        ),
        (InternalError(3, ()), "KVM could not deliver an event, suberror 3, data none (KVM_EXIT_INTERNAL_ERROR)"),
        (InternalError(9, (7,)), "KVM gave up, suberror 9, data 0x7 (KVM_EXIT_INTERNAL_ERROR)"),
        (UnknownExit(99), "exit 99, which pvclock does not know"),
    ],
)
def test_a_crash_in_words(reason: Exit, words: str) -> None:
    """The error of a guest that cannot go on names its exit in words."""
    assert str(GuestCrashed(1, reason)) == f"the guest crashed on vCPU 1: {words}"


INSTRUCTION: Final = bytes.fromhex("0f01f9") + bytes(range(12))


@pytest.mark.row("E22")
@pytest.mark.parametrize(
    ("suberror", "flags", "length", "fetched"),
    [
        (1, 1, 15, INSTRUCTION),
        (1, 3, 3, INSTRUCTION[:3]),
        (1, 1, 255, INSTRUCTION),
        (1, 2, 15, b""),
        (3, 1, 15, b""),
    ],
    ids=["all", "some", "too-many", "no-flag", "another-error"],
)
def test_an_instruction_that_kvm_fetched(suberror: int, flags: int, length: int, fetched: bytes) -> None:
    """KVM's own bytes, where its flags say that there are some, and no more than it has room for."""
    words = bytes([length]) + INSTRUCTION
    data = (flags, int.from_bytes(words[:8], "little"), int.from_bytes(words[8:], "little"), 0x1000)
    error = InternalError(suberror, data)
    assert error.fetched == fetched
    assert (f"it fetched {fetched.hex(' ')} (" in str(error)) == bool(fetched)
    assert [InternalError(suberror, data[:count]).fetched for count in range(3)] == [b""] * 3


def test_a_settlement_in_words() -> None:
    """It prints in ns, and with why something was left out."""
    assert str(settle("freeze", Fraction(3, 2) * 1000)) == "stepped 0 ns, to slew 0 ns, dropped 1500 ns"
    assert str(settle("slew", Fraction(7))) == "stepped 0 ns, to slew 7 ns, dropped 0 ns"
    left_out = "stepped 5 ns, to slew 0 ns, dropped 2 ns: 2 ns beyond the bound of 5 ns were left out"
    assert str(settle(Advance(5), Fraction(7))) == left_out


@pytest.mark.row("E13")
def test_advice_fits_the_path() -> None:
    """Modules are KVM's own device's; a path that is another's is told which that is."""
    assert advice("--help", 2) == "KVM's device is /dev/kvm"
    assert advice("/dev/kvm", 2).startswith("load the kvm_intel or kvm_amd module")
