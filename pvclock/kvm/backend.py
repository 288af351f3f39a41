"""Host time and TSC offsets for a GuestClock on real vCPUs, on hosts whose TSC can be trusted and on others."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pvclock._counter import Counter, HostCounter, KernelTimeCounter
from pvclock._transaction import commit
from pvclock.arguments import flag, instance, whole
from pvclock.errors import TscOffsetNotHonoured
from pvclock.host.linux import host_clocksource, read_boot_id, tsc_of_each_cpu
from pvclock.host.this_host import CLOCK_GRAIN_NS, CLOCK_IDS, bracketed, host_stamps, wait_until
from pvclock.kvm._system import Kvm
from pvclock.kvm._vcpu import Vcpu
from pvclock.kvm.arguments import vcpu_of, vcpus_of
from pvclock.kvm.capabilities import kernel_features
from pvclock.kvm.runner import Runner
from pvclock.kvm.tsc_offset import TscOffsets, tsc_offsets_here
from pvclock.quantities import NS_PER_S, U32_MASK, U64_MASK, HostTsc
from pvclock.readings import HostStamps, Reference, Sample

__all__ = ["KvmBackend", "SteeredTscBackend", "kvm_backend"]

SAMPLES = 8


def kvm_backend(kvm: Kvm, vcpus: list[Vcpu], runner: Runner) -> KvmBackend | SteeredTscBackend:
    """The backend that this host allows, for `vcpus` by number, which `runner` runs, but not yet.

    The first time in a process it asks a throw-away VM what becomes of TSC offsets here, which takes a few ms.
    """
    instance("kvm", kvm, Kvm, "a Kvm, as open_kvm() returns it")
    first = vcpus_of(vcpus)[0]
    instance("runner", runner, Runner)
    features = kernel_features(kvm)
    offsets = tsc_offsets_here(kvm, first)
    if offsets is TscOffsets.STEERED:
        return SteeredTscBackend(vcpus, runner, features)
    return KvmBackend(vcpus, runner, features, honours_tsc_offset=offsets is TscOffsets.HONOURED)


class VcpuThreads:
    """The vCPUs of a backend and the Runner that has their threads: what Backend asks about running them."""

    def __init__(self, vcpus: list[Vcpu], runner: Runner) -> None:
        self.vcpus = vcpus_of(vcpus)
        self.tsc_hz = self.vcpus[0].get_tsc_khz() * 1000
        self._runner = instance("runner", runner, Runner)
        self.quiesce = runner.quiesce

    def add(self, vcpu: Vcpu) -> None:
        """One more, with the next number; again without harm."""
        if vcpu_of("vcpu", vcpu) not in self.vcpus:
            self.vcpus.append(vcpu)

    def run_delay_ns(self, vcpu: int) -> int | None:
        """See Backend: by the kernel's account of vCPU's thread."""
        thread = self._runner.thread_id(vcpu)
        try:
            with Path(f"/proc/self/task/{thread}/schedstat").open("rb") as account:
                return int(account.read().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel keeps no such account
            return None

    def run_until(self, counter: Counter, tsc: HostTsc) -> None:
        """Let the vCPUs run until `counter` is `tsc`."""
        self._runner.resume()
        try:
            wait_until(counter, tsc, self.tsc_hz)
        finally:
            self._runner.pause()

    def are_kept_out(self) -> bool:
        """Are all vCPUs out of the guest until the runner is resumed or started?"""
        return self._runner.gate.keeps_all_out()


class KvmBackend:
    """See pvclock.host.backend.Backend: a host whose KVM leaves TSC offsets as they are set.

    honours_tsc_offset: as probed on this host.
    """

    counter_follows_host = True
    vcpu_host = "kvm"
    """See Backend."""

    def __init__(
        self, vcpus: list[Vcpu], runner: Runner, kernel_features: int = 0, *, honours_tsc_offset: bool
    ) -> None:
        flag("honours_tsc_offset", honours_tsc_offset)
        self._threads = VcpuThreads(vcpus, runner)
        self.kernel_features = {"KVM": whole("kernel_features", kernel_features, 0, U32_MASK)}
        self.tsc_hz = self._threads.tsc_hz
        self.quiesce = self._threads.quiesce
        self.run_delay_ns = self._threads.run_delay_ns
        self.counter = HostCounter()
        self.tsc_stable = host_clocksource() == "tsc"
        self.initial_tsc_offset = self._threads.vcpus[0].get_tsc_offset() if honours_tsc_offset else 0
        """KVM's own: a guest's TSC is 0 when its first vCPU is made.  0 where offsets are not honoured."""

        self._honours_tsc_offset = honours_tsc_offset

    @property
    def vcpu_count(self) -> int:
        """See Backend."""
        return len(self._threads.vcpus)

    def add_vcpu(self, vcpu: Vcpu) -> None:
        """One more vCPU, with the next number, which the runner is to have as well; again without harm."""
        self._threads.add(vcpu)

    @property
    def boot_id(self) -> str | None:
        """See Backend."""
        return read_boot_id()

    def run_until(self, tsc: HostTsc) -> None:
        """See Backend."""
        self._threads.run_until(self.counter, tsc)

    def vcpus_are_out(self) -> bool | None:
        """See Backend."""
        return self._threads.are_kept_out()

    def tsc_readings(self) -> tuple[HostTsc, ...]:
        """See Backend."""
        return tsc_of_each_cpu(self.counter)

    def sample(self, reference: Reference) -> Sample:
        """See Backend; some 20 ns are its bound."""
        return bracketed(reference, self.tsc_hz)

    def stamps(self) -> HostStamps:
        """See Backend."""
        return host_stamps(self.sample, self.tsc_hz)

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """See Backend.  For a vCPU that is out of the guest; a host without offsets has offset 0 and no other."""
        if not self._honours_tsc_offset:
            if offset:
                raise TscOffsetNotHonoured(offset)
            return
        before = self._threads.vcpus[vcpu].get_tsc_offset()
        self._threads.vcpus[vcpu].set_tsc_offset(offset)
        if self._threads.vcpus[vcpu].get_tsc_offset() != offset:
            self._threads.vcpus[vcpu].set_tsc_offset(before)
            raise TscOffsetNotHonoured(offset, "it reads back differently")

    def tsc_offset_setter(self, vcpu: int) -> Callable[[int], object]:
        """What sets vCPU's offset: compiled, and without reading it back, where offsets are known to be honoured."""
        setter = self._threads.vcpus[vcpu].set_tsc_offset
        return setter if self._honours_tsc_offset else partial(self.set_tsc_offset, vcpu)

    def tsc_offset(self, vcpu: int) -> int | None:
        """See Backend: KVM's own, for a vCPU that is out of the guest."""
        return self._threads.vcpus[vcpu].get_tsc_offset() if self._honours_tsc_offset else None


