"""Engine, kernel and QEMU side by side: what must agree, by how much, and why.

Pure: it is given what was seen (qemu_glue.observation) and judges it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from pvclock import TimeInfo
from pvclock.machine.observation import failures
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
    engine: str
    kernel: str
    qemu: str
    ok: bool
    why: str


class Trio(NamedTuple):
    """The three that are compared."""

    engine: Sight
    kernel: Sight
    qemu: Sight

    def row(self, name: str, show: Callable[[Sight], object], why: str, ok: bool | None = None) -> Check:
        """A row of what `show` makes of each; without `ok`, they must all be the same."""
        engine, kernel, qemu = (str(show(each)) for each in self)
        return Check(name, engine, kernel, qemu, engine == kernel == qemu if ok is None else ok, why)


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
    yield trio.row("TSC frequency, Hz", lambda it: it.alone.tsc_hz, "one host, one TSC: what each publishes pages for")
    yield trio.row(
        "tsc_to_system_mul",
        lambda it: _each(f"{page.tsc_to_system_mul:#010x}" for page in it.alone.pages),
        "one rate, one (mul, shift), on all vCPUs and for all three",
    )
    yield trio.row(
        "tsc_shift", lambda it: _each(page.tsc_shift for page in it.alone.pages), "belongs to tsc_to_system_mul"
    )
    yield trio.row(
        "flags",
        lambda it: _each(f"{page.flags:#04x}" for page in it.alone.pages),
        "bit 0: TSCs in step, which is the host's doing; bit 1: stopped, and nobody was",
    )
    yield trio.row(
        "versions",
        lambda it: [page.version for page in it.alone.pages],
        "even outside of an update, and above 0 once there was one; how many there were is each one's own affair",
        ok=all(page.version > 0 and page.version % 2 == 0 for it in trio for page in it.alone.pages),
    )
    qemu = trio.qemu.interrupted.pause
    yield Check(
        "pages by QMP",
        "-",
        "-",
        "the same" if qemu.by_monitor == qemu.pages else f"{qemu.by_monitor}, not {qemu.pages}",
        qemu.by_monitor == qemu.pages,
        "QEMU reads the same pages as we do in the RAM that it shares; no vCPU runs meanwhile",
    )


def _cpuid_rows(trio: Trio) -> Iterable[Check]:
    yield trio.row(
        "CPUID signature",
        lambda it: _each(f"{record.signature_leaf:#x}" for record in it.alone.records),
        "the leaf where the guest found KVMKVMKVM",
    )
    yield trio.row(
        "CPUID features",
        lambda it: _each(f"{record.features:#x}" for record in it.alone.records),
        "EAX of the next leaf; the kernel's machine and QEMU were told to offer what the engine does",
    )
    yield trio.row(
        "system time MSRs",
        lambda it: ", ".join(f"{record.msr:#x}: {record.msr_value:#x}" for record in it.alone.records),
        "the MSR that the guest chose by CPUID, and what it read back; all guests are the same image",
    )


def _time_rows(trio: Trio) -> Iterable[Check]:
    engine, *kernels = (_wall_clock_error_ns(it) for it in trio)
    yield trio.row(
        "wall clock",
        lambda it: f"{_wall_clock_error_ns(it) / 1e3:+.1f} us",
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
        lambda it: f"{it.alone.rate_ppb:+.3f} ppb",
        f"guest's time against its TSC's nominal; any two within {bound_ppb:.3f} ppb, as each of the four readings is "
        "cut to whole ns.  Not judged without STABLE: there KVM moves guests' TSCs, and readings may be another vCPU's",
        ok=not _is_stable(trio) or max(rates) - min(rates) <= bound_ppb,
    )
    steered = trio.engine.steered
    if steered is not None:
        yield trio.row(
            f"rate by {steered.reference}, nominal, steered",
            lambda it: f"{it.steered.nominal_ppb:+.1f}, {it.steered.steered_ppb:+.1f} ppb" if it.steered else "-",
            f"the engine's clock against the host's as above, and as it is when it follows that: 0 within "
            f"{steered.bound_ppb:.1f} ppb.  The kernel's has no such thing, and is as the engine's is at the nominal "
            "rate.  Not judged without STABLE, as above",
            ok=not _is_stable(trio) or abs(steered.steered_ppb) <= steered.bound_ppb,
        )
    yield trio.row(
        "progress by the host's clock",
        lambda it: f"{it.interrupted.progress_ns:+,} ns in {it.interrupted.span_s:.2f} s",
        f"against CLOCK_MONOTONIC_RAW, within {max(it.interrupted.look_bound_ns for it in trio):,} ns, how old a "
        f"reading may be when it is compared, and {RAW_LIMIT_PPM} ppm, for the kernel's own rounding of its rate",
        ok=all(abs(it.interrupted.progress_ns) <= _progress_bound_ns(it.interrupted) for it in trio),
    )


def _guest_rows(trio: Trio) -> Iterable[Check]:
    yield trio.row(
        "guest's reads",
        lambda it: f"{sum(record.reads for record in it.alone.records):,}",
        "every vCPU took part; how often is the scheduler's affair",
        ok=all(record.reads > 0 for it in trio for record in it.alone.records),
    )
    yield trio.row(
        "backward, wild or torn",
        lambda it: sum(failures(it.alone.records).values()),
        "by the guests' own count; no clock that is left alone may ever show one",
        ok=not any(sum(failures(it.alone.records).values()) for it in trio),
    )


def _stop_time_rows(trio: Trio) -> Iterable[Check]:
    yield trio.row(
        "stop, cont: time left out",
        lambda it: f"{it.interrupted.left_out_ns / 1e6:+.3f} ms",
        "engine and QEMU keep their clocks while their vCPUs are held: no less is left out than from stop answered to "
        "cont asked for, and no more than from stop asked for to cont answered.  The kernel's goes on, for it leaves "
        "that to its VMM.  No disagreement",
        ok=_goes_on_through(trio.kernel) and all(_leaves_out_the_pause(it) for it in (trio.engine, trio.qemu)),
    )
    yield trio.row(
        "stop, cont: largest gap",
        lambda it: f"{max(record.largest_gap_ns for record in it.interrupted.records) / 1e6:.1f} ms",
        "between two readings of a vCPU, by its guest's clock: no less than the pause where that was not left out.  "
        "Above it there is no bound, for a busy host lets vCPUs wait",
        ok=all(record.largest_gap_ns >= _pause_bounds_ns(trio.kernel)[0] for record in trio.kernel.interrupted.records),
    )


def _stop_guest_rows(trio: Trio) -> Iterable[Check]:
    yield trio.row(
        "stop, cont: GUEST_STOPPED",
        _stops,
        "how often each vCPU's guest saw the bit, and cleared it: once with the engine and in QEMU, which sets it at "
        "cont (KVM_KVMCLOCK_CTRL); never with the kernel, whom nobody asks to",
        ok=all(_stops(trio.engine)) and all(_stops(trio.qemu)) and not any(_stops(trio.kernel)),
    )
    yield trio.row(
        "stop, cont: versions",
        lambda it: ", ".join(map(_step, it.interrupted.before, it.interrupted.after)),
        "the engine's and QEMU's advanced, for the clock was set; always from even to even",
        ok=all(_goes_on(it.interrupted, must_advance=it is not trio.kernel) for it in trio),
    )
    yield trio.row(
        "stop, cont: steps back",
        lambda it: f"{_steps_back(it):,}, up to {_worst_back_ns(it) / 1e6:.3f} ms",
        "none in engine and kernel.  In QEMU up to the pause, and none with one vCPU: KVM "
        "publishes a vCPU's page when that vCPU is let in, so who comes first finds vCPU 0's page (which every vDSO "
        "reads) as it was before the stop, ahead by the pause",
        ok=_steps_back(trio.engine) + _steps_back(trio.kernel) == 0
        and (_worst_back_ns(trio.qemu) <= _pause_bounds_ns(trio.qemu)[1])
        and (_steps_back(trio.qemu) == 0 or len(trio.qemu.interrupted.records) > 1),
    )
    yield trio.row(
        "stop, cont: wild or torn",
        lambda it: sum(record.wild + record.torn for record in it.interrupted.records),
        "as when left alone: a page may be late, but never half of one and half of another",
        ok=not any(record.wild + record.torn for it in trio for record in it.interrupted.records),
    )
    yield trio.row(
        "stop, cont: pages",
        lambda it: _each(f"{mul:#010x} {shift} {flags:#04x}" for *_, mul, shift, flags in it.interrupted.after),
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


def _step(before: TimeInfo, after: TimeInfo) -> str:
    return f"{before.version} to {after.version}"


def _goes_on(seen: Interruption, *, must_advance: bool) -> bool:
    """Do all versions go from even to even, and not back?  By 2^32, as they wrap."""
    steps = [(after.version - before.version) % 2**32 for before, after in zip(seen.before, seen.after, strict=True)]
    evens = all(page.version % 2 == 0 for page in (*seen.before, *seen.after))
    return evens and all(int(must_advance) <= step < 2**31 for step in steps)
