"""Clocks of several servers side by side: what must agree, by how much, and why.

Pure: it takes observations (pvclock.meter.observe) and judges them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from pvclock.meter.figure import Figure
from pvclock.meter.findings import failures
from pvclock.meter.observe import AcrossPause, ClockObservation, Following, Undisturbed
from pvclock.readings import TimeInfo

__all__ = ["Check", "Subjects", "compare", "compare_undisturbed"]

WALL_CLOCK_LIMIT_NS: Final = 1_000_000
"""NTP may slew the host's time of day by 500 ppm while a guest runs."""
EARLY_EPOCH_LIMIT_NS: Final = 50_000_000
"""KVM before Linux 6.7, and without a master clock, reads the time of day and then kvmclock, and may lose its CPU in
between: then its record is early by that (kvm_write_wall_clock)."""
RAW_LIMIT_PPM: Final = 1
STABLE: Final = 1
"""PVCLOCK_TSC_STABLE_BIT of the flags, by the document (K-16), not by the engine that is under test."""

Values: TypeAlias = Mapping[str, object]


class Check(NamedTuple):
    """One row: what each server's clock showed, whether that is as it should be, and by what rule."""

    name: str
    figures: Mapping[str, Figure]
    """By the server's name."""
    ok: bool
    why: str = ""


class Subjects(NamedTuple):
    """The clocks that are compared."""

    clocks: tuple[ClockObservation, ...]

    def row(
        self,
        name: str,
        values: Callable[[ClockObservation], Values | None],
        show: Callable[..., str],
        why: str,
        ok: bool | None = None,
    ) -> Check:
        """A row of the `values` of each clock (None: it has none), and of the text that `show` makes of them.

        Without `ok`, they must all be the same.
        """
        found = [values(each) for each in self.clocks]
        figures = {
            each.server.name: Figure("-") if own is None else Figure(show(**own), own)
            for each, own in zip(self.clocks, found, strict=True)
        }
        return Check(name, figures, all(own == found[0] for own in found) if ok is None else ok, why)

    @property
    def stopping(self) -> list[ClockObservation]:
        """Those that stand still while their guest is paused."""
        return [each for each in self.clocks if each.server.stops_when_paused]

    @property
    def resuming(self) -> list[ClockObservation]:
        """Those that go on."""
        return [each for each in self.clocks if not each.server.stops_when_paused]

    @property
    def following(self) -> list[tuple[ClockObservation, Following]]:
        """Those that also followed a clock of the host."""
        return [(each, each.following) for each in self.clocks if each.following is not None]

    @property
    def is_stable(self) -> bool:
        """Does any page say that TSCs agree?"""
        return any(page.flags & STABLE for each in self.clocks for page in each.undisturbed.pages)


def compare(clocks: Sequence[ClockObservation], page_checks: Sequence[Check] = ()) -> list[Check]:
    """All rows, in the order in which a reader wants them; `page_checks`: more of them about pages.

    Source of the rules for KVM's clocks: arch/x86/kvm/x86.c.
    """
    subjects = Subjects(tuple(clocks))
    return [
        *_page_rows(subjects),
        *page_checks,
        *_cpuid_rows(subjects),
        *_time_rows(subjects),
        *_guest_rows(subjects),
        *_pause_time_rows(subjects),
        *_pause_guest_rows(subjects),
    ]


def _page_rows(subjects: Subjects) -> Iterable[Check]:
    yield subjects.row(
        "TSC frequency, Hz",
        lambda it: {"tsc_hz": it.undisturbed.tsc_hz},
        "{tsc_hz}".format,
        "one host, one TSC: the frequency that each publishes pages for",
    )
    yield subjects.row(
        "tsc_to_system_mul",
        lambda it: {"tsc_to_system_mul": [page.tsc_to_system_mul for page in it.undisturbed.pages]},
        lambda tsc_to_system_mul: _each(f"{mul:#010x}" for mul in tsc_to_system_mul),
        "one rate, one (mul, shift), on all vCPUs and for all three",
    )
    yield subjects.row(
        "tsc_shift",
        lambda it: {"tsc_shift": [page.tsc_shift for page in it.undisturbed.pages]},
        lambda *, tsc_shift: _each(tsc_shift),
        "belongs to tsc_to_system_mul",
    )
    yield subjects.row(
        "flags",
        lambda it: {"flags": [page.flags for page in it.undisturbed.pages]},
        lambda flags: _each(f"{each:#04x}" for each in flags),
        "bit 0, TSC_STABLE: the host's TSCs agree, or not, for all three; bit 1, GUEST_STOPPED: clear, for no guest "
        "was paused",
    )
    yield subjects.row(
        "versions",
        lambda it: {"versions": _versions(it.undisturbed.pages)},
        "{versions}".format,
        "even outside of an update, and above 0 after the first; how many updates there were may differ",
        ok=all(page.version > 0 and page.version % 2 == 0 for it in subjects.clocks for page in it.undisturbed.pages),
    )


