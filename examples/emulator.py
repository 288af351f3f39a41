"""A VMM that emulates its CPU, the guest's clock served by pvclock; it runs anywhere: `python examples/emulator.py`."""

import os
import time
from typing import NamedTuple

import pvclock


class Do(NamedTuple):
    """What vCPU 0 executes next; `clock`, `timer` and `wait` stand for several instructions."""

    what: str
    first: int = 0
    second: int = 0


PROGRAM = [Do("cpuid", 1), Do("cpuid", 0x40000001), Do("wrmsr", 0x4B564D01, 0x2000 | 1), Do("rdtsc"), Do("clock")]
PROGRAM += [Do("timer", 50_000_000), Do("wait"), Do("clock"), Do("vmcall", 9, 0x3000), Do("rdmsr", 0x4B564D08)]
FEATURELESS = pvclock.CpuidLeaf()  # what this CPU says of itself in every leaf


def execute(clock: pvclock.GuestClock, timers: pvclock.Timers, do: Do) -> object:
    """Do it; MsrFault is the guest's #GP."""
    answer: object = None
    match do:
        case Do("cpuid", leaf, subleaf):
            answer = clock.cpuid(leaf, subleaf) or clock.patch_cpuid(leaf, subleaf, FEATURELESS)
        case Do("rdtsc"):
            answer = clock.guest_tsc(0, pvclock.HostTsc(clock.backend.counter.read()))
        case Do("rdmsr", msr):
            answer = clock.read_msr(0, msr)
        case Do("wrmsr", msr, value):
            clock.write_msr(0, msr, value)
        case Do("vmcall", rax, rbx):
            answer = clock.hypercall(0, pvclock.HypercallRegisters(rax, rbx))
        case Do("clock"):  # what guest code makes of its page and its TSC
            reading = clock.reading(0)
            apart_ns = float(reading.ns - clock.at(pvclock.HostTsc(reading.tsc)))
            answer = f"guest {reading.ns} ns, {apart_ns:+.1f} ns from the timeline"
        case Do("timer", ns):
            due_ns = pvclock.GuestNs(clock.now() + ns)
            timers.add(due_ns, lambda firing: print(f"interrupt, {firing.late_ns} ns late"))
        case Do("wait") if timers.next_due_ns is not None:
            time.sleep(max(timers.next_due_ns - clock.now(), 0) / 10**9)
            timers.advance(clock.now())
    return answer


if __name__ == "__main__":
    memory = pvclock.GuestMemory(bytearray(1 << 20))
    clock, timers = pvclock.GuestClock(memory, backend=pvclock.HostBackend()), pvclock.Timers()
    for do in PROGRAM:
        try:
            print(f"{do.what} {do.first:#x} {do.second:#x}:", execute(clock, timers, do), flush=True)
        except pvclock.MsrFault as fault:
            print("#GP:", fault)
        except OSError:  # nobody reads on, or the disk is full
            os._exit(2)  # sys.exit() would write what is left, and fail again
        clock.tick()  # every second or so is enough
