"""Which parts of the interface a clock, its vCPU host and its VMM can serve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pvclock.providers.hyperv.apic import ApicMsrs
from pvclock.providers.hyperv.crash import Crash
from pvclock.providers.hyperv.debug import SyntheticDebugger
from pvclock.providers.hyperv.features import MICROSOFT
from pvclock.providers.hyperv.msr import Part
from pvclock.providers.hyperv.partition import Partition
from pvclock.providers.hyperv.profiles import Profile
from pvclock.providers.hyperv.reference_time import RawReferenceClock, ReferenceClock
from pvclock.providers.hyperv.stimers import SyntheticTimers
from pvclock.providers.hyperv.synic import Synic
from pvclock.providers.hyperv.tsc_controls import Frequencies, InvariantTsc, Reenlightenment
from pvclock.providers.interface import ApicServices, ClockServices, InterruptServices, VcpuHost

__all__ = ["Choices", "Parts"]


class Choices(NamedTuple):
    """What a configuration says of the parts."""

    vendor_id: str
    apic_bus_hz: int
    cpu_vendor: str
    vs_interface: bool
    hypercall_debug: bool
    direct_timers: bool
    """May synthetic timers interrupt their vCPU without a message?"""


class Parts(NamedTuple):
    """All parts of one VM; those that the provider itself asks by name."""

    partition: Partition
    reference: ReferenceClock | RawReferenceClock
    invariant_tsc: InvariantTsc
    debugger: SyntheticDebugger | None
    every: tuple[Part, ...]
    """These and the others, without those that cannot be served."""

    @classmethod
    def of(cls, clock: ClockServices, vcpus: int, profile: Profile, choices: Choices) -> Parts:
        """The parts that can be served; ConfigError for a CPU vendor that has no hypercalls."""
        partition = Partition(clock, profile, choices.cpu_vendor)
        reference = RawReferenceClock(clock) if profile.reference_is_raw_tsc else ReferenceClock(clock)
        debugger, invariant_tsc = _debugger(clock, profile, choices), InvariantTsc()
        frequencies = Frequencies(clock.tsc_hz, choices.apic_bus_hz)
        every: list[Part] = [partition, reference, frequencies, Crash(clock)]
        every += _interrupting_parts(clock, vcpus, profile, choices, frequencies)
        if debugger is not None:
            every.append(debugger)
        if clock.vcpu_host is not VcpuHost.KVM:  # there a vCPU's CPUID cannot change, and its APIC is the kernel's
            every += [invariant_tsc, *_apic_msrs(clock, vcpus, profile)]
        return cls(partition, reference, invariant_tsc, debugger, tuple(every))


def _interrupting_parts(
    clock: ClockServices, vcpus: int, profile: Profile, choices: Choices, frequencies: Frequencies
) -> Iterator[Part]:
    vmm: object = clock.vmm
    if isinstance(vmm, InterruptServices):
        by_virtualbox = profile.is_virtualbox
        synic = Synic(clock, vcpus, siefp_faults=by_virtualbox, takes_any_simp=by_virtualbox, ignores_eom=by_virtualbox)
        yield synic
        yield SyntheticTimers(clock, vcpus, synic, vmm, offers_direct_mode=choices.direct_timers)
        yield Reenlightenment(clock, vcpus, vmm, frequencies)


def _apic_msrs(clock: ClockServices, vcpus: int, profile: Profile) -> Iterator[Part]:
    vmm: object = clock.vmm
    if isinstance(vmm, ApicServices):
        by_virtualbox = profile.is_virtualbox
        yield ApicMsrs(clock, vcpus, vmm, assist_page_is_zeroed=by_virtualbox, assist_page_faults=by_virtualbox)


def _debugger(clock: ClockServices, profile: Profile, choices: Choices) -> SyntheticDebugger | None:
    """With the VS interface, as QEMU has it; VirtualBox's is there for Microsoft's vendor id, too."""
    by_virtualbox = profile.is_virtualbox
    if not choices.vs_interface and not (by_virtualbox and choices.vendor_id == MICROSOFT):
        return None
    return SyntheticDebugger(clock, suggests_hypercalls=choices.hypercall_debug, as_virtualbox=by_virtualbox)