def _cpuid_rows(subjects: Subjects) -> Iterable[Check]:
    yield subjects.row(
        "CPUID signature",
        lambda it: {"signature_leaf": [record.signature_leaf for record in it.undisturbed.records]},
        lambda signature_leaf: _each(f"{leaf:#x}" for leaf in signature_leaf),
        "the leaf where the guest found KVMKVMKVM",
    )
    yield subjects.row(
        "CPUID features",
        lambda it: {"features": [record.features for record in it.undisturbed.records]},
        lambda features: _each(f"{each:#x}" for each in features),
        "EAX of the next leaf; the kernel's machine and QEMU were told to offer what the engine does",
    )
    yield subjects.row(
        "system time MSRs",
        lambda it: {"msrs": [{"index": each.msr, "value": each.msr_value} for each in it.undisturbed.records]},
        lambda msrs: ", ".join("{index:#x}: {value:#x}".format_map(msr) for msr in msrs),
        "the MSR that the guest chose by CPUID, and what it read back; all guests are the same image",
    )


def _time_rows(subjects: Subjects) -> Iterable[Check]:
    yield _wall_clock_row(subjects)
    rates = [it.undisturbed.rate_ppb for it in subjects.clocks]
    bound_ppb = sum(sorted(it.undisturbed.rate_bound_ppb for it in subjects.clocks)[-2:])
    yield subjects.row(
        "rate by the TSC",
        lambda it: {"rate_ppb": it.undisturbed.rate_ppb},
        "{rate_ppb:+.3f} ppb".format,
        f"guest's time against its TSC's nominal; any two within {bound_ppb:.3f} ppb, as each of the four readings is "
        "cut to whole ns.  Not judged without STABLE: there KVM moves guests' TSCs, and readings may be another vCPU's",
        ok=not subjects.is_stable or max(rates) - min(rates) <= bound_ppb,
    )
    yield from (_following_row(subjects, clock, seen) for clock, seen in subjects.following)
    yield subjects.row(
        "progress by the host's clock",
        lambda it: {"progress_ns": it.across_pause.progress_ns, "span_s": it.across_pause.span_s},
        "{progress_ns:+,} ns in {span_s:.2f} s".format,
        f"against CLOCK_MONOTONIC_RAW, within {max(it.across_pause.sample_bound_ns for it in subjects.clocks):,} ns, "
        f"the age that a reading may have when it is compared, and {RAW_LIMIT_PPM} ppm, for the kernel's own rounding "
        "of its rate",
        ok=all(abs(it.across_pause.progress_ns) <= _progress_bound_ns(it.across_pause) for it in subjects.clocks),
    )


def _wall_clock_row(subjects: Subjects) -> Check:
    def is_right(it: ClockObservation) -> bool:
        early_limit_ns = EARLY_EPOCH_LIMIT_NS if it.server.is_kvm else WALL_CLOCK_LIMIT_NS
        return -early_limit_ns <= _wall_clock_error_ns(it) <= WALL_CLOCK_LIMIT_NS

    return subjects.row(
        "wall clock",
        lambda it: {"wall_clock_error_ns": _wall_clock_error_ns(it)},
        lambda wall_clock_error_ns: f"{wall_clock_error_ns / 1e3:+.1f} us",
        f"record + guest's time against CLOCK_REALTIME, within {WALL_CLOCK_LIMIT_NS / 1e6:g} ms: NTP may slew the host "
        f"by 500 ppm meanwhile.  KVM's own up to {EARLY_EPOCH_LIMIT_NS / 1e6:g} ms early: it may read two "
        "clocks at two instants",
        ok=all(map(is_right, subjects.clocks)),
    )


def _following_row(subjects: Subjects, clock: ClockObservation, seen: Following) -> Check:
    return subjects.row(
        f"rate by {seen.reference}, nominal, steered",
        lambda it: it.following and {"nominal_ppb": it.following.nominal_ppb, "steered_ppb": it.following.steered_ppb},
        "{nominal_ppb:+.1f}, {steered_ppb:+.1f} ppb".format,
        f"the {clock.server.name}'s clock against the host's: at the nominal rate, and following it, which is 0 within "
        f"{seen.bound_ppb:.1f} ppb.  KVM's clock cannot follow one, and drifts as the engine's at the nominal rate.  "
        "Not judged without STABLE, as above",
        ok=not subjects.is_stable or abs(seen.steered_ppb) <= seen.bound_ppb,
    )


