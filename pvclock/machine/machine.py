"""A small virtual machine: RAM, vCPUs, a boot image, a clock, an exit port and a debug console."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Literal, Self

from pvclock import boot
from pvclock._memory import GuestMemory
from pvclock.boot.layout import IDENTITY_MAP, RAM_END, TSS
from pvclock.catchup import Policy
from pvclock.errors import ConfigError, GuestCrashed, MissingCapability, MsrFault, StateError
from pvclock.guestclock import GuestClock
from pvclock.kvm import Runner, Vcpu, Vm, open_kvm
from pvclock.kvm._ioctls import CAPABILITY_NUMBERS, Kvm
from pvclock.kvm.backend import kvm_backend
from pvclock.kvm.capabilities import value_of
from pvclock.kvm.exits import Exit, IoIn, IoOut, Mmio, MsrExitReason, RdmsrExit, WrmsrExit
from pvclock.kvm.msr_filter import filter_ranges
from pvclock.machine.cpuid import vcpu_cpuid
from pvclock.machine.ram import Ram
from pvclock.providers.interface import CpuidLeaf
from pvclock.providers.kvm import CPUID_FEATURES, SERVED_BY_KERNEL, SERVED_HERE, kvm_cpuid_leaves
from pvclock.readings import RunReport

__all__ = ["CONSOLE_PORT", "EXIT_PORT", "Machine"]

EXIT_PORT: Final = 0xF4
"""A write ends the run; the byte is the exit code.  QEMU's isa-debug-exit is mostly put there."""

CONSOLE_PORT: Final = 0xE9
"""Bytes written here are the console; Bochs' and QEMU's debug console."""

CONSOLE_KEPT_BYTES: Final = 1 << 20
"""A guest may write for ever; the newest bytes are kept."""

NOBODY_ANSWERS: Final = b"\xff"


