"""Palacios' virtual time of a VM and its cores, in exact numbers: as of 2012 (seed=True), and corrected.

Each core has guest cycles, which only go forward, and a TSC, which is the cycles plus an offset.  The cycles follow the
host ("slaved" in Palacios) or what the guest executed ("unslaved").  seed=True keeps five traps of the original, so
that tests can check them: an unslaved advance without given cycles adds none (T14); slaving is forced on, so
offset_time() and skip_time() always refuse (T15); the frequency ratio is 1, and a core's kHz shows only in the
hypercall (T16); dilation is stored but not applied (T17); a write of the TSC moves its offset alone (T18, which is
right and also holds without seed).

This module reads no clock: the caller hands in host TSC, in ticks.  It serves Palacios' guests and comparisons; a VMM
that wants execution time uses pvclock.host.execution_time.  Source: Palacios vmm_time.c of March 2012; its <time>
option of 2013.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final, Literal, NamedTuple

from pvclock import arguments
from pvclock.arguments import flag, fraction, instance, whole
from pvclock.errors import ConfigError, RangeError, StateError
from pvclock.quantities import U64_MASK, GuestTsc, HostTsc, quoted, shown
from pvclock.tsc.emulation import TscControls, TscInstruction, rdtsc, tsc_controls
from pvclock.tsc.vcpu_tsc import VcpuTsc, tsc_rate

__all__ = [
    "CPUFREQ_HYPERCALL",
    "HOST_TSC_HYPERCALL",
    "Complaint",
    "CoreRate",
    "CoreStamps",
    "PalaciosTime",
    "TimeOptions",
    "time_options",
]

CPUFREQ_HYPERCALL: Final = 0xD000
HOST_TSC_HYPERCALL: Final = 0xD001
"""Added in May 2012, so the seed lacks it."""

RATIO_ONE: Final = Fraction(1)


class Complaint(NamedTuple):
    """A problem with an option: "error", the option was ignored; "warning", it changed another option."""

    severity: Literal["error", "warning"]
    text: str


class TimeOptions(NamedTuple):
    """A VM's time options.  dilation: guest seconds in a host second, if slaved.  passthrough: show the host's TSC."""

    slaved: bool = True
    passthrough: bool = False
    dilation: Fraction = RATIO_ONE
    complaints: tuple[Complaint, ...] = ()


class CoreRate(NamedTuple):
    """A core's frequency in kHz, its guest cycles in a host tick, and why these differ from the request, else empty."""

    khz: int
    ratio: Fraction
    why: str


def time_options(
    source: str | None = None, tsc: str | None = None, dilation: int | None = None, *, palacios: bool = False
) -> TimeOptions:
    """Interpret <time source=host|none tsc=host|guest dilation=N>; None: option not given.

    dilation=N makes guest time pass at 1/N of the host's.  As in Palacios nothing raises: a bad option is ignored, with
    a complaint.  palacios: keep its bug, which compares `source` instead of `tsc`, so that tsc=guest is unknown;
    passthrough and slaving are the same either way.
    """
    flag("palacios", palacios)
    for name, option in (("source", source), ("tsc", tsc)):
        if option is not None:
            arguments.text(name, option)
    wrong: list[Complaint] = []
    slaved = _lower(source) != "none"
    if _lower(source) not in {None, "host", "none"}:
        wrong.append(Complaint("error", f'time source {quoted(source)} is unknown; use "host" or "none"'))
    rate = _dilation(dilation, slaved, wrong)
    passthrough = _lower(tsc) == "host"
    if passthrough and not slaved:
        wrong.append(Complaint("error", "the host's TSC cannot be passed through: time is not slaved to the host's"))
        passthrough = False
    elif passthrough and rate != 1:
        wrong.append(Complaint("warning", f"TSC passthrough cancelled: the guest's dilation is {rate}"))
        passthrough = False
    if _lower(tsc) not in {None, "host"} and _lower(source if palacios else tsc) != "guest":
        wrong.append(Complaint("error", f'TSC mode {quoted(tsc)} is unknown; use "host" or "guest"'))
    return TimeOptions(slaved, passthrough, rate, tuple(wrong))


class CoreStamps(NamedTuple):
    """Host TSC at start(), at the last enter() (0: never), and up to which the cycles are counted.

    Palacios calls them initial_host_time, enter_time and pause_time.
    """

    initial: HostTsc
    enter: HostTsc
    pause: HostTsc