class SteeredTscBackend:
    """See pvclock.host.backend.Backend: a host whose TSC its kernel does not trust.

    There KVM steers each guest's TSC along kernel time: whenever it loads a vCPU, the TSC goes on from where it was and
    is then brought forward, never back (kvm_arch_vcpu_load, kvm_guest_time_update).  So here the host's counter is
    kernel time in ticks.  A guest's TSC is off it by some us, and another vCPU's by as much: STABLE is off, and guests
    clamp what they read.
    """

    counter_follows_host = True
    vcpu_host = "kvm"
    """See Backend."""

    tsc_stable = False
    initial_tsc_offset = 0
    """See KvmBackend; here KVM moves a guest's TSC by itself, so its offset at the first entry is unknown."""

    def __init__(self, vcpus: list[Vcpu], runner: Runner, kernel_features: int = 0) -> None:
        self._threads = VcpuThreads(vcpus, runner)
        self.kernel_features = {"KVM": whole("kernel_features", kernel_features, 0, U32_MASK)}
        self.tsc_hz = self._threads.tsc_hz
        self.quiesce = self._threads.quiesce
        self.run_delay_ns = self._threads.run_delay_ns
        self.counter = KernelTimeCounter(self.tsc_hz)
        self._host_counter = HostCounter()
        self._offsets: dict[int, int] = {}

    @property
    def vcpu_count(self) -> int:
        """See Backend."""
        return len(self._threads.vcpus)

    def add_vcpu(self, vcpu: Vcpu) -> None:
        """One more vCPU, with the next number, which the runner is to have as well; again without harm."""
        self._threads.add(vcpu)

    @property
    def boot_id(self) -> str | None:
        """See Backend."""
        return read_boot_id()

    def run_until(self, tsc: HostTsc) -> None:
        """See Backend."""
        self._threads.run_until(self.counter, tsc)

    def vcpus_are_out(self) -> bool | None:
        """See Backend."""
        return self._threads.are_kept_out()

    def tsc_readings(self) -> tuple[HostTsc, ...]:
        """See Backend."""
        return tsc_of_each_cpu(self.counter)

    def sample(self, reference: Reference) -> Sample:
        """See Backend; within half of the narrowest bracket of 8, some 100 ns."""
        clock_id = CLOCK_IDS[reference]
        brackets = (self._bracket(lambda: time.clock_gettime_ns(clock_id)) for _ in range(SAMPLES))
        tsc, ns, width_ticks = min(brackets, key=lambda it: it[2])
        return Sample(tsc, ns, width_ticks * NS_PER_S / (2 * self.tsc_hz) + CLOCK_GRAIN_NS)

    def stamps(self) -> HostStamps:
        """See Backend."""
        return host_stamps(self.sample, self.tsc_hz)

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """See Backend.  For a vCPU that is out of the guest; its TSC can be put forward, not back."""
        before = self._offsets.get(vcpu)
        if before is not None and (offset - before) & U64_MASK > U64_MASK // 2:
            why = "its TSC is unstable: there KVM lets a guest's TSC go forward only; use a host on clocksource tsc"
            raise TscOffsetNotHonoured(offset, why)
        if offset != before:
            kernel_time, host_tsc, _ = min(
                (self._bracket(self._host_counter.read) for _ in range(SAMPLES)), key=lambda it: it[2]
            )
            give = partial(self._threads.vcpus[vcpu].set_tsc_offset, (kernel_time + offset - host_tsc) & U64_MASK)
            commit(give, lambda _: (offset, ()), partial(self._offsets.__setitem__, vcpu))

    def tsc_offset(self, vcpu: int) -> int | None:
        """See Backend: KVM moves the host's own all the time, and those to kernel time stay as they were set."""
        return self._offsets.get(vcpu)

    def _bracket(self, read: Callable[[], int]) -> tuple[HostTsc, int, int]:
        """The counter at the instant of `read()`, what that gave, and the bracket's width in ticks."""
        begin = self.counter.read()
        value = read()
        width = self.counter.read() - begin
        return HostTsc(begin + width // 2), value, width
