"""A VMM's own run loop on /dev/kvm, its guest's clock served by pvclock: `python examples/vmm.py [DEVICE]`."""

import mmap
import os
import sys
import time

from pvclock import GuestClock, GuestMemory, HostTsc, MsrFault, Ticker, set_guest_cpuid
from pvclock.kvm import Exit, IoOut, Kvm, RdmsrExit, Runner, WrmsrExit, exit_on_msrs, kvm_backend, open_kvm

GUEST = bytes.fromhex(  # clock_guest.s: it registers a time page by WRMSR, and shows what it reads there by OUT
    "66b9014d564b66990f30668b37f7c6010075f70faee80f3166890566895504662b4708661b570c8a4f1c84c97809660fa5c266d3e0eb09f6d9"
    "660fadd066d3ea6689d166f767186687d16689d066f767186601c86683d200660347106613571466393775a5668945086689550ce610eb99"
)
CODE, PAGES, READINGS, SHOW_PORT, RUNNABLE = 0x1000, 0x2000, 0x3000, 0x10, 0


def main(kvm: Kvm) -> None:
    """Run a guest with two vCPUs for a second, with a pause in the middle."""
    ram = mmap.mmap(-1, 1 << 20)
    memory = GuestMemory(ram)
    memory.write(CODE, GUEST)
    vm = kvm.create_vm()
    vm.set_tss_addr(0xFFFBD000)  # real mode needs it on Intel's CPUs; no RAM may be there
    vm.set_user_memory_region(0, 0, ram)
    vm.create_irqchip()
    vcpus = [vm.create_vcpu(number) for number in range(2)]

    def handle(number: int, reason: Exit) -> bool:
        try:
            match reason:
                case WrmsrExit(msr, value):
                    clock.write_msr(number, msr, value)
                    vcpus[number].complete_msr()
                case RdmsrExit(msr):
                    vcpus[number].complete_msr(clock.read_msr(number, msr))
                case IoOut(port) if port == SHOW_PORT:
                    show(number)
                case _:
                    raise RuntimeError(f"vCPU {number} cannot go on: {reason}")
        except MsrFault:
            vcpus[number].complete_msr(fault=True)
        return True  # False ends the run

    def show(number: int) -> None:
        tsc, ns = (int.from_bytes(memory.read(READINGS + 16 * number + at, 8), "little") for at in (0, 8))
        host_ns = float(clock.at(HostTsc((tsc - clock.tsc(number).offset) % 2**64)))  # RangeError if it never was
        print(f"vCPU {number}: guest {ns} ns, host {host_ns:.1f} ns, apart {ns - host_ns:+.1f} ns\n", end="")
        time.sleep(0.1)

    runner = Runner(vcpus, handle)
    clock = GuestClock(memory, len(vcpus), backend=kvm_backend(kvm, vcpus, runner), vcpu_host="kvm")
    exit_on_msrs(vm, clock.msr_ranges)
    set_guest_cpuid(kvm, vcpus, clock)
    for number, vcpu in enumerate(vcpus):
        sregs, page = vcpu.get_sregs(), PAGES + 64 * number
        sregs["cs"].update(base=0, selector=0)
        vcpu.set_sregs(sregs)
        start = {"rip": CODE, "rflags": 2, "rax": page | 1, "rbx": page, "rdi": READINGS + 16 * number}
        vcpu.set_regs({**vcpu.get_regs(), **start})
        vcpu.set_mp_state(RUNNABLE)  # all but the first would wait for INIT and SIPI
    with runner, Ticker(clock):
        time.sleep(0.5)
        runner.pause()  # vCPUs first: time may stand still once nobody reads it
        clock.pause()
        time.sleep(0.3)
        settled = clock.resume("freeze")
        print(f"paused: {float(settled.dropped_ns):.0f} ns are left out of guest time")
        runner.resume()  # vCPUs last: the pages are right by now
        time.sleep(0.5)


if __name__ == "__main__":
    try:
        main(open_kvm(" ".join(sys.argv[1:]) or "/dev/kvm"))
        sys.stdout.flush()
    except OSError as error:  # a KvmError is one; or nobody reads on, or the disk is full
        print(error, file=sys.stderr)
        os._exit(2)  # sys.exit() would write what is left, and fail again