class PalaciosTime:
    """The time of a VM whose host runs at host_khz and whose cores run at `cores` (kHz, None for the host's).

    ratio="palacios" is its later, inexact frequency ratio (tsc_rate()).  seed=True: see the module; it ignores options
    and ratio.  RangeError for a host_khz below 1, ConfigError for another ratio.

    Call order of a core: start(), then enter() and exit() in turn, with advance(), offset_time(), skip_time() or
    pause() and restart() between; else StateError.  Host TSC, 0 to 2^64 - 1, must not go back or wrap: RangeError,
    which the seed does not check.  Cycles are exact inside, and rounded down when read.
    """

    def __init__(
        self,
        host_khz: int,
        cores: Sequence[int | None],
        *,
        options: TimeOptions | None = None,
        ratio: Literal["exact", "palacios"] = "exact",
        seed: bool = False,
    ) -> None:
        chosen = TimeOptions() if options is None else instance("options", options, TimeOptions)
        if whole("host_khz", host_khz) < 1:
            raise RangeError(f"host frequency is {shown(host_khz)} kHz; it must be at least 1")
        arguments.sequence("cores", cores, "a sequence of frequencies in kHz")
        self.seed = flag("seed", seed)
        arguments.text("ratio", ratio)
        self.slaved = True
        self.dilation = RATIO_ONE
        self.passthrough = chosen.passthrough and not seed
        self.rates = tuple(_core_rate(core, khz, host_khz, "seed" if seed else ratio) for core, khz in enumerate(cores))
        self._cores = [_Core() for _ in cores]
        self._hypercalls = {CPUFREQ_HYPERCALL} if seed else {CPUFREQ_HYPERCALL, HOST_TSC_HYPERCALL}
        if not seed:
            self.follow(slaved=chosen.slaved, dilation=chosen.dilation)

    def follow(self, *, slaved: bool, dilation: Fraction = RATIO_ONE) -> None:
        """Slave the cores to the host, at `dilation` guest seconds in a host second, or release them.

        Takes effect from each core's last advance(), without a step.  The seed itself never does this; on it, like a
        debugger, it exposes what T15 hides, and the cycles do step.  ConfigError for a dilation without slaving, or
        with a passed-through TSC; RangeError for one that is not positive.
        """
        flag("slaved", slaved)
        if fraction("dilation", dilation) <= 0:
            raise RangeError(f"dilation is {dilation}; it must be positive")
        if not self.seed and not slaved and dilation != 1:
            raise ConfigError(
                f"dilation {dilation} of time that is not slaved to the host's; only slaved time can be dilated"
            )
        if self.passthrough and (not slaved or dilation != 1):
            raise ConfigError(f"dilation {dilation}, slaved {slaved}: the guest has the host's TSC passed through")
        self.slaved, self.dilation = slaved, Fraction(dilation)

    # What the guest has

    def cycles(self, core: int) -> int:
        """The core's guest cycles as of its last advance(), enter(), exit() or offset_time()."""
        return self._core(core).cycles.__floor__()

    def guest_tsc(self, core: int) -> GuestTsc:
        """Result of the core's trapped RDTSC: its cycles plus its TSC offset."""
        state = self._core(core)
        return state.tsc.read(state.as_tsc())

    def stamps(self, core: int) -> CoreStamps:
        """Host TSC at the core's last transitions, for debugging."""
        state = self._core(core)
        return CoreStamps(state.initial, HostTsc(0) if state.entered is None else state.entered, state.stamp)

    def rdtsc(self, core: int) -> TscInstruction:
        """Emulate a trapped RDTSC: EDX:EAX are the guest TSC."""
        state = self._core(core)
        return rdtsc(state.tsc, state.as_tsc())

    def write_tsc(self, core: int, value: int) -> None:
        """Guest write of MSR 0x10: the offset moves, the cycles do not."""
        state = self._core(core)
        state.tsc.guest_write_tsc(whole("value", value, 0, U64_MASK), state.as_tsc())

    def hypercall(self, core: int, number: int, host_tsc: HostTsc) -> int | None:
        """The hypercall's RBX: the core's kHz for 0xd000, the host TSC for 0xd001; None for any other number."""
        host_tsc = self._checked(self._core(core), host_tsc)
        if whole("number", number) not in self._hypercalls:
            return None
        return self.rates[core].khz if number == CPUFREQ_HYPERCALL else host_tsc

    def controls(self, core: int, host_tsc: HostTsc) -> TscControls:
        """Hardware offset and RDTSC trap for an entry at `host_tsc`; call advance() to that TSC first."""
        guest_tsc = self.guest_tsc(core)
        at_rate = VcpuTsc(rate=self.rates[core].ratio)
        at_rate.host_write_tsc(guest_tsc, host_tsc)
        dilation = RATIO_ONE if self.seed else self.dilation
        return tsc_controls(at_rate, host_tsc, passthrough=self.passthrough, dilation=dilation)

    # What the VMM does

    def start(self, core: int, host_tsc: HostTsc) -> None:
        """Begin the core's time at 0 cycles; the host's uptime does not count."""
        tsc, state = self._core(core).tsc, _Core()
        state.initial = state.stamp = self._checked(state, host_tsc)
        state.tsc, state.state = tsc, "out"
        self._cores[core] = state

    def enter(self, core: int, host_tsc: HostTsc) -> None:
        """The guest is about to execute.  Unslaved, this drops the time since the last advance()."""
        state = self._in_state(core, "enter", "out")
        host_tsc = self._checked(state, host_tsc)
        state.state, state.entered = "in", host_tsc
        if self.seed:
            return
        if self.slaved:
            self._advance(core, host_tsc, None)
        else:
            state.stamp = host_tsc

    def exit(self, core: int, host_tsc: HostTsc, cycles: int | None = None) -> int:
        """The guest stopped executing: advance as advance() does, and return its cycles.

        cycles: host cycles that it executed, if known more exactly than by the two stamps; at most their difference.
        """
        state = self._in_state(core, "exit", "in")
        self._advance(core, host_tsc, cycles)
        state.state = "out"
        return self.cycles(core)

    def advance(self, core: int, host_tsc: HostTsc, cycles: int | None = None) -> int:
        """Bring the core's cycles up to host_tsc and return them.

        Slaved: (host_tsc - start) x dilation x ratio, while these are constant.  Unslaved: add ratio x `cycles` host
        cycles or, if None, ratio x ticks since the last advance() (T14: the seed adds none).
        """
        self._in_state(core, "advance", "out", "in")
        self._advance(core, host_tsc, cycles)
        return self.cycles(core)

    def offset_time(self, core: int, cycles: int) -> None:
        """Add guest cycles or, before the first enter(), subtract some, down to 0.

        StateError while slaved.  RangeError for taking back what the guest may have seen, or more than there is; the
        seed goes back.
        """
        state = self._in_state(core, "offset_time", "out", "in")
        self._refuse_if_slaved("offset_time")
        cycles = whole("cycles", cycles)
        after = state.cycles + cycles
        if self.seed:
            after %= U64_MASK + 1
        elif cycles < 0 and (after < 0 or state.entered is not None):
            raise RangeError(
                f"offset_time({cycles}) of core {core} at {self.cycles(core)} cycles: cycles that the guest may have "
                f"seen are not taken back, and the count does not go below 0"
            )
        state.cycles = after

    def skip_time(self, core: int, host_tsc: HostTsc) -> None:
        """Drop the time since the last advance().  StateError while slaved."""
        state = self._in_state(core, "skip_time", "out", "in")
        self._refuse_if_slaved("skip_time")
        state.stamp = self._checked(state, host_tsc)

    def pause(self, core: int, host_tsc: HostTsc) -> None:
        """Stop the core's time, slaved or not; the core must be out of the guest."""
        state = self._in_state(core, "pause", "out")
        if self.slaved:
            self._advance(core, host_tsc, None)
        state.state, state.stamp = "paused", self._checked(state, host_tsc)

    def restart(self, core: int, host_tsc: HostTsc) -> None:
        """Continue the core's time from where pause() stopped it."""
        state = self._in_state(core, "restart", "paused")
        host_tsc = self._checked(state, host_tsc)
        state.initial = HostTsc(state.initial + host_tsc - state.stamp)
        state.state, state.stamp = "out", host_tsc

    def ticks_to_yield(self, core: int, host_tsc: HostTsc) -> int:
        """Host ticks until the host's time since start() reaches the guest's; 0 if the guest is not ahead.

        Palacios' adjust_time, which lets the host catch up with a guest that ran ahead.
        """
        state = self._in_state(core, "ticks_to_yield", "out", "in")
        cycles_per_tick = self.rates[core].ratio * (RATIO_ONE if self.seed else self.dilation)
        return max(state.initial - whole("host_tsc", host_tsc) - (-state.cycles // cycles_per_tick), 0)

    def close(self) -> None:
        """Remove both hypercalls (Palacios leaves the second)."""
        self._hypercalls.clear()

    # Inside

    def _advance(self, core: int, host_tsc: HostTsc, cycles: int | None) -> None:
        state, ratio = self._core(core), self.rates[core].ratio
        host_tsc = self._checked(state, host_tsc)
        if cycles is not None:
            cycles = whole("cycles", cycles)
        if self.seed:
            state.advance_as_seed(host_tsc, cycles, follows_host=self.slaved)
            return
        passed = host_tsc - state.stamp
        if self.slaved:
            state.cycles += passed * self.dilation * ratio
        else:
            executed = passed if cycles is None else cycles
            if not 0 <= executed <= passed:
                raise RangeError(f"core {core} executed {cycles} host cycles in {passed}; it can be 0 to {passed}")
            state.cycles += executed * ratio
        state.stamp = host_tsc

    def _checked(self, state: _Core, host_tsc: HostTsc) -> HostTsc:
        host_tsc = HostTsc(whole("host_tsc", host_tsc))
        if not self.seed and not state.stamp <= host_tsc <= U64_MASK:
            raise RangeError(f"host TSC went backwards or wrapped: it was {state.stamp} and is {shown(host_tsc)}")
        return host_tsc

    def _refuse_if_slaved(self, operation: str) -> None:
        if self.slaved:
            raise StateError(operation, "guest time is slaved to the host's", 'use source="none"')

    def _in_state(self, core: int, operation: str, *allowed: str) -> _Core:
        state = self._core(core)
        if state.state not in allowed:
            raise StateError(
                f"{operation} of core {core}", f"it is {state.state}", f"it must be {' or '.join(allowed)}"
            )
        return state

    def _core(self, core: int) -> _Core:
        if not 0 <= whole("core", core) < len(self._cores):
            raise RangeError(f"core {shown(core)}; this VM has cores 0 to {len(self._cores) - 1}")
        return self._cores[core]


class _Core:
    """A core's time.  `initial`, `entered` and `stamp` are host TSC; `cycles` are counted up to `stamp`."""

    __slots__ = ("cycles", "entered", "initial", "stamp", "state", "tsc")

    def __init__(self) -> None:
        self.state = "not started"
        self.cycles = Fraction(0)
        self.initial = self.stamp = HostTsc(0)
        self.entered: HostTsc | None = None
        self.tsc = VcpuTsc()  # driven by the cycles in place of host TSC

    def as_tsc(self) -> HostTsc:
        return HostTsc(self.cycles.__floor__() & U64_MASK)

    def advance_as_seed(self, host_tsc: HostTsc, cycles: int | None, *, follows_host: bool) -> None:
        """As of 2012: overwrites the stamp before it computes the ticks since, which is trap T14."""
        self.stamp = host_tsc
        if follows_host:
            self.cycles = Fraction((host_tsc - self.initial) & U64_MASK)
        else:
            self.cycles = (self.cycles + (cycles or host_tsc - self.stamp)) % (U64_MASK + 1)


def _lower(option: str | None) -> str | None:
    return None if option is None else option.lower()


def _dilation(dilation: int | None, slaved: bool, wrong: list[Complaint]) -> Fraction:
    if dilation is None:
        return RATIO_ONE
    whole("dilation", dilation)
    if slaved and dilation > 1:
        return Fraction(1, dilation)
    if not slaved:
        wrong.append(Complaint("error", f"time dilation {dilation} is legal only when time is slaved to the host's"))
    wrong.append(Complaint("error", f"time dilation {dilation} did not result in actual dilation"))
    return RATIO_ONE


def _core_rate(core: int, khz: int | None, host_khz: int, profile: Literal["seed", "exact", "palacios"]) -> CoreRate:
    """A core's rate: `khz` if 1 to host_khz, else the host's frequency."""
    why = ""
    if khz is not None:
        whole(f"cores[{core}]", khz)
    if khz is None:
        why = f"core {core}: no frequency given; it has the host's {host_khz} kHz"
    elif not 0 < khz <= host_khz:
        why = f"core {core}: {khz} kHz requested, it can be 1 to {host_khz}; it has the host's {host_khz} kHz"
    given = host_khz if khz is None or why else khz
    if profile == "seed":
        return CoreRate(given, RATIO_ONE, why)
    return CoreRate(given, tsc_rate(given * 1000, host_khz * 1000, profile=profile), why)
