"""Hostile guests beside VMM threads and a Ticker: does anything break, hang, lie, or keep another VM waiting?

    python -m tests.stress.hostile_guest --minutes 10 --seed 1

Five VMs whose vCPUs do what they can, three with Hyper-V's interface: alone, beside KVM's, and as VirtualBox has it.
Each has a vCPU that reads its page, but for VirtualBox's, which may go back, and a VMM thread that does every
operation.  Where there is /dev/kvm, a real VM for each interface, whose guest floods the MSRs.  And one VM that is left
in peace and must be ticked.
Prints what was done, how often, and the findings; the exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from fractions import Fraction
from typing import Final, NamedTuple, Protocol

from pvclock import GuestClock, GuestMemory, HostBackend, PvclockError
from pvclock.clock.ticker import Ticker
from tests import oracle
from tests.stress.hostile_actors import HostileVcpu, QuietVcpu, Vmm
from tests.stress.hostile_hyperv import QuietReference
from tests.stress.hostile_machine import MachineVmm
from tests.stress.hostile_vm import HYPERV_GUESTS, KVM_GUESTS, PAGE_BYTES, Findings, Mischief, Vm
from tests.waiting import HANG_S

TICK_S: Final = 0.05
LOOK_S: Final = 0.2
PEACE_BOUND_NS: Final = 2
GUESTS: Final = {**KVM_GUESTS, **HYPERV_GUESTS}


class Acting(Protocol):
    """Who acts, one step at a time."""

    def step(self) -> str:
        """Act, and say what was done."""


class Actor:
    """A thread that takes steps until it is told to end; counts them, and keeps what should not have come out."""

    def __init__(self, name: str, acting: Acting, findings: Findings) -> None:
        self.name = name
        self.steps = Counter[str]()
        self.count = 0
        self.began_s = time.monotonic()
        """When the present step began."""
        self.longest = (0.0, "")
        """The longest step, in seconds, and what it was."""
        self._acting, self._findings = acting, findings
        self._ended = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def end(self) -> None:
        """Take no further step."""
        self._ended = True

    def _run(self) -> None:
        while not self._ended:
            self.began_s = time.monotonic()
            try:
                done = self._acting.step()
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is what is looked for
                done = f"FINDING {type(error).__name__}"
                where = "".join(traceback.format_exception(error)[-6:])
                self._findings.add(f"{self.name.rstrip('0123456789')}: {where}")
            self.steps[done] += 1
            self.count += 1
            self.longest = max(self.longest, (time.monotonic() - self.began_s, done))


class Outcome(NamedTuple):
    """What was done, by whom, how often; how often the VM in peace was ticked; and what went wrong."""

    steps: dict[str, Counter[str]]
    longest: dict[str, tuple[float, str]]
    ticks: int
    longest_without_a_tick_s: float
    findings: list[str]


class Peaceful:
    """A VM that nobody attacks, and that counts its ticks."""

    def __init__(self) -> None:
        self.clock = GuestClock(GuestMemory(bytearray(0x2000)), backend=HostBackend(Host.tsc_hz()))
        self.clock.write_msr(0, 0x4B564D01, 0x1001)
        self._first = self._page()
        self.ticks = 0
        self.last_s = time.monotonic()
        self.longest_s = 0.0
        self._tick = self.clock.tick
        self.clock.tick = self._counted  # type: ignore[method-assign]  # what a Ticker calls

    def off_ns(self) -> Fraction:
        """How far its page is from what its first one and the TSC say."""
        page = self._page()
        ticks = page.tsc_timestamp - self._first.tsc_timestamp
        return page.system_time - self._first.system_time - Fraction(ticks * 10**9, Host.tsc_hz())

    def _page(self) -> oracle.TimeInfo:
        return oracle.TimeInfo.parse(self.clock.memory.read(0x1000, PAGE_BYTES))

    def _counted(self) -> None:
        now = time.monotonic()
        self.ticks += 1
        self.longest_s, self.last_s = max(self.longest_s, now - self.last_s), now
        self._tick()


class Host:
    """This host's TSC frequency, measured once."""

    _tsc_hz = 0

    @classmethod
    def tsc_hz(cls) -> int:
        """In Hz."""
        cls._tsc_hz = cls._tsc_hz or HostBackend().tsc_hz
        return cls._tsc_hz