def _guest_rows(subjects: Subjects) -> Iterable[Check]:
    yield subjects.row(
        "guest's reads",
        lambda it: {"reads": sum(record.reads for record in it.undisturbed.records)},
        "{reads:,}".format,
        "every vCPU read; how often depends on the host's scheduler",
        ok=all(record.reads > 0 for it in subjects.clocks for record in it.undisturbed.records),
    )
    yield subjects.row(
        "backward, wild or torn",
        lambda it: {"wrong_reads": sum(failures(it.undisturbed.records).values())},
        "{wrong_reads}".format,
        "by the guests' own count; a clock that is left alone never shows one",
        ok=not any(sum(failures(it.undisturbed.records).values()) for it in subjects.clocks),
    )


def _pause_time_rows(subjects: Subjects) -> Iterable[Check]:
    yield subjects.row(
        "stop, cont: time left out",
        lambda it: {"left_out_ns": it.across_pause.left_out_ns},
        lambda left_out_ns: f"{left_out_ns / 1e6:+.3f} ms",
        "engine and QEMU stop their clocks with their vCPUs: they leave out at least the time from stop answered to "
        "cont asked for, and at most from stop asked for to cont answered.  The kernel's goes on, for it leaves "
        "that to its VMM: a difference by design",
        ok=all(map(_goes_on_through, subjects.resuming)) and all(map(_leaves_out_the_pause, subjects.stopping)),
    )
    yield subjects.row(
        "stop, cont: largest gap",
        lambda it: {"largest_gap_ns": max(record.largest_gap_ns for record in it.across_pause.records)},
        lambda largest_gap_ns: f"{largest_gap_ns / 1e6:.1f} ms",
        "between two readings of a vCPU, by its guest's clock: at least the pause where that was not left out.  "
        "It has no upper bound: on a busy host vCPUs wait",
        ok=all(
            record.largest_gap_ns >= _pause_bounds_ns(it)[0]
            for it in subjects.resuming
            for record in it.across_pause.records
        ),
    )


def _pause_guest_rows(subjects: Subjects) -> Iterable[Check]:
    yield subjects.row(
        "stop, cont: GUEST_STOPPED",
        lambda it: {"stopped": _stops(it)},
        "{stopped}".format,
        "how often each vCPU's guest saw the bit, and cleared it: once with the engine and in QEMU, which sets it at "
        "cont (KVM_KVMCLOCK_CTRL); never with the kernel's clock in our machine, which does not make that call",
        ok=all(map(all, map(_stops, subjects.stopping))) and not any(map(any, map(_stops, subjects.resuming))),
    )
    yield subjects.row(
        "stop, cont: versions",
        lambda it: {"before": _versions(it.across_pause.before), "after": _versions(it.across_pause.after)},
        lambda before, after: ", ".join(map("{} to {}".format, before, after)),
        "the engine's and QEMU's advanced, for the clock was set; always from even to even",
        ok=all(_versions_advance(it.across_pause, must=it.server.stops_when_paused) for it in subjects.clocks),
    )
    yield subjects.row(
        "stop, cont: steps back",
        lambda it: {"steps_back": _steps_back(it), "worst_back_ns": _worst_back_ns(it)},
        lambda steps_back, worst_back_ns: f"{steps_back:,}, up to {worst_back_ns / 1e6:.3f} ms",
        "none in engine and kernel.  In QEMU up to the pause, and none with one vCPU: KVM "
        "publishes a vCPU's page when that vCPU enters the guest, so the first to enter finds vCPU 0's page (which "
        "every vDSO reads) as it was before the stop, ahead by the pause",
        ok=all(_steps_back_are_allowed(it) for it in subjects.clocks),
    )
    yield subjects.row(
        "stop, cont: wild or torn",
        lambda it: {"wrong_reads": sum(record.wild + record.torn for record in it.across_pause.records)},
        "{wrong_reads}".format,
        "none, as when left alone: a page may be late, but never half of one and half of another",
        ok=not any(record.wild + record.torn for it in subjects.clocks for record in it.across_pause.records),
    )
    yield subjects.row(
        "stop, cont: pages",
        lambda it: {"after": [_rate(page) for page in it.across_pause.after]},
        lambda after: _each("{tsc_to_system_mul:#010x} {tsc_shift} {flags:#04x}".format_map(page) for page in after),
        "mul, shift and flags afterwards: as before, and the guest has cleared GUEST_STOPPED",
    )


def compare_undisturbed(one: Undisturbed, other: Undisturbed) -> list[Check]:
    """Two clocks that were left alone: the rows that need nothing else."""
    return list(_undisturbed_rows(one, other))


