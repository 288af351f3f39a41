"""Whatever a callable of pvclock.kvm, or Machine, is given: an error of ours says which argument was wrong, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any, Final

import pytest

from pvclock import ConfigError, GuestClock, GuestMemory, Machine, PvclockError, RangeError, WrongType, guest_cpuid
from pvclock.kvm import Kvm, KvmBackend, Runner, SteeredTscBackend, Vcpu, Vm, exit_on_msrs, kvm_backend, open_kvm
from tests.kvm.guests import HLT, Bare, bare_vm
from tests.unit.public_callables import PublicCallable, public_callables
from tests.unit.wrong_types import Makers, assert_right_types_are_taken, assert_wrong_types_are_refused

pytestmark = [pytest.mark.kvm, pytest.mark.row("E13")]

ASKED_BY_CLOCKS: Final = (KvmBackend, SteeredTscBackend)
"""Their methods, and Runner.quiesce(), are called by clocks, with what those have checked."""


OWNERS: Final = (Kvm, Vm, Vcpu, Runner, KvmBackend, SteeredTscBackend, Machine)


def go_on(*_: object) -> bool:
    """Handle an exit by doing nothing."""
    return True


@pytest.fixture(scope="module")
def bare() -> Iterator[Bare]:
    """A VM with one vCPU."""
    with bare_vm(HLT) as made:
        yield made


@pytest.fixture
def makers(bare: Bare) -> Iterator[Makers]:
    """An object of each class, closed after the test, though the errors that it is to have caught refer to it."""
    with ExitStack() as made:
        yield {
            "Kvm": lambda: bare.kvm,
            "Vm": lambda: made.enter_context(bare.kvm.create_vm()),
            "Vcpu": lambda: bare.vcpus[0],
            "Runner": lambda: Runner(bare.vcpus, go_on),
            "Machine": lambda: made.enter_context(Machine(HLT, kvm=bare.kvm)),
        }


def valid(bare: Bare) -> dict[str, Callable[[], Any]]:
    """What is right for a parameter."""
    return {
        **dict.fromkeys(("gpa", "slot", "clock", "vcpu_id", "argument", "vcpu", "mp_state", "kernel_features"), int),
        **dict.fromkeys(("index",), lambda: 0x10),
        **dict.fromkeys(("address", "length", "message"), int),
        "failure": ZeroDivisionError,
        **dict.fromkeys(("is_port", "is_high"), lambda: True),
        "gsi": lambda: 4,
        "value": int,
        "khz": bare.vcpus[0].get_tsc_khz,
        "offset": int,
        "capability": lambda: 3,
        "buffer": lambda: bytearray(4096),
        "denied": list,
        "indices": list,
        "values": dict,
        "Machine.state": lambda: None,
        "ranges": tuple,
        "data": lambda: b"x",
        "regs": bare.vcpus[0].get_regs,
        "sregs": bare.vcpus[0].get_sregs,
        "entries": bare.kvm.get_supported_cpuid,
        "vm": lambda: bare.vm,
        "kvm": lambda: bare.kvm,
        "vcpus": lambda: bare.vcpus,
        "late": lambda: bare.vcpus[0],
        "Machine.vcpus": lambda: 1,
        "handler": lambda: go_on,
        "runner": lambda: Runner(bare.vcpus, go_on),
        "honours_tsc_offset": lambda: False,
        "image": lambda: HLT,
        "ns": lambda: 1,
        "apic_id": int,
        **dict.fromkeys(
            ("pvclock.guest_cpuid.clock", "pvclock.set_guest_cpuid.clock"), lambda: a_clock(bare, vcpu_host="kvm")
        ),
        "Machine.clock": lambda: "engine",
    }


@cache
def callables() -> dict[str, PublicCallable]:
    """All that a VMM calls, by name."""
    return {
        each.name: each
        for each in public_callables(["pvclock.kvm", "pvclock.machine", "pvclock"])
        if each.parameters and each.name != "Runner.quiesce"
        if each.owner in OWNERS or each.name.startswith("pvclock.kvm.") or each.name.endswith("guest_cpuid")
        if each.owner not in ASKED_BY_CLOCKS or each.member == "__init__"
    }


@pytest.mark.parametrize("name", callables())
def test_wrong_types_are_refused_by_name(name: str, bare: Bare, makers: Makers) -> None:
    """WrongType, which is a TypeError, too: it names the parameter, what was given, and what it can be."""
    assert_wrong_types_are_refused(callables()[name], makers, valid(bare))


@pytest.mark.parametrize("name", callables())
def test_right_types_are_no_wrong_ones(name: str, bare: Bare, makers: Makers) -> None:
    """The same calls with a right value for each parameter that has one: whatever comes of it, no type was wrong."""
    assert_right_types_are_taken(callables()[name], makers, valid(bare))


def a_clock(bare: Bare, vcpus: int = 1, **options: Any) -> GuestClock:  # noqa: ANN401  # wrong ones, too
    """A clock for the bare VM."""
    backend = kvm_backend(bare.kvm, bare.vcpus, Runner(bare.vcpus, go_on))
    return GuestClock(GuestMemory(bytearray(1 << 14)), vcpus, backend=backend, **options)


def without(registers: dict[str, Any], *names: str) -> dict[str, Any]:
    """What is left of them."""
    return {name: value for name, value in registers.items() if name not in names}


REFUSED: dict[str, tuple[type[PvclockError], Callable[[Bare], object]]] = {
    "vcpus is a Vcpu; it can be a list of the VM's vCPUs, each a Vcpu": (
        WrongType,
        lambda bare: Runner(bare.vcpus[0], go_on),  # type: ignore[arg-type]
    ),
    "vcpus is empty; a VM has one vCPU or more": (ConfigError, lambda _: Runner([], go_on)),
    "vcpus[0] is 0, an int; it can be a Vcpu": (WrongType, lambda _: Runner([0, 1], go_on)),  # type: ignore[list-item]
    "handler is None; it can be a function": (WrongType, lambda bare: Runner(bare.vcpus, None)),  # type: ignore[arg-type]
    "kick_signal is 0; it can be 1 to 64": (RangeError, lambda bare: Runner(bare.vcpus, go_on, kick_signal=0)),
    "kvm is a list; it can be a Kvm, as open_kvm() returns it": (
        WrongType,
        lambda bare: kvm_backend(bare.vcpus, bare.kvm, Runner(bare.vcpus, go_on)),  # type: ignore[arg-type]
    ),
    "vcpus is a Vcpu; it can be a list": (
        WrongType,
        lambda bare: kvm_backend(bare.kvm, bare.vcpus[0], Runner(bare.vcpus, go_on)),  # type: ignore[arg-type]
    ),
    "runner is None; it can be a Runner": (WrongType, lambda bare: kvm_backend(bare.kvm, bare.vcpus, None)),  # type: ignore[arg-type]
    "path is None; it can be a path": (WrongType, lambda _: open_kvm(None)),  # type: ignore[arg-type]
    "ranges is a GuestClock; it can be a sequence of MsrRange: a GuestClock's msr_ranges": (
        WrongType,
        lambda bare: exit_on_msrs(bare.vm, a_clock(bare, vcpu_host="kvm")),  # type: ignore[arg-type]
    ),
    "regs has 'eip', which is unknown; it can be rax, rbx,": (
        ConfigError,
        lambda bare: bare.vcpus[0].set_regs({**bare.vcpus[0].get_regs(), "eip": 0}),
    ),
    "regs lacks 'rax', 'rip'; change what KVM gives": (
        ConfigError,
        lambda bare: bare.vcpus[0].set_regs(without(bare.vcpus[0].get_regs(), "rax", "rip")),
    ),
    "regs['rip'] is '0', a str; it can be a whole number, 0 to 2^64 - 1": (
        WrongType,
        lambda bare: bare.vcpus[0].set_regs({**bare.vcpus[0].get_regs(), "rip": "0"}),  # type: ignore[dict-item]
    ),
    "regs['rip'] is -1; it can be 0 to 2^64 - 1": (
        RangeError,
        lambda bare: bare.vcpus[0].set_regs({**bare.vcpus[0].get_regs(), "rip": -1}),
    ),
    "sregs lacks 'efer'": (
        ConfigError,
        lambda bare: bare.vcpus[0].set_sregs(without(bare.vcpus[0].get_sregs(), "efer")),
    ),
    "sregs['cs'] has 'present_', which is unknown": (
        ConfigError,
        lambda bare: bare.vcpus[0].set_sregs(
            {**bare.vcpus[0].get_sregs(), "cs": {**bare.vcpus[0].get_sregs()["cs"], "present_": 1}}
        ),
    ),
    "sregs['interrupt_bitmap'] has 1 numbers; it has 4": (
        ConfigError,
        lambda bare: bare.vcpus[0].set_sregs({**bare.vcpus[0].get_sregs(), "interrupt_bitmap": [0]}),
    ),
    "sregs: value too large": (
        RangeError,
        lambda bare: bare.vcpus[0].set_sregs(
            {**bare.vcpus[0].get_sregs(), "cs": {**bare.vcpus[0].get_sregs()["cs"], "selector": 1 << 16}}
        ),
    ),
    "entries[0] lacks 'flags'": (
        ConfigError,
        lambda bare: bare.vcpus[0].set_cpuid(
            [without(guest_cpuid(bare.kvm, 0, a_clock(bare, vcpu_host="kvm"))[0], "flags")]
        ),
    ),
    "buffer is b'x', a bytes; it can be a writable, contiguous buffer": (
        WrongType,
        lambda bare: bare.vm.set_user_memory_region(1, 1 << 20, b"x"),
    ),
    "vcpu_id is '1', a str; it can be a whole number, 0 to 2147483647": (
        WrongType,
        lambda bare: bare.vm.create_vcpu("1"),  # type: ignore[arg-type]
    ),
    "vcpu_id is -1; it can be 0 to 2147483647": (RangeError, lambda bare: bare.vm.create_vcpu(-1)),
    "capability is 1.5, a float; it can be a whole number": (
        WrongType,
        lambda bare: bare.vm.check_extension(1.5),  # type: ignore[arg-type]
    ),
    "denied[0] is a tuple; it can be (flags, base, length, bitmap)": (
        WrongType,
        lambda bare: bare.vm.set_msr_filter([(1, 2)]),  # type: ignore[list-item]
    ),
    "vcpu_host 'emulator' on a backend whose vCPUs run on 'kvm'; give vcpu_host='kvm'": (ConfigError, a_clock),
    "a clock of 2 vCPUs on a backend of 1, which its Runner runs": (
        ConfigError,
        lambda bare: a_clock(bare, 2, vcpu_host="kvm"),
    ),
    "vCPU 1; the Runner has vCPUs 0 to 0": (RangeError, lambda bare: Runner(bare.vcpus, go_on).thread_id(1)),
    "timeout_s is '1', a str; it can be a number": (
        WrongType,
        lambda bare: Runner(bare.vcpus, go_on).join("1"),  # type: ignore[arg-type]
    ),
}
"""What is said, and what was wrong."""


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_said(message: str, bare: Bare) -> None:
    """One line: what was given, and what it can be."""
    kind, call = REFUSED[message]
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        call(bare)


def test_a_clock_of_fewer_vcpus_than_its_backend() -> None:
    """It is refused when it is made, as one of more is: the other vCPU would be paused and resumed unseen."""
    with bare_vm(HLT, vcpus=2) as bare, pytest.raises(ConfigError, match="a clock of 1 vCPUs on a backend of 2"):
        a_clock(bare, vcpu_host="kvm")


def test_registers_that_are_refused_are_as_they_were(bare: Bare) -> None:
    """No register changes by a set_regs() that is refused."""
    vcpu, before = bare.vcpus[0], bare.vcpus[0].get_regs()
    with pytest.raises(ConfigError):
        vcpu.set_regs({**before, "rax": 7, "eip": 0})
    assert vcpu.get_regs() == before


def test_a_vm_without_memory_is_told_of_it() -> None:
    """Where KVM_RUN fails for want of memory the error says so."""
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        failed = str(vcpu_error(vcpu))
        assert re.fullmatch(
            r"KVM_RUN: \w+ .*; the VM has no memory: give it some by Vm.set_user_memory_region\(\)", failed
        )


def vcpu_error(vcpu: Vcpu) -> PvclockError:
    """What comes of its run()."""
    with pytest.raises(PvclockError) as caught:
        vcpu.run()
    return caught.value
