"""The keys of `pvclock.probe-record/1` as a schema: bounds on every size and number, for a guest may print anything.

A key that is not known here is passed over, so that a later probe may say more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from pvclock.errors import StateFileError
from pvclock.meter.inside.record import (
    CPUS_MAX,
    SCHEMA,
    SLICES,
    ClockRecord,
    ConsoleRecord,
    Cpu,
    KernelRecord,
    Leaf,
    PageRecord,
    PairRecord,
    ProbeRecord,
    Sample,
    Slice,
    StepRecord,
    StepsRecord,
    WarpRecord,
)
from pvclock.quantities import U32_MASK, U64_MASK
from pvclock.state.json_schema import BOOLEAN, Kind, list_of, one_of, optional, record, whole

__all__ = ["RECORD", "printable"]

TEXT_MAX: Final = 8192
"""Characters; a kernel's command line has up to 4096."""
HZ_MAX: Final = 10**12
MILLISECONDS_MAX: Final = 10**9
SHIFT_MAX: Final = 64
INT64_MAX: Final = (1 << 63) - 1


def printable(text: str) -> str:
    """Text that a guest printed, safe for a terminal: what cannot be printed as its escape."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


# Numbers and texts


def _read_text(value: object, path: str) -> str:
    if not isinstance(value, str) or len(value) > TEXT_MAX:
        raise StateFileError(path, _kind_of(value), TEXT.supported)
    return printable(_from_bytes(value))


def _from_bytes(text: str) -> str:
    """The probe writes each byte as the character of that number; most often they are UTF-8."""
    try:
        return text.encode("latin-1").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return text


def _kind_of(value: object) -> str:
    return f"{len(value)} characters" if isinstance(value, str) else f"a {type(value).__name__}"


TEXT: Final = Kind(f"text of up to {TEXT_MAX} characters", _read_text)
U32: Final = whole(0, U32_MASK, "unsigned 32-bit whole numbers")
U64: Final = whole(0, U64_MASK, "unsigned 64-bit whole numbers")
I64: Final = whole(-INT64_MAX - 1, INT64_MAX, "signed 64-bit whole numbers")
COUNT: Final = whole(0, INT64_MAX, "whole numbers from 0")
HZ: Final = whole(1, HZ_MAX, f"whole numbers from 1 to {HZ_MAX}")
PLACE: Final = whole(0, CPUS_MAX - 1, "places in the list cpus")
SCALAR: Final = optional(one_of("true, false, a whole number or text", {bool: BOOLEAN, int: I64, str: TEXT}))


def _only(text: str) -> Kind:
    def read(value: object, path: str) -> str:
        if value != text:
            raise StateFileError(path, f'"{printable(str(value)[:60])}"', f'"{text}"')
        return text

    return Kind(f'"{text}"', read)


def _of(make: Callable[..., object], *kinds: Kind) -> Kind:
    """A list of just those kinds, read as make(...)."""
    supported = f"a list of {len(kinds)}"

    def read(value: object, path: str) -> object:
        if not isinstance(value, list) or len(value) != len(kinds):
            raise StateFileError(path, _length_of(value), supported)
        return make(
            *[kind.read(each, f"{path}[{at}]") for at, (kind, each) in enumerate(zip(kinds, value, strict=True))]
        )

    return Kind(supported, read)


def _length_of(value: object) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"


def _record(make: Callable[..., object], kinds: Mapping[str, Kind], may_lack: tuple[str, ...] = ()) -> Kind:
    """An object of those names, and of others; what may be lacking is read as null then."""
    inner = record(make, dict(kinds))

    def read(value: object, path: str) -> object:
        if type(value) is dict:  # an object that has a name twice is of another class, and refused
            value = dict.fromkeys(may_lack) | {name: value[name] for name in kinds if name in value}
        return inner.read(value, path)

    return Kind(inner.supported, read)


# The measurement


def _read_slice(value: object, path: str) -> Slice:
    kind = SLICE_WITHOUT_ROUNDS if isinstance(value, list) and len(value) == 1 else SLICE
    made: Slice = kind.read(value, path)
    return made


SLICE: Final = _of(Slice, U64, I64, I64)
SLICE_WITHOUT_ROUNDS: Final = _of(lambda at_tsc: Slice(at_tsc, None, None), U64)


def _step(*, is_forward: bool) -> Kind:
    """A step's bounds are given the nearer one first, whatever its sign."""
    words = f"[low, high, at_tsc], neither {'below' if is_forward else 'above'} 0"
    kind = _of(StepRecord, I64, I64, U64)

    def read(value: object, path: str) -> StepRecord:
        step: StepRecord = kind.read(value, path)
        if (step.low < 0 or step.high < 0) if is_forward else (step.low > 0 or step.high > 0):
            raise StateFileError(path, f"{step.low} and {step.high}", words)
        low, high = sorted((step.low, step.high))
        return StepRecord(low, high, step.at_tsc)

    return optional(Kind(words, read))


def _make_pair(cpus: tuple[int, int], rounds: int, slices: tuple[Slice, ...]) -> PairRecord:
    return PairRecord(*cpus, rounds, slices)


def _make_warp(**members: int) -> WarpRecord:
    return WarpRecord(members["from"], members["to"], members["count"], members["largest"])


def _make_steps(*, count: int, **members: object) -> StepsRecord:
    return StepsRecord(beyond_floor=count, **members)  # type: ignore[arg-type]  # as the kinds read them


