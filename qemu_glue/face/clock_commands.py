"""QMP's commands for a guest's time: what its clock shows, and what is done to it."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isfinite
from typing import Final

from pvclock import GuestClock, TimeInfo
from pvclock.machine import Machine
from pvclock.machine.time_travel import Travel
from qemu_glue.errors import QmpRefusal
from qemu_glue.face.answers import ClockInfo, PageInfo, Ratio, VcpuClockInfo
from qemu_glue.face.dispatch import Command, command_of

__all__ = ["CHANGE", "ClockCommands"]

CHANGE: Final = "X_PVCLOCK_CHANGE"
"""The event for each of the clock's; its data is that one as GuestClock.events has it in JSON."""
EVENTS_MAX: Final = 1000
MAX_PPM: Final = 500


class ClockCommands:
    """The commands for the clock of `machine`: all but x-pvclock-travel for the engine's alone."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def table(self) -> dict[str, Command]:
        """Each command by its name."""
        functions: dict[str, Callable[..., object]] = {
            "x-pvclock-query": self._query,
            "x-pvclock-set-policy": self._set_policy,
            "x-pvclock-skip": self._skip,
            "x-pvclock-set-rate": self._set_rate,
            "x-pvclock-slew": self._slew,
            "x-pvclock-follow": self._follow,
            "x-pvclock-travel": self._travel,
        }
        return {name: command_of(function) for name, function in functions.items()}

    def _clock(self) -> GuestClock:
        """The machine's; it is another one after a roll_back()."""
        if self._machine.clock is None:
            raise QmpRefusal("the kernel serves this machine's clock; run it with --clock engine")
        return self._machine.clock

    def _query(self) -> ClockInfo:
        clock = self._clock()
        steering = clock.steering
        return {
            "guest-ns": clock.now(),
            "is-paused": clock.is_paused,
            "policy": str(clock.policy),
            "reference": str(clock.reference),
            "rate": float(clock.rate),
            "dilation": _ratio(clock.dilation),
            "skew-ns": float(clock.skew_ns),
            "tsc-hz": clock.tsc_hz,
            "steering": None
            if steering is None
            else {
                "state": str(steering.state),
                "error-ns": _known(steering.error_ns),
                "bound-ns": _known(steering.bound_ns),
            },
            "vcpus": [self._vcpu(clock, vcpu) for vcpu in range(clock.vcpus)],
            "last-event": clock.events.last,
        }

    def _vcpu(self, clock: GuestClock, vcpu: int) -> VcpuClockInfo:
        page = clock.page(vcpu)
        return {
            "cpu-index": vcpu,
            "tsc-offset": clock.tsc(vcpu).offset,
            "page": None if page is None else _page(page),
        }

    def _set_policy(self, policy: str) -> None:
        self._clock().policy = policy

    def _skip(self, ns: int) -> None:
        self._clock().skip(ns)

    def _set_rate(self, numerator: int, denominator: int = 1) -> None:
        self._clock().dilate(numerator, denominator)

    def _slew(self, ns: int, max_ppm: int = MAX_PPM) -> None:
        self._clock().slew(ns, max_ppm)

    def _follow(self, reference: str) -> None:
        self._clock().follow(reference)

    def _travel(self, on: bool | None = None, until_ns: int | None = None, max_rate: float | None = None) -> object:
        """Switch travel on or off, if it is said, and tell how it is."""
        travel = self._machine.time_travel
        if not on and (until_ns is not None or max_rate is not None):
            raise QmpRefusal("until-ns and max-rate are of travel that is switched on: with them, on is true")
        if on:
            travel.enable(Travel(until_ns, max_rate))
        elif on is not None:
            travel.disable()
        log, options = travel.log, travel.options
        return {
            "is-on": travel.is_enabled,
            "until-ns": options.until_ns,
            "max-rate": None if options.max_rate is None else float(options.max_rate),
            "why-not": travel.why_not,
            "failure": None if travel.failure is None else str(travel.failure),
            "holds": travel.holds,
            "is-idle-forever": log.is_idle_forever,
            "skips": log.skips,
            "skipped-ns": log.skipped_ns,
            "largest-ns": log.largest_ns,
            "host-ns": log.host_ns,
        }


def _page(page: TimeInfo) -> PageInfo:
    return {
        "version": page.version,
        "tsc-timestamp": page.tsc_timestamp,
        "system-time": page.system_time,
        "tsc-to-system-mul": page.tsc_to_system_mul,
        "tsc-shift": page.tsc_shift,
        "flags": page.flags,
    }


def _known(ns: float) -> float | None:
    """None before the first sample, for JSON has no nan and no inf."""
    return ns if isfinite(ns) else None


def _ratio(fraction: Fraction) -> Ratio:
    numerator, denominator = fraction.as_integer_ratio()
    return {"numerator": numerator, "denominator": denominator}
