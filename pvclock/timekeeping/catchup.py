"""Catch-up policies: how a guest makes up for time that passed while it did not run.

A policy splits `missed` nanoseconds of guest time into one declared step forward, a part that is slewed in afterwards,
and a part that the guest drops.  Pure: the caller applies the result to the timeline.

as_policy() and parse() check a policy; what they return needs no further check.  str(policy) is the name that a saved
state holds, and parse() reads it back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any, Final, NamedTuple, TypeAlias

from pvclock import arguments
from pvclock.arguments import fraction, whole
from pvclock.errors import ConfigError, WrongType
from pvclock.quantities import NS_PER_S, U64_MASK

__all__ = [
    "ABSURD_NS",
    "VIRTUALBOX",
    "Advance",
    "CatchUpTable",
    "Freeze",
    "Policy",
    "CatchUp",
    "Slew",
    "SlewPolicy",
    "as_policy",
    "parse",
    "settle",
]

ABSURD_NS: Final = 366 * 86400 * NS_PER_S
"""Default bound of a step or slew, one year: a longer gap means that a host clock is or was set wrong."""

PPM: Final = 1_000_000
MOST_PPM: Final = 10 * PPM
PPM_PER_PERCENT: Final = PPM // 100

NAME_MAX: Final = 256
"""Longest policy name that a saved state holds, in characters."""


class CatchUp(NamedTuple):
    """How missed guest time is split, in ns: step forward now, slew in by policy `slew`, drop.

    why: what was bounded or refused; empty if the policy was applied in full.
    """

    step_ns: Fraction
    slew_ns: Fraction
    dropped_ns: Fraction
    slew: SlewPolicy | None = None
    why: str = ""

    def __str__(self) -> str:
        parts = f"stepped {float(self.step_ns):.0f} ns, to slew {float(self.slew_ns):.0f} ns"
        return f"{parts}, dropped {float(self.dropped_ns):.0f} ns" + (f": {self.why}" if self.why else "")


class Freeze(NamedTuple):
    """Drop the missed time: the guest goes on where it stopped."""

    def __str__(self) -> str:
        return "freeze"

    def settle(self, missed_ns: Fraction) -> CatchUp:
        """Drop all of missed_ns."""
        return CatchUp(Fraction(0), Fraction(0), missed_ns)


class Advance(NamedTuple):
    """Step forward by the missed time at once, up to max_ns (0 to 2^64 - 1); drop the rest."""

    max_ns: int = ABSURD_NS

    def __str__(self) -> str:
        return _named("advance", self)

    def settle(self, missed_ns: Fraction) -> CatchUp:
        """Step by missed_ns, up to max_ns."""
        step_ns = min(missed_ns, Fraction(self.max_ns))
        return CatchUp(step_ns, Fraction(0), missed_ns - step_ns, None, _left_out(missed_ns - step_ns, self.max_ns))


class Slew(NamedTuple):
    """Run the clock fast by max_ppm (1 to 10^7) until it caught up; drop what exceeds max_ns (0 to 2^64 - 1)."""

    max_ppm: int = 500
    max_ns: int = ABSURD_NS

    def __str__(self) -> str:
        return _named("slew", self)

    def settle(self, missed_ns: Fraction) -> CatchUp:
        """Slew missed_ns in, up to max_ns."""
        slew_ns = min(missed_ns, Fraction(self.max_ns))
        return CatchUp(Fraction(0), slew_ns, missed_ns - slew_ns, self, _left_out(missed_ns - slew_ns, self.max_ns))

    def ppm(self, lag_ns: Fraction) -> int:
        """The slew in ppm of nominal, whatever the lag."""
        return self.max_ppm

    def is_done(self, lag_ns: Fraction) -> bool:
        """Is the lag below what a page can show?"""
        return abs(lag_ns) < 2


class CatchUpTable(NamedTuple):
    """Slew faster the further the clock lags: `periods` of (least lag in ns, percent of nominal).

    periods: at least one, by rising lag, percents 1 to 1000; the first also serves smaller lags.  A lag beyond
    give_up_ns is dropped whole; a slew ends, and drops the rest, at stop_ns (at most give_up_ns).  All ns are 0 to
    2^64 - 1.
    """

    periods: tuple[tuple[int, int], ...]
    stop_ns: int
    give_up_ns: int

    def __str__(self) -> str:
        if self == VIRTUALBOX:
            return "virtualbox"
        options = [*self.periods, ("stop_ns", self.stop_ns), ("give_up_ns", self.give_up_ns)]
        return "table:" + ",".join(f"{key}={value}" for key, value in options)

    def settle(self, missed_ns: Fraction) -> CatchUp:
        """Slew all of missed_ns in, or drop it all beyond give_up_ns."""
        if missed_ns > self.give_up_ns:
            why = f"a lag of {round(missed_ns)} ns is dropped: it exceeds {self.give_up_ns} ns"
            return CatchUp(Fraction(0), Fraction(0), missed_ns, None, why)
        return CatchUp(Fraction(0), missed_ns, Fraction(0), self)

    def ppm(self, lag_ns: Fraction) -> int:
        """The slew in ppm of nominal at a lag of lag_ns; a clock ahead by as much (lag negative) slows by as much."""
        percents = [percent for from_ns, percent in self.periods if abs(lag_ns) >= from_ns] or [self.periods[0][1]]
        return percents[-1] * PPM_PER_PERCENT

    def is_done(self, lag_ns: Fraction) -> bool:
        """Is the lag within stop_ns?"""
        return abs(lag_ns) <= self.stop_ns


SlewPolicy: TypeAlias = Slew | CatchUpTable
"""Policies that slew: with ppm(lag_ns) and is_done(lag_ns)."""

Policy: TypeAlias = Freeze | Advance | SlewPolicy

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


def settle(policy: Policy | str, missed_ns: Fraction) -> CatchUp:
    """Split missed_ns by `policy`.  Negative (the host clock went back) gives 0 for all parts, and `why` says so."""
    chosen = as_policy(policy)
    if fraction("missed_ns", missed_ns) < 0:
        nothing = Fraction(0)
        why = f"the host's clock went back by {round(-missed_ns)} ns; the guest's does not"
        return CatchUp(nothing, nothing, nothing, None, why)
    return chosen.settle(missed_ns)


def _left_out(ns: Fraction, bound_ns: int) -> str:
    return f"{round(ns)} ns beyond the bound of {bound_ns} ns were left out" if ns else ""


def parse(policy: str) -> Policy:
    """The policy that `policy` names.

    "freeze", "advance", "advance:max_ns=N", "slew:max_ppm=N", "slew:max_ppm=N,max_ns=N", "virtualbox", or a custom
    table, "table:LAG_NS=PERCENT,LAG_NS=PERCENT,stop_ns=N,give_up_ns=N".  ConfigError for anything else, RangeError
    for a number out of range.
    """
    text = arguments.text("policy", policy)
    if len(text) > NAME_MAX:
        raise ConfigError(f"policy {text[:20]!r}... of {len(text)} characters; a name has up to {NAME_MAX}")
    name, colon, rest = text.partition(":")
    options = dict(re.findall(r"([a-z_]+|[0-9]+)=([0-9]+)", rest))
    if (colon and not rest) or rest != ",".join(f"{key}={value}" for key, value in options.items()):
        raise ConfigError(
            f"policy {text!r}: options are written as NAME=NUMBER, separated by commas; NUMBER is a whole number"
        )
    if name not in _MAKERS:
        raise ConfigError(f"policy {text!r}; choose from {', '.join(_MAKERS)}")
    try:
        made = _MAKERS[name](**{key: int(value) for key, value in options.items()})
    except TypeError:
        lacking = " and ".join(option for option in _REQUIRED.get(name, ()) if option not in options)
        told = f"; it lacks {lacking}" if lacking else ""
        raise ConfigError(f"policy {text!r}: {name} takes {', '.join(_OPTIONS[name]) or 'no options'}{told}") from None
    return as_policy(made)


def as_policy(policy: Policy | str) -> Policy:
    """Check a policy, or parse its name, and return it in plain ints.

    WrongType for another type, of the policy or of a field; ConfigError for an unknown name; RangeError for a number
    outside the range that its class states.
    """
    if isinstance(policy, str):
        return parse(policy)
    if type(policy) not in _CHECKS:
        wanted = f"a Freeze, Advance, Slew or CatchUpTable, or a name ({', '.join(_MAKERS)})"
        raise WrongType("policy", policy, wanted)
    return _CHECKS[type(policy)](policy)


def _named(name: str, policy: Advance | Slew) -> str:
    """The name, with the options that differ from their defaults."""
    changed = [f"{key}={value}" for key, value in policy._asdict().items() if value != policy._field_defaults[key]]
    return f"{name}:{','.join(changed)}" if changed else name


def _table(stop_ns: int, give_up_ns: int, **periods: int) -> CatchUpTable:
    if not all(lag_ns.isdigit() for lag_ns in periods):
        raise TypeError
    return CatchUpTable(tuple((int(lag_ns), percent) for lag_ns, percent in periods.items()), stop_ns, give_up_ns)


_MAKERS: Final[dict[str, Callable[..., Policy]]] = {
    "freeze": Freeze,
    "advance": Advance,
    "slew": Slew,
    "virtualbox": lambda: VIRTUALBOX,
    "table": _table,
}
_OPTIONS: Final = {
    "freeze": (),
    "advance": Advance._fields,
    "slew": Slew._fields,
    "virtualbox": (),
    "table": ("LAG_NS", "stop_ns", "give_up_ns"),
}
_REQUIRED: Final = {"table": ("stop_ns", "give_up_ns")}


# Checks, which return the policy in plain ints


def _checked_freeze(_policy: Freeze) -> Freeze:
    return Freeze()


def _checked_advance(policy: Advance) -> Advance:
    return Advance(_ns("Advance.max_ns", policy.max_ns))


def _checked_slew(policy: Slew) -> Slew:
    return Slew(whole("Slew.max_ppm", policy.max_ppm, 1, MOST_PPM), _ns("Slew.max_ns", policy.max_ns))


def _checked_table(policy: CatchUpTable) -> CatchUpTable:
    given: object = policy.periods
    if not isinstance(given, tuple | list):
        raise WrongType("CatchUpTable.periods", given, "a tuple of periods (lag in ns, percent)")
    if not given:
        raise ConfigError("CatchUpTable.periods is empty; it needs at least one period (lag in ns, percent)")
    periods = tuple(_checked_period(f"CatchUpTable.periods[{place}]", each) for place, each in enumerate(given))
    for (lower_ns, _), (upper_ns, _) in pairwise(periods):
        if lower_ns >= upper_ns:
            raise ConfigError(
                f"CatchUpTable.periods: a lag of {upper_ns} ns follows one of {lower_ns} ns; lags must rise"
            )
    stop_ns = _ns("CatchUpTable.stop_ns", policy.stop_ns)
    table = CatchUpTable(periods, stop_ns, _ns("CatchUpTable.give_up_ns", policy.give_up_ns, stop_ns))
    if len(str(table)) > NAME_MAX:
        raise ConfigError(
            f"CatchUpTable.periods: {len(periods)} periods make a name of {len(str(table))} characters; "
            f"a saved state holds up to {NAME_MAX}"
        )
    return table


def _checked_period(what: str, period: object) -> tuple[int, int]:
    if not isinstance(period, tuple | list) or len(period) != 2:
        raise WrongType(what, period, "a pair (lag in ns, percent)")
    from_ns, percent = period
    return _ns(f"{what}, its lag,", from_ns), whole(f"{what}, its percent,", percent, 1, MOST_PPM // PPM_PER_PERCENT)


def _ns(what: str, value: object, least: int = 0) -> int:
    return whole(what, value, least, U64_MASK)


_CHECKS: Final[dict[type, Callable[[Any], Policy]]] = {
    Freeze: _checked_freeze,
    Advance: _checked_advance,
    Slew: _checked_slew,
    CatchUpTable: _checked_table,
}
