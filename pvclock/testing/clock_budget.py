"""A budget for a guest's clock: how far it may step and drift while a test does something to its VM."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Final, Self

from pvclock.arguments import flag, serving, text
from pvclock.clock.guest_clock import GuestClock
from pvclock.errors import ConfigError
from pvclock.host.simulated import SimulatedBackend
from pvclock.host.this_host import bracketed, measured_tsc_hz
from pvclock.machine import Machine
from pvclock.meter.quantity_text import parse_drift_ppb, parse_step_ns
from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.budgets import Budgets, Verdict
from pvclock.meter.watch.host_troubles import HostTrouble, HostTroubles
from pvclock.meter.watch.poll import Poll, Utc, take_poll
from pvclock.meter.watch.vm import WatchedVm
from pvclock.readings import Reference
from pvclock.testing.local_vm import LocalVm, vm_of_clock, vm_of_machine
from pvclock.testing.watches import ClockWatch, EngineWatch, Findings, ForeignWatch, KernelWatch

__all__ = ["ClockBudget"]

HOST_CHECK_S: Final = 1.0
BROKEN: Final = "the guest's clock broke its budget:"
STEP_WANTED: Final = 'text with a unit, such as "1us"'
DRIFT_WANTED: Final = 'text with a unit, such as "100 ppb"'
UNDECIDED: Final = "it is undecided whether the guest's clock kept to its budget:"


class ClockBudget:
    """A context manager that watches a guest's clock, and fails at its end if that broke its budget.

    guest: a Machine, with the engine's clock or the kernel's; a GuestClock of a VMM's own; or a WatchedVm, such as
    qemu_glue.watch gives for a running QEMU.  Its pages are read as its guest reads them.
    step: the longest step allowed, either way, against the TSC: "1us".  drift: the greatest rate against `reference`
    (raw, monotonic, realtime): "100 ppb".  One of the two at least.
    allow_pauses: a step at a pause counts by what the guest saw of it: nothing, if its clock stood still meanwhile.
    tsc_unchanged: nobody changed the guest's TSC; for the kernel's clock, where its offset cannot be read.

    AssertionError at the end, with each reason, if the budget was broken, or if what was seen does not decide it: the
    rate of a short test is not known well.  If the body raises, that is what is raised.  The guest has to be there at
    the end: else the error is that of who reads its memory.

    verdict: how it fared; None before the end.
    """

    def __init__(
        self,
        guest: Machine | GuestClock | WatchedVm,
        *,
        step: str | None = None,
        drift: str | None = None,
        reference: Reference | str = Reference.RAW,
        allow_pauses: bool = False,
        tsc_unchanged: bool = False,
    ) -> None:
        budgets = Budgets(
            max_step_ns=None if step is None else parse_step_ns(text("step", step, STEP_WANTED)),
            max_drift_ppb=None if drift is None else parse_drift_ppb(text("drift", drift, DRIFT_WANTED)),
            tsc_unchanged=flag("tsc_unchanged", tsc_unchanged),
            allow_pauses=flag("allow_pauses", allow_pauses),
        )
        if budgets.max_step_ns is None and budgets.max_drift_ppb is None:
            raise ConfigError('a budget for what? give step="1us", drift="100 ppb" or both')
        self.verdict: Verdict | None = None
        self._watch = _watch_of(guest, budgets, _reference(reference))

    def __enter__(self) -> Self:
        self._watch.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(Exception):  # the VM may have gone with the body
                self.verdict = self._watch.finish()
            return
        self.verdict = self._watch.finish()
        if self.verdict.status is not VerdictStatus.PASSED:
            raise AssertionError(_told(self.verdict))


def _watch_of(guest: Machine | GuestClock | WatchedVm, budgets: Budgets, reference: Reference) -> ClockWatch:
    match guest:
        case Machine(clock=None):
            vm = vm_of_machine(guest)
            return KernelWatch(vm, _findings(vm, budgets, reference))
        case Machine():
            vm = vm_of_machine(guest)
            return EngineWatch(vm, guest.memory, _findings(vm, budgets, reference), partial(take_poll, vm))
        case GuestClock(backend=SimulatedBackend() as host):
            vm = vm_of_clock(guest)
            findings = Findings(vm, budgets, host.tsc_hz, lambda: host.sample(reference))
            return EngineWatch(vm, guest.memory, findings, partial(_simulated_poll, vm, guest, host), wait_s=0)
        case GuestClock():
            vm = vm_of_clock(guest)
            return EngineWatch(vm, guest.memory, _findings(vm, budgets, reference), partial(take_poll, vm))
    wanted = "a Machine, a GuestClock or a WatchedVm"
    return ForeignWatch(serving("guest", guest, "tsc_offsets", "take_events", wanted=wanted), budgets, reference)


def _findings(vm: LocalVm, budgets: Budgets, reference: Reference) -> Findings:
    """What is found by this host's TSC."""
    tsc_hz = measured_tsc_hz()
    return Findings(vm, budgets, tsc_hz, lambda: bracketed(reference, tsc_hz), _troubles(tsc_hz))


def _troubles(tsc_hz: int) -> Callable[[], list[HostTrouble]]:
    """What tells of troubles of this host from now on by which its TSC cannot be trusted."""
    host = HostTroubles(tsc_hz, HOST_CHECK_S)
    return lambda: [each for each in (*host.at_begin, *host.check()) if each.unstable]


def _simulated_poll(vm: LocalVm, clock: GuestClock, host: SimulatedBackend, _pages: object) -> Poll:
    """As take_poll(), at one instant of the simulated host's time."""
    at, pages = host.tsc, tuple(map(clock.page, range(clock.vcpus)))
    return Poll(at, at, at, pages, vm.tsc_offsets(), tuple(vm.take_events()), Utc(at, host.realtime_ns, 0))


def _reference(given: Reference | str) -> Reference:
    try:
        return Reference(given)
    except ValueError:
        choices = ", ".join(Reference)
        raise ConfigError(f"reference {given!r}; choose {choices}") from None


def _told(verdict: Verdict) -> str:
    """What failed, for people."""
    first = BROKEN if verdict.status is VerdictStatus.BROKEN else UNDECIDED
    return "\n".join([first, *(f"  {finding}" for finding in verdict.findings)])