STEPS: Final = _record(
    _make_steps,
    {
        "reads": COUNT,
        "floor": COUNT,
        "forward": _step(is_forward=True),
        "backward": _step(is_forward=False),
        "count": COUNT,
    },
)
PAIR: Final = _record(
    _make_pair,
    {
        "cpus": _of(lambda a, b: (a, b), PLACE, PLACE),
        "rounds": COUNT,
        "slices": list_of(Kind("a slice", _read_slice), 0, SLICES, f"a list of up to {SLICES}"),
    },
)
WARP: Final = _record(_make_warp, {"from": PLACE, "to": PLACE, "count": COUNT, "largest": COUNT})
CLOCK: Final = _record(
    ClockRecord,
    {
        "name": TEXT,
        "hz": HZ,
        "samples": list_of(_of(Sample, U64, I64, U64), 0, SLICES + 1, f"a list of up to {SLICES + 1}"),
        "pairs": list_of(PAIR, 0, CPUS_MAX * CPUS_MAX, "a list of pairs"),
        "warps": list_of(WARP, 0, CPUS_MAX * CPUS_MAX, "a list of warps"),
        "cell_reads": COUNT,
        "steps": STEPS,
    },
)

# The whole

PAGE: Final = _record(
    PageRecord,
    {
        "cpu": U64,
        "version": U32,
        "mul": U32,
        "shift": whole(-SHIFT_MAX, SHIFT_MAX, f"whole numbers from -{SHIFT_MAX} to {SHIFT_MAX}"),
        "flags": U32,
        "looks": COUNT,
        "stopped_looks": COUNT,
    },
)
KERNEL: Final = _record(
    KernelRecord,
    {
        "release": TEXT,
        "clocksource": TEXT,
        "available": list_of(TEXT, 0, 64, "a list of up to 64"),
        "command_line": TEXT,
        "complaints": optional(list_of(TEXT, 0, 1024, "a list of up to 1024")),
    },
)
CONSOLE_KEYS: Final = ("com1", "debug_port", "pvclock_msr", "hyperv_msr")
CONSOLE: Final = _record(ConsoleRecord, dict.fromkeys(CONSOLE_KEYS, SCALAR), may_lack=CONSOLE_KEYS)


def _make_record(*, added_ns: tuple[int, ...] | None, **members: object) -> ProbeRecord:
    members.pop("schema")
    return ProbeRecord(added_ns=added_ns or (), **members)  # type: ignore[arg-type]  # as the kinds read them


def _read_record(value: object, path: str) -> ProbeRecord:
    made: ProbeRecord = WHOLE.read(value, path)
    _check_names(made)
    _check_places(made)
    return made


def _check_names(made: ProbeRecord) -> None:
    names = [clock.name for clock in made.clocks]
    if names[0] != "tsc":
        raise StateFileError("clocks[0].name", f'"{names[0][:60]}"', '"tsc", for it is the first')
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise StateFileError("clocks", f'"{repeated[:60]}" more than once', "each clock once")


def _check_places(made: ProbeRecord) -> None:
    """Each pair and warp is of CPUs that there are, and a pair is of two, and told once."""
    count = len(made.cpus)
    words = f"places 0 to {count - 1} of the list cpus"
    if len(made.added_ns) not in {0, count}:
        raise StateFileError("added_ns", f"{len(made.added_ns)} numbers", f"one for each of {count} CPUs")
    for at, clock in enumerate(made.clocks):
        for place, pair in enumerate(clock.pairs):
            if max(pair.a, pair.b) >= count or pair.a == pair.b:
                raise StateFileError(
                    f"clocks[{at}].pairs[{place}].cpus", f"[{pair.a}, {pair.b}]", f"two different {words}"
                )
        _check_repeated(clock, f"clocks[{at}].pairs")
        for place, warp in enumerate(clock.warps):
            if max(warp.writer, warp.reader) >= count:
                raise StateFileError(f"clocks[{at}].warps[{place}]", f"{warp.writer} to {warp.reader}", words)


def _check_repeated(clock: ClockRecord, path: str) -> None:
    """A pair that is told twice, either way round, has two windows that need not agree."""
    seen = set()
    for place, pair in enumerate(clock.pairs):
        both = frozenset((pair.a, pair.b))
        if both in seen:
            raise StateFileError(f"{path}[{place}].cpus", f"[{pair.a}, {pair.b}] more than once", "each pair once")
        seen.add(both)


WHOLE: Final = _record(
    _make_record,
    {
        "schema": _only(SCHEMA),
        "version": TEXT,
        "form": TEXT,
        "tsc_hz": HZ,
        "tsc_hz_from": TEXT,
        "milliseconds": whole(0, MILLISECONDS_MAX, f"whole numbers from 0 to {MILLISECONDS_MAX}"),
        "cpus": list_of(
            _record(Cpu, {"cpu": I64, "apic_id": optional(I64)}, may_lack=("apic_id",)),
            1,
            CPUS_MAX,
            "a list of 1 to 64",
        ),
        "added_ns": optional(list_of(I64, 0, CPUS_MAX, f"a list of up to {CPUS_MAX}")),
        "cpuid": list_of(_of(Leaf, *[U32] * 6), 0, 256, "a list of up to 256"),
        "pages": list_of(PAGE, 0, CPUS_MAX, f"a list of up to {CPUS_MAX}"),
        "clocks": list_of(CLOCK, 1, 16, "a list of 1 to 16"),
        "kernel": optional(KERNEL),
        "console": optional(CONSOLE),
        "cpus_present": optional(COUNT),
    },
    may_lack=("added_ns", "kernel", "console", "cpus_present"),
)
RECORD: Final = Kind(WHOLE.supported, _read_record)