def _undisturbed_rows(one: Undisturbed, other: Undisturbed) -> Iterator[Check]:
    bound_ppb = one.rate_bound_ppb + other.rate_bound_ppb

    def row(name: str, key: str, value: Callable[[Undisturbed], Any], show: str, ok: bool | None = None) -> Check:
        ours, theirs = value(one), value(other)
        figures = {
            each.server.name: Figure(show.format(own), {key: own}) for each, own in ((one, ours), (other, theirs))
        }
        return Check(name, figures, ours == theirs if ok is None else ok)

    yield row("tsc_to_system_mul", "tsc_to_system_mul", lambda each: each.pages[0].tsc_to_system_mul, "{:#x}")
    yield row("tsc_shift", "tsc_shift", lambda each: each.pages[0].tsc_shift, "{}")
    yield row("flags", "flags", lambda each: [page.flags for page in each.pages], "{}")
    yield row("features (CPUID)", "features", lambda each: each.records[0].features, "{:#x}")
    even = not any(version % 2 for version in (*_versions(one.pages), *_versions(other.pages)))
    yield row("versions, even", "versions", lambda each: _versions(each.pages), "{}", even)
    yield row(
        "wall clock against the host",
        "wall_clock_error_ns",
        lambda each: each.wall_clock_error_ns,
        "{:+,} ns",
        max(abs(one.wall_clock_error_ns), abs(other.wall_clock_error_ns)) < WALL_CLOCK_LIMIT_NS,
    )
    yield row(
        f"rate against the TSC, within {bound_ppb:.2f} ppb",
        "rate_ppb",
        lambda each: each.rate_ppb,
        "{:+.3f} ppb",
        abs(one.rate_ppb - other.rate_ppb) <= bound_ppb,
    )
    yield row("the guest's reads", "reads", lambda each: sum(it.reads for it in each.records), "{:,}", ok=True)
    wrong = [sum(failures(each.records).values()) for each in (one, other)]
    yield row(
        "backward, wild or torn",
        "wrong_reads",
        lambda each: sum(failures(each.records).values()),
        "{}",
        not any(wrong),
    )


def _pause_bounds_ns(it: ClockObservation) -> tuple[int, int]:
    """The least and the most that a clock that left out the pause can have left out, as two samples of it show."""
    seen = it.across_pause
    return seen.pause.least_ns - seen.sample_bound_ns, seen.pause.most_ns + seen.sample_bound_ns


def _each(values: Iterable[object]) -> str:
    """The value of all vCPUs, or a list if they differ."""
    shown = [str(value) for value in values]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def _wall_clock_error_ns(it: ClockObservation) -> int:
    """The worse of two: by the server's own account if it gives one, and by watching the guest."""
    return max(it.undisturbed.wall_clock_error_ns, it.across_pause.wall_clock_error_ns, key=abs)


def _goes_on_through(it: ClockObservation) -> bool:
    """Did this clock leave nothing out, as far as two samples of it can tell?"""
    return abs(it.across_pause.left_out_ns) <= it.across_pause.sample_bound_ns + RAW_LIMIT_PPM * 1e3


def _leaves_out_the_pause(it: ClockObservation) -> bool:
    least_ns, most_ns = _pause_bounds_ns(it)
    return least_ns <= it.across_pause.left_out_ns <= most_ns


def _progress_bound_ns(seen: AcrossPause) -> float:
    return seen.sample_bound_ns + seen.span_s * RAW_LIMIT_PPM * 1e3


def _steps_back(it: ClockObservation) -> int:
    return sum(record.backward_own + record.backward_cross for record in it.across_pause.records)


def _worst_back_ns(it: ClockObservation) -> int:
    return max(record.worst_back_ns for record in it.across_pause.records)


def _steps_back_are_allowed(it: ClockObservation) -> bool:
    """None, but up to the pause on several vCPUs where KVM publishes pages of a clock that was set: it does so late."""
    if not (it.server.is_kvm and it.server.stops_when_paused):
        return _steps_back(it) == 0
    within_pause = _worst_back_ns(it) <= _pause_bounds_ns(it)[1]
    return within_pause and (_steps_back(it) == 0 or len(it.across_pause.records) > 1)


def _stops(it: ClockObservation) -> list[int]:
    return [record.stopped for record in it.across_pause.records]


def _versions(pages: Iterable[TimeInfo]) -> list[int]:
    return [page.version for page in pages]


def _rate(page: TimeInfo) -> dict[str, int]:
    return {name: getattr(page, name) for name in ("tsc_to_system_mul", "tsc_shift", "flags")}


def _versions_advance(seen: AcrossPause, *, must: bool) -> bool:
    """Do all versions go from even to even, and not back (modulo 2^32, as they wrap)?  must: by one update at least."""
    steps = [(after.version - before.version) % 2**32 for before, after in zip(seen.before, seen.after, strict=True)]
    evens = all(page.version % 2 == 0 for page in (*seen.before, *seen.after))
    return evens and all(int(must) <= step < 2**31 for step in steps)