class Soak:
    """Everybody who acts, from begin to end."""

    def __init__(self, seed: int, *, machine: bool, guests: Mapping[str, Mapping[str, object]] = GUESTS) -> None:
        self.findings = Findings()
        self.peaceful = Peaceful()
        self._hold = threading.Event()
        host = HostBackend(Host.tsc_hz())

        def rng(name: str) -> random.Random:
            return random.Random(f"{seed}/{name}")  # noqa: S311  # repeatable, not secret

        self.vms = [Vm(name, guests[name], rng(f"host of {name}"), self.findings, host) for name in guests]
        self.ticker = Ticker(self.peaceful.clock, *(vm.clock for vm in self.vms), interval_s=TICK_S)
        acting: dict[str, Acting] = {}
        for vm in self.vms:
            for vcpu in range(vm.QUIET):
                acting[f"{vm.name} vCPU {vcpu}"] = HostileVcpu(vm, vcpu, rng(f"{vm.name} {vcpu}"))
            acting |= {f"{vm.name} {name}": quiet for name, quiet in _quiet_vcpu(vm, self.findings).items()}
            acting[f"{vm.name} VMM"] = Vmm(vm, self.ticker, self.findings, rng(f"VMM of {vm.name}"), self._hold)
        self._resources = ExitStack()
        providers = {str(config["provider"]) for config in guests.values()} if machine else set()
        self.machines = {
            name: self._resources.enter_context(MachineVmm(self.ticker, rng(f"machine {name}"), name))
            for name in sorted(providers)
        }
        acting |= {f"{name} machine": each for name, each in self.machines.items()}
        self.actors = [Actor(name, each, self.findings) for name, each in acting.items()]

    def run(self, is_over: Callable[[Soak], bool], limit_s: float = 4 * HANG_S) -> Outcome:
        """Let them act until `is_over`, at most for `limit_s`, or until one hangs; that one's stack is printed."""
        end_s = time.monotonic() + limit_s
        with self._resources, self.ticker:
            for vm in self.vms:
                vm.timers.start()
            for actor in self.actors:
                actor.thread.start()
            while not (over := is_over(self)) and not self._hanging() and time.monotonic() < end_s:
                self._hold.wait(LOOK_S)
            if not over:
                self.findings.add(
                    f"what was waited for did not come, within {[actor.count for actor in self.actors]} steps"
                )
            for actor in self.actors:
                actor.end()
            for actor in self.actors:
                actor.thread.join(HANG_S)
            if hanging := self._hanging():
                self.findings.add(f"hanging: {', '.join(hanging)}")
                faulthandler.dump_traceback()
        self._look_at_ticker()
        if abs(off_ns := self.peaceful.off_ns()) > PEACE_BOUND_NS:
            self.findings.add(f"the page of the VM in peace is {float(off_ns)} ns off")
        for vm in self.vms:
            vm.stop_timers()
            vm.arena.check()
        steps = {actor.name: actor.steps for actor in self.actors}
        longest = {actor.name: actor.longest for actor in self.actors}
        return Outcome(steps, longest, self.peaceful.ticks, self.peaceful.longest_s, list(self.findings))

    def _hanging(self) -> list[str]:
        now = time.monotonic()
        hanging = [each.name for each in self.actors if each.thread.is_alive() and now - each.began_s > HANG_S]
        return hanging + (["no tick"] if now - self.peaceful.last_s > HANG_S else [])

    def _look_at_ticker(self) -> None:
        for clock, error in self.ticker.failures:
            if clock is self.peaceful.clock or not isinstance(error, Mischief | PvclockError):
                self.findings.add(f"a tick of {clock}: {''.join(traceback.format_exception(error))}")


def _quiet_vcpu(vm: Vm, findings: Findings) -> dict[str, Acting]:
    """Who reads the VM's pages."""
    quiet: dict[str, Acting] = {}
    if vm.has_pvclock:
        quiet["quiet"] = QuietVcpu(vm, findings)
    if vm.has_reference_time:
        quiet["reference"] = QuietReference(vm, findings)
    return quiet


def main() -> int:
    """See this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-machine", action="store_true", help="without a real VM on /dev/kvm")
    arguments = parser.parse_args()
    faulthandler.enable()
    sys.setswitchinterval(1e-4)
    end_s = time.monotonic() + arguments.minutes * 60
    soak = Soak(arguments.seed, machine=not arguments.no_machine)
    outcome = soak.run(lambda _: time.monotonic() > end_s, limit_s=float("inf"))
    sys.stdout.write(report(outcome, f"seed {arguments.seed}, {arguments.minutes:g} min"))
    return bool(outcome.findings)


def report(outcome: Outcome, title: str) -> str:
    """What was done, how often, how long it took at most, and the findings."""
    lines = []
    for name, steps in outcome.steps.items():
        seconds, longest = outcome.longest[name]
        lines.append(f"{name}: {steps.total()} steps, the longest {seconds:.2f} s ({longest}): {dict(steps)}")
    lines.append(f"the VM in peace: {outcome.ticks} ticks, the longest gap {outcome.longest_without_a_tick_s:.2f} s")
    total = sum(steps.total() for steps in outcome.steps.values())
    lines.append(f"{title}: {total} steps, {len(outcome.findings)} findings")
    return "\n".join([*lines, *outcome.findings, ""])


if __name__ == "__main__":
    sys.exit(main())
