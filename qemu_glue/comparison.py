"""Engine, kernel and QEMU side by side: what must agree, by how much, and why.

Pure: it is given what was seen (qemu_glue.observation) and judges it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from pvclock import TimeInfo
from pvclock.commands.report import Shown
from pvclock.meter.observe import failures
from qemu_glue.observation import Interruption, Sight

__all__ = ["Check", "compare"]

WALL_CLOCK_LIMIT_NS: Final = 1_000_000
EARLY_EPOCH_LIMIT_NS: Final = 50_000_000
"""KVM before Linux 6.7, and without a master clock, reads the time of day and then kvmclock, and may lose its CPU in
between: then its record is early by that (kvm_write_wall_clock)."""
RAW_LIMIT_PPM: Final = 1
STABLE: Final = 1
"""PVCLOCK_TSC_STABLE_BIT of the flags, by the document (K-16), not by the engine that is under test."""


class Check(NamedTuple):
    """One row: what each of the three showed, whether that is as it should be, and by what rule."""

    name: str
    engine: Shown
    kernel: Shown
    qemu: Shown
    ok: bool
    why: str


Values = Mapping[str, object]


class Trio(NamedTuple):
    """The three that are compared."""

    engine: Sight
    kernel: Sight
    qemu: Sight

    def row(
        self,
        name: str,
        values: Callable[[Sight], Values | None],
        show: Callable[..., str],
        why: str,
        ok: bool | None = None,
    ) -> Check:
        """A row of the `values` of each, None for one that has none, and what `show` makes of them by their names.

        Without `ok`, they must all be the same.
        """
        found = [values(each) for each in self]
        engine, kernel, qemu = (Shown("-") if each is None else Shown(show(**each), each) for each in found)
        return Check(name, engine, kernel, qemu, found[0] == found[1] == found[2] if ok is None else ok, why)


def compare(engine: Sight, kernel: Sight, qemu: Sight) -> list[Check]:
    """All rows, in the order in which a reader wants them."""
    trio = Trio(engine, kernel, qemu)
    return [
        *_page_rows(trio),
        *_cpuid_rows(trio),
        *_time_rows(trio),
        *_guest_rows(trio),
        *_stop_time_rows(trio),
        *_stop_guest_rows(trio),
    ]


def _page_rows(trio: Trio) -> Iterable[Check]:
    yield trio.row(
        "TSC frequency, Hz",
        lambda it: {"tsc_hz": it.alone.tsc_hz},
        "{tsc_hz}".format,
        "one host, one TSC: what each publishes pages for",
    )
    yield trio.row(
        "tsc_to_system_mul",
        lambda it: {"tsc_to_system_mul": [page.tsc_to_system_mul for page in it.alone.pages]},
        lambda tsc_to_system_mul: _each(f"{mul:#010x}" for mul in tsc_to_system_mul),
        "one rate, one (mul, shift), on all vCPUs and for all three",
    )
    yield trio.row(
        "tsc_shift",
        lambda it: {"tsc_shift": [page.tsc_shift for page in it.alone.pages]},
        lambda *, tsc_shift: _each(tsc_shift),
        "belongs to tsc_to_system_mul",
    )
    yield trio.row(
        "flags",
        lambda it: {"flags": [page.flags for page in it.alone.pages]},
        lambda flags: _each(f"{each:#04x}" for each in flags),
        "bit 0: TSCs in step, which is the host's doing; bit 1: stopped, and nobody was",
    )
    yield trio.row(
        "versions",
        lambda it: {"versions": _versions(it.alone.pages)},
        "{versions}".format,
        "even outside of an update, and above 0 once there was one; how many there were is each one's own affair",
        ok=all(page.version > 0 and page.version % 2 == 0 for it in trio for page in it.alone.pages),
    )
    qemu = trio.qemu.interrupted.pause
    yield Check(
        "pages by QMP",
        Shown("-"),
        Shown("-"),
        Shown(
            "the same" if qemu.by_monitor == qemu.pages else f"{qemu.by_monitor}, not {qemu.pages}",
            {"pages_by_qmp": qemu.by_monitor, "pages": qemu.pages},
        ),
        qemu.by_monitor == qemu.pages,
        "QEMU reads the same pages as we do in the RAM that it shares; no vCPU runs meanwhile",
    )


def _cpuid_rows(trio: Trio) -> Iterable[Check]:
    yield trio.row(
        "CPUID signature",
        lambda it: {"signature_leaf": [record.signature_leaf for record in it.alone.records]},
        lambda signature_leaf: _each(f"{leaf:#x}" for leaf in signature_leaf),
        "the leaf where the guest found KVMKVMKVM",
    )
    yield trio.row(
        "CPUID features",
        lambda it: {"features": [record.features for record in it.alone.records]},
        lambda features: _each(f"{each:#x}" for each in features),
        "EAX of the next leaf; the kernel's machine and QEMU were told to offer what the engine does",
    )
    yield trio.row(
        "system time MSRs",
        lambda it: {"msrs": [{"index": each.msr, "value": each.msr_value} for each in it.alone.records]},
        lambda msrs: ", ".join("{index:#x}: {value:#x}".format_map(msr) for msr in msrs),
        "the MSR that the guest chose by CPUID, and what it read back; all guests are the same image",
    )


def _time_rows(trio: Trio) -> Iterable[Check]:
    engine, *kernels = (_wall_clock_error_ns(it) for it in trio)
    yield trio.row(
        "wall clock",
        lambda it: {"wall_clock_error_ns": _wall_clock_error_ns(it)},
        lambda wall_clock_error_ns: f"{wall_clock_error_ns / 1e3:+.1f} us",
        f"record + guest's time against CLOCK_REALTIME, within {WALL_CLOCK_LIMIT_NS / 1e6:g} ms: NTP may slew the host "
        f"by 500 ppm meanwhile.  The kernel's own up to {EARLY_EPOCH_LIMIT_NS / 1e6:g} ms early: it may read two "
        "clocks at two instants",
        ok=max(map(abs, (engine, *(max(error, 0) for error in kernels)))) <= WALL_CLOCK_LIMIT_NS
        and min(kernels) >= -EARLY_EPOCH_LIMIT_NS,
    )
    rates = [it.alone.rate_ppb for it in trio]
    bound_ppb = sum(sorted(it.alone.rate_bound_ppb for it in trio)[1:])
    yield trio.row(
        "rate by the TSC",
        lambda it: {"rate_ppb": it.alone.rate_ppb},
        "{rate_ppb:+.3f} ppb".format,
        f"guest's time against its TSC's nominal; any two within {bound_ppb:.3f} ppb, as each of the four readings is "
        "cut to whole ns.  Not judged without STABLE: there KVM moves guests' TSCs, and readings may be another vCPU's",
        ok=not _is_stable(trio) or max(rates) - min(rates) <= bound_ppb,
    )
    steered = trio.engine.steered
    if steered is not None:
        yield trio.row(
            f"rate by {steered.reference}, nominal, steered",
            lambda it: it.steered and {"nominal_ppb": it.steered.nominal_ppb, "steered_ppb": it.steered.steered_ppb},
            "{nominal_ppb:+.1f}, {steered_ppb:+.1f} ppb".format,
            f"the engine's clock against the host's as above, and as it is when it follows that: 0 within "
            f"{steered.bound_ppb:.1f} ppb.  The kernel's has no such thing, and is as the engine's is at the nominal "
            "rate.  Not judged without STABLE, as above",
            ok=not _is_stable(trio) or abs(steered.steered_ppb) <= steered.bound_ppb,
        )
    yield trio.row(
        "progress by the host's clock",
        lambda it: {"progress_ns": it.interrupted.progress_ns, "span_s": it.interrupted.span_s},
        "{progress_ns:+,} ns in {span_s:.2f} s".format,
        f"against CLOCK_MONOTONIC_RAW, within {max(it.interrupted.look_bound_ns for it in trio):,} ns, how old a "
        f"reading may be when it is compared, and {RAW_LIMIT_PPM} ppm, for the kernel's own rounding of its rate",
        ok=all(abs(it.interrupted.progress_ns) <= _progress_bound_ns(it.interrupted) for it in trio),
    )


def _guest_rows(trio: Trio) -> Iterable[Check]:
    yield trio.row(
        "guest's reads",
        lambda it: {"reads": sum(record.reads for record in it.alone.records)},
        "{reads:,}".format,
        "every vCPU took part; how often is the scheduler's affair",
        ok=all(record.reads > 0 for it in trio for record in it.alone.records),
    )
    yield trio.row(
        "backward, wild or torn",
        lambda it: {"wrong_reads": sum(failures(it.alone.records).values())},
        "{wrong_reads}".format,
        "by the guests' own count; no clock that is left alone may ever show one",
        ok=not any(sum(failures(it.alone.records).values()) for it in trio),
    )


def _stop_time_rows(trio: Trio) -> Iterable[Check]:
    yield trio.row(
        "stop, cont: time left out",
        lambda it: {"left_out_ns": it.interrupted.left_out_ns},
        lambda left_out_ns: f"{left_out_ns / 1e6:+.3f} ms",
        "engine and QEMU keep their clocks while their vCPUs are held: no less is left out than from stop answered to "
        "cont asked for, and no more than from stop asked for to cont answered.  The kernel's goes on, for it leaves "
        "that to its VMM.  No disagreement",
        ok=_goes_on_through(trio.kernel) and all(_leaves_out_the_pause(it) for it in (trio.engine, trio.qemu)),
    )
    yield trio.row(
        "stop, cont: largest gap",
        lambda it: {"largest_gap_ns": max(record.largest_gap_ns for record in it.interrupted.records)},
        lambda largest_gap_ns: f"{largest_gap_ns / 1e6:.1f} ms",
        "between two readings of a vCPU, by its guest's clock: no less than the pause where that was not left out.  "
        "Above it there is no bound, for a busy host lets vCPUs wait",
        ok=all(record.largest_gap_ns >= _pause_bounds_ns(trio.kernel)[0] for record in trio.kernel.interrupted.records),
    )


def _stop_guest_rows(trio: Trio) -> Iterable[Check]:
    yield trio.row(
        "stop, cont: GUEST_STOPPED",
        lambda it: {"stopped": _stops(it)},
        "{stopped}".format,
        "how often each vCPU's guest saw the bit, and cleared it: once with the engine and in QEMU, which sets it at "
        "cont (KVM_KVMCLOCK_CTRL); never with the kernel, whom nobody asks to",
        ok=all(_stops(trio.engine)) and all(_stops(trio.qemu)) and not any(_stops(trio.kernel)),
    )
    yield trio.row(
        "stop, cont: versions",
        lambda it: {"before": _versions(it.interrupted.before), "after": _versions(it.interrupted.after)},
        lambda before, after: ", ".join(map("{} to {}".format, before, after)),
        "the engine's and QEMU's advanced, for the clock was set; always from even to even",
        ok=all(_goes_on(it.interrupted, must_advance=it is not trio.kernel) for it in trio),
    )
    yield trio.row(
        "stop, cont: steps back",
        lambda it: {"steps_back": _steps_back(it), "worst_back_ns": _worst_back_ns(it)},
        lambda steps_back, worst_back_ns: f"{steps_back:,}, up to {worst_back_ns / 1e6:.3f} ms",
        "none in engine and kernel.  In QEMU up to the pause, and none with one vCPU: KVM "
        "publishes a vCPU's page when that vCPU is let in, so who comes first finds vCPU 0's page (which every vDSO "
        "reads) as it was before the stop, ahead by the pause",
        ok=_steps_back(trio.engine) + _steps_back(trio.kernel) == 0
        and (_worst_back_ns(trio.qemu) <= _pause_bounds_ns(trio.qemu)[1])
        and (_steps_back(trio.qemu) == 0 or len(trio.qemu.interrupted.records) > 1),
    )
    yield trio.row(
        "stop, cont: wild or torn",
        lambda it: {"wrong_reads": sum(record.wild + record.torn for record in it.interrupted.records)},
        "{wrong_reads}".format,
        "as when left alone: a page may be late, but never half of one and half of another",
        ok=not any(record.wild + record.torn for it in trio for record in it.interrupted.records),
    )
    yield trio.row(
        "stop, cont: pages",
        lambda it: {"after": [_rate(page) for page in it.interrupted.after]},
        lambda after: _each("{tsc_to_system_mul:#010x} {tsc_shift} {flags:#04x}".format_map(page) for page in after),
        "mul, shift and flags afterwards: as before, and the guest has cleared GUEST_STOPPED",
    )


def _is_stable(trio: Trio) -> bool:
    return any(page.flags & STABLE for it in trio for page in it.alone.pages)


def _pause_bounds_ns(it: Sight) -> tuple[int, int]:
    """How much of time a clock can have left out over the pause, if it left out the pause: by two looks at it."""
    seen = it.interrupted
    return seen.pause.least_ns - seen.look_bound_ns, seen.pause.most_ns + seen.look_bound_ns


def _each(values: Iterable[object]) -> str:
    """What all vCPUs have, or a list if they differ."""
    shown = [str(value) for value in values]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def _wall_clock_error_ns(it: Sight) -> int:
    """The worse of two: by whoever serves the clock (in QEMU, as the next), and by watching the guest."""
    return max(it.alone.wall_clock_error_ns, it.interrupted.wall_clock_error_ns, key=abs)


def _goes_on_through(it: Sight) -> bool:
    """Did this clock leave nothing out, as far as two looks at it can tell?"""
    return abs(it.interrupted.left_out_ns) <= it.interrupted.look_bound_ns + RAW_LIMIT_PPM * 1e3


def _leaves_out_the_pause(it: Sight) -> bool:
    least_ns, most_ns = _pause_bounds_ns(it)
    return least_ns <= it.interrupted.left_out_ns <= most_ns


def _progress_bound_ns(seen: Interruption) -> float:
    return seen.look_bound_ns + seen.span_s * RAW_LIMIT_PPM * 1e3


def _steps_back(it: Sight) -> int:
    return sum(record.backward_own + record.backward_cross for record in it.interrupted.records)


def _worst_back_ns(it: Sight) -> int:
    return max(record.worst_back_ns for record in it.interrupted.records)


def _stops(it: Sight) -> list[int]:
    return [record.stopped for record in it.interrupted.records]


def _versions(pages: Iterable[TimeInfo]) -> list[int]:
    return [page.version for page in pages]


def _rate(page: TimeInfo) -> dict[str, int]:
    return {name: getattr(page, name) for name in ("tsc_to_system_mul", "tsc_shift", "flags")}


def _goes_on(seen: Interruption, *, must_advance: bool) -> bool:
    """Do all versions go from even to even, and not back?  By 2^32, as they wrap."""
    steps = [(after.version - before.version) % 2**32 for before, after in zip(seen.before, seen.after, strict=True)]
    evens = all(page.version % 2 == 0 for page in (*seen.before, *seen.after))
    return evens and all(int(must_advance) <= step < 2**31 for step in steps)
