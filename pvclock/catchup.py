"""What becomes of time that passed while a guest did not run.

A policy settles `missed` nanoseconds of guest time: part of it is gained at once, as one declared step forward, part is
slewed in afterwards, and the rest never happened for the guest.  Pure: the timeline is told the outcome.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from operator import index
from typing import Final, NamedTuple, TypeAlias

from pvclock.errors import ConfigError, RangeError
from pvclock.quantities import NS_PER_S

__all__ = [
    "ABSURD_NS",
    "VIRTUALBOX",
    "Advance",
    "CatchUpTable",
    "Freeze",
    "Policy",
    "Settlement",
    "Slew",
    "describe",
    "parse",
]

ABSURD_NS: Final = 366 * 86400 * NS_PER_S
"""No guest is told at once that more than a year has passed: such a host clock was set wrong, or is."""

PPM: Final = 1_000_000
MOST_PPM: Final = 10 * PPM


class Settlement(NamedTuple):
    """gain_ns: a step forward now.  slew_ns: to be slewed in by `slew`.  lost_ns: what the guest never has.

    why: what was bounded or refused, empty where the policy was applied as it stands.
    """

    gain_ns: Fraction
    slew_ns: Fraction
    lost_ns: Fraction
    slew: Slew | CatchUpTable | None = None
    why: str = ""


class Freeze(NamedTuple):
    """The guest goes on where it was: the time it missed never happened."""

    def settle(self, missed_ns: Fraction) -> Settlement:
        """All is lost."""
        return Settlement(Fraction(0), Fraction(0), missed_ns)


class Advance(NamedTuple):
    """The guest is told at once, up to max_ns."""

    max_ns: int = ABSURD_NS

    def settle(self, missed_ns: Fraction) -> Settlement:
        """Gain what was missed, up to the bound."""
        gain = min(missed_ns, Fraction(self.max_ns))
        return Settlement(gain, Fraction(0), missed_ns - gain, None, _left_out(missed_ns - gain, self.max_ns))


class Slew(NamedTuple):
    """The guest's clock runs fast by max_ppm until it has caught up, or max_ns of it."""

    max_ppm: int = 500
    max_ns: int = ABSURD_NS

    def settle(self, missed_ns: Fraction) -> Settlement:
        """Owe what was missed, up to the bound."""
        owed = min(missed_ns, Fraction(self.max_ns))
        return Settlement(Fraction(0), owed, missed_ns - owed, self, _left_out(missed_ns - owed, self.max_ns))

    def ppm(self, lag_ns: Fraction) -> int:
        """How much faster than nominal a clock runs that lags by lag_ns."""
        return self.max_ppm

    def is_done(self, lag_ns: Fraction) -> bool:
        """Is the lag below what a page can show?"""
        return abs(lag_ns) < 2


class CatchUpTable(NamedTuple):
    """The further behind, the faster: (lag in ns, percent) from the least lag on.

    Beyond give_up_ns nothing is caught up, and at stop_ns the rest is dropped.
    """

    periods: tuple[tuple[int, int], ...]
    stop_ns: int
    give_up_ns: int

    def settle(self, missed_ns: Fraction) -> Settlement:
        """Owe all, or give all up."""
        if missed_ns > self.give_up_ns:
            why = f"a lag of {round(missed_ns)} ns is given up: it is beyond {self.give_up_ns} ns"
            return Settlement(Fraction(0), Fraction(0), missed_ns, None, why)
        return Settlement(Fraction(0), missed_ns, Fraction(0), self)

    def ppm(self, lag_ns: Fraction) -> int:
        """How much faster than nominal a clock runs that lags by lag_ns; a clock that is ahead goes as much slower."""
        percents = [percent for from_ns, percent in self.periods if abs(lag_ns) >= from_ns] or [self.periods[0][1]]
        return percents[-1] * (PPM // 100)

    def is_done(self, lag_ns: Fraction) -> bool:
        """Is the lag no more than what is tolerated?"""
        return abs(lag_ns) <= self.stop_ns


Policy: TypeAlias = Freeze | Advance | Slew | CatchUpTable

_US: Final = 1000
_MS: Final = 1_000_000

VIRTUALBOX: Final = CatchUpTable(
    (
        *((750 * _US, 5), (1500 * _US, 10), (8 * _MS, 25), (30 * _MS, 50), (75 * _MS, 75), (175 * _MS, 100)),
        *((500 * _MS, 200), (3000 * _MS, 300), (30_000 * _MS, 400), (55_000 * _MS, 500)),
    ),
    stop_ns=500 * _US,
    give_up_ns=60_000 * _MS,
)
"""VirtualBox's virtual-sync clock (rows TM-14, TM-15)."""


def settle(policy: Policy, missed_ns: Fraction) -> Settlement:
    """What `policy` makes of missed_ns; a host clock that went back has missed nothing, and `why` says so."""
    if missed_ns < 0:
        nothing = Fraction(0)
        why = f"the host's clock went back by {round(-missed_ns)} ns; the guest's does not"
        return Settlement(nothing, nothing, nothing, None, why)
    return policy.settle(missed_ns)


def _left_out(ns: Fraction, bound_ns: int) -> str:
    return f"{round(ns)} ns beyond the bound of {bound_ns} ns were left out" if ns else ""


def parse(text: str) -> Policy:
    """A policy by its name: "freeze", "advance", "advance:max_ns=N", "slew:max_ppm=N", "virtualbox".

    ConfigError for anything else, RangeError for a bound that makes no sense.
    """
    name, _, rest = text.partition(":")
    options = dict(re.findall(r"(\w+)=(\d+)", rest))
    if rest != ",".join(f"{key}={value}" for key, value in options.items()):
        raise ConfigError(f"policy {text!r}: options are written as NAME=NUMBER, with commas between")
    if name not in _MAKERS:
        raise ConfigError(f"policy {text!r}; choose from {', '.join(_MAKERS)}")
    try:
        return _checked(_MAKERS[name](**{key: int(value) for key, value in options.items()}))
    except TypeError:
        raise ConfigError(f"policy {text!r}: {name} takes {', '.join(_OPTIONS[name]) or 'no options'}") from None


def as_policy(policy: Policy | str) -> Policy:
    """The policy, given as such or by its name."""
    return parse(policy) if isinstance(policy, str) else _checked(policy)


def describe(policy: Policy) -> str:
    """The name that parse() takes."""
    if policy == VIRTUALBOX:
        return "virtualbox"
    if isinstance(policy, CatchUpTable):
        raise ConfigError("a catch-up table of one's own has no name, so it cannot be stored")
    options = ",".join(
        f"{key}={value}" for key, value in policy._asdict().items() if value != policy._field_defaults[key]
    )
    return type(policy).__name__.lower() + (f":{options}" if options else "")


def _checked(policy: Policy) -> Policy:
    bound = getattr(policy, "max_ns", 1)
    ppm = getattr(policy, "max_ppm", 1)
    if index(bound) < 0 or not 0 < index(ppm) <= MOST_PPM:
        raise RangeError(f"{policy}: max_ns is 0 or more, max_ppm between 1 and {MOST_PPM}")
    return policy


_MAKERS: Final[dict[str, Callable[..., Policy]]] = {
    "freeze": Freeze,
    "advance": Advance,
    "slew": Slew,
    "virtualbox": lambda: VIRTUALBOX,
}
_OPTIONS: Final = {"freeze": (), "advance": Advance._fields, "slew": Slew._fields, "virtualbox": ()}
