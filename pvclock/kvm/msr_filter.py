"""Send a guest's accesses to chosen MSRs to user space: first ask for the exits, then filter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pvclock.arguments import instance, instances
from pvclock.errors import WrongType
from pvclock.kvm._vm import Vm
from pvclock.kvm.exits import MsrExitReason
from pvclock.msr_ranges import MsrRange

__all__ = ["exit_on_msrs"]

READ: Final = 1  # KVM_MSR_FILTER_READ
WRITE: Final = 2  # KVM_MSR_FILTER_WRITE


def exit_on_msrs(vm: Vm, ranges: Iterable[MsrRange]) -> None:
    """Let the guest's accesses in `ranges` exit as RdmsrExit and WrmsrExit; the kernel serves all others.

    A second call replaces the ranges of the first.  KVM takes 16 at most (ConfigError), and the first one that has an
    MSR decides.  Call it before the guest runs: until then the kernel serves these, too.
    """
    instance("vm", vm, Vm, "a Vm, as Kvm.create_vm() makes it")
    if not isinstance(ranges, Iterable):
        raise WrongType("ranges", ranges, "a sequence of MsrRange: a GuestClock's msr_ranges")
    checked = instances("ranges", tuple(ranges), MsrRange)
    # In this order: without user-space exits a filtered access is #GP in the guest.
    vm.enable_cap("KVM_CAP_X86_USER_SPACE_MSR", MsrExitReason.FILTER)
    vm.set_msr_filter([_filter_range(each) for each in checked])


def _filter_range(each: MsrRange) -> tuple[int, int, int, bytes]:
    """The range as Vm.set_msr_filter() takes it: (flags, base, length, bitmap), bit n set if MSR base + n is kept."""
    flags = (READ if each.reads else 0) | (WRITE if each.writes else 0)
    kept = sum(1 << index - each.base for index in each.kept)
    return flags, each.base, each.length, kept.to_bytes((each.length + 7) // 8, "little")