class Machine:
    """A VM with `image` in it, ready to start; a context manager that always cleans up.

    image: a multiboot-1 ELF or a flat real-mode image.  clock: who serves the guest's clock, "engine" (`self.clock`,
    a GuestClock, with the rest of the keywords as its options) or "kernel" (in-kernel kvmclock, with `features` or as
    the engine's; `self.clock` is None).

    KvmUnavailable, MissingCapability, ConfigError or ImageError if it cannot be made; nothing is left behind then.
    """

    def __init__(
        self,
        image: bytes,
        *,
        vcpus: int = 1,
        memory_bytes: int = 16 << 20,
        clock: Literal["engine", "kernel"] = "engine",
        cmdline: str = "",
        kvm: Kvm | None = None,
        **clock_options: object,
    ) -> None:
        if clock not in ("engine", "kernel"):
            raise ConfigError(f'clock {clock!r}; choose "engine" or "kernel"')
        if clock == "kernel" and set(clock_options) - {"features"}:
            raise ConfigError(f"the kernel's clock takes no options but features: {', '.join(clock_options)}")
        self.clock: GuestClock | None = None
        self.exit_code: int | None = None
        self._console = bytearray()
        self._console_lock = threading.Lock()
        self._crash: GuestCrashed | None = None
        with ExitStack() as resources:
            self._kvm = kvm or resources.enter_context(open_kvm())
            self._make_memory(resources, memory_bytes)
            self._make_vcpus(resources, vcpus, self._kvm)
            if clock == "engine":
                self._take_the_clock(self._kvm, vcpus, clock_options)
            else:
                self._leave_the_clock_to_the_kernel(**clock_options)  # type: ignore[arg-type]  # an int
            boot.enter(self.vcpus[0], boot.load(self.memory, image, cmdline))
            self._resources = resources.pop_all()

    # Life

    def start(self) -> None:
        """Let the vCPUs run."""
        self.runner.start()

    def wait(self, timeout_s: float | None = None) -> int:
        """The guest's exit code, once it has written one; the vCPUs have stopped then.

        GuestCrashed if it cannot go on; StateError if it has not ended within `timeout_s`.
        """
        if not self.runner.join(timeout_s):
            raise StateError("wait", f"the guest has not ended after {timeout_s} s", "wait longer or stop() it")
        self.stop()
        if self.runner.failure is not None:
            raise self.runner.failure
        if self._crash is not None:
            raise self._crash
        if self.exit_code is None:
            raise StateError("wait", "the machine was stopped", "there is no exit code")
        return self.exit_code

    def pause(self) -> None:
        """Return once no vCPU is in the guest, and let none in before resume(); the engine's clock stands still.

        The kernel's clock goes on.  Paused twice is paused.
        """
        self.runner.pause()
        if self.clock is not None and not self.clock.is_paused:
            self.clock.pause()

    def resume(self, policy: Policy | str = "freeze") -> None:
        """Let the vCPUs go on; `policy` says what becomes of the time that the engine's clock missed."""
        if self.clock is not None and self.clock.is_paused:
            self.clock.resume(policy)
        self.runner.resume()

    def run_for(self, ns: int) -> RunReport:
        """Let a paused machine with the engine's clock run for `ns` of guest time; it is paused again then."""
        return self._served_by_engine().run_for(ns)

    def stop(self) -> None:
        """End the run; the machine's memory can still be read."""
        self.runner.stop()

    def close(self) -> None:
        """Stop the run and give everything back.  May be called twice."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def console(self) -> str:
        """What the guest wrote to the console port up to now: all of it, or the last CONSOLE_KEPT_BYTES."""
        for vcpu in self.vcpus:
            self._append_to_console(vcpu)
        return self._console.decode(errors="replace")

    # Making

    def _make_memory(self, resources: ExitStack, memory_bytes: int) -> None:
        if memory_bytes > RAM_END:
            raise ConfigError(f"RAM of {memory_bytes} bytes; a machine takes up to {RAM_END}")
        ram = Ram(memory_bytes)
        resources.callback(ram.close)
        self.memory = resources.enter_context(GuestMemory(ram.buffer))
        self._ram = ram

    def _make_vcpus(self, resources: ExitStack, count: int, kvm: Kvm) -> None:
        most = max(value_of(kvm, "KVM_CAP_NR_VCPUS"), 1)
        if not 1 <= count <= max(most, 64):
            raise ConfigError(f"{count} vCPUs; choose 1 to {max(most, 64)}")
        self.vm: Vm = resources.enter_context(kvm.create_vm())
        self.vm.set_tss_addr(TSS)
        self.vm.set_identity_map_addr(IDENTITY_MAP)
        self.vm.set_user_memory_region(0, 0, self._ram.buffer)
        self.vm.create_irqchip()
        self.vcpus: list[Vcpu] = [resources.enter_context(self.vm.create_vcpu(i)) for i in range(count)]
        for vcpu in self.vcpus:
            vcpu.console_port = CONSOLE_PORT
        self.runner = Runner(self.vcpus, self._handle)
        resources.callback(self.runner.stop)

    def _take_the_clock(self, kvm: Kvm, vcpus: int, options: dict[str, object]) -> None:
        """Route the clock's MSRs here.  User-space exits come before the filter: else a filtered access faults."""
        self.vm.enable_cap(CAPABILITY_NUMBERS["KVM_CAP_X86_USER_SPACE_MSR"], MsrExitReason.FILTER)
        self.vm.set_msr_filter(filter_ranges())
        backend = kvm_backend(kvm, self.vcpus, self.runner, self._kernel_features(kvm))
        self.clock = GuestClock(self.memory, vcpus, backend=backend, engine="kvm", **options)  # type: ignore[arg-type]
        self._set_cpuid(kvm, self.clock.cpuid_leaves, self.clock)

    def _leave_the_clock_to_the_kernel(self, features: int | None = None) -> None:
        kvm = self._kvm
        offered = SERVED_HERE | self._kernel_features(kvm) if features is None else features
        self._set_cpuid(kvm, kvm_cpuid_leaves(offered), None)

    def _kernel_features(self, kvm: Kvm) -> int:
        supported = [entry["eax"] for entry in kvm.get_supported_cpuid() if entry["function"] == CPUID_FEATURES]
        return int(SERVED_BY_KERNEL & supported[0]) if supported else 0

    def _set_cpuid(self, kvm: Kvm, leaves: dict[int, CpuidLeaf], clock: GuestClock | None) -> None:
        patch = clock.patch_cpuid if clock is not None else _hypervisor_is_present
        supported = kvm.get_supported_cpuid()
        enforce = CAPABILITY_NUMBERS["KVM_CAP_ENFORCE_PV_FEATURE_CPUID"]
        for vcpu in self.vcpus:
            vcpu.set_cpuid(vcpu_cpuid(supported, vcpu.vcpu_id, leaves, patch))
            if kvm.check_extension(enforce):
                vcpu.enable_cap(enforce, 1)

    # Exits, on the vCPU's own thread

    def _handle(self, vcpu: int, reason: Exit) -> bool:
        match reason:
            case WrmsrExit(msr, value, _):
                self._write_msr(vcpu, msr, value)
            case RdmsrExit(msr, _):
                self._read_msr(vcpu, msr)
            case IoOut(port, _, data):
                return self._out(vcpu, port, data)
            case IoIn(_, size, repeats):
                self.vcpus[vcpu].complete_io(NOBODY_ANSWERS * size * repeats)
            case Mmio(_, length, None):
                self.vcpus[vcpu].complete_mmio(NOBODY_ANSWERS * length)
            case Mmio():
                pass
            case _:
                self._end_by(crash=GuestCrashed(vcpu, reason))
                return False
        return True

    def _out(self, vcpu: int, port: int, data: bytes) -> bool:
        if port == EXIT_PORT:
            self._end_by(exit_code=data[0])
        elif port == CONSOLE_PORT:
            self._append_to_console(self.vcpus[vcpu], data)
        return port != EXIT_PORT

    def _end_by(self, *, exit_code: int | None = None, crash: GuestCrashed | None = None) -> None:
        """Keep how the run ended: by what came first, for the other vCPUs go on until they are kicked."""
        if self.exit_code is None and self._crash is None:
            self.exit_code, self._crash = exit_code, crash

    def _append_to_console(self, vcpu: Vcpu, data: bytes = b"") -> None:
        """Append what `vcpu` has kept, and then `data`, which it wrote later."""
        with self._console_lock:
            self._console += vcpu.take_console() + data
            del self._console[:-CONSOLE_KEPT_BYTES]

    def _write_msr(self, vcpu: int, index: int, value: int) -> None:
        try:
            self._served_by_engine().write_msr(vcpu, index, value)
        except MsrFault:
            self.vcpus[vcpu].complete_msr(fault=True)
        else:
            self.vcpus[vcpu].complete_msr()

    def _read_msr(self, vcpu: int, index: int) -> None:
        try:
            self.vcpus[vcpu].complete_msr(self._served_by_engine().read_msr(vcpu, index))
        except MsrFault:
            self.vcpus[vcpu].complete_msr(fault=True)

    def _served_by_engine(self) -> GuestClock:
        if self.clock is None:
            raise MissingCapability("KVM_CAP_X86_MSR_FILTER", "by nobody: the kernel serves this guest's clock")
        return self.clock


def _hypervisor_is_present(leaf: int, _subleaf: int, registers: CpuidLeaf) -> CpuidLeaf:
    """The bits that GuestClock.patch_cpuid() would set, for a guest whose clock is the kernel's."""
    if leaf == 1:
        return registers._replace(ecx=registers.ecx | 1 << 31)
    if leaf == 0x80000007:
        return registers._replace(edx=registers.edx & ~(1 << 8))
    return registers
