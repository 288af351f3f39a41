"""The saved state's format: it comes back as it was, and what is wrong with one is named, whatever it is."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from fractions import Fraction
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import KvmFeature, PvclockError, StateFileError
from pvclock.state import clock_state
from pvclock.state.clock_state import FIELDS, ClockState, Mark, SavedPolicy
from pvclock.state.json_schema import BYTES_MAX
from tests.saved_states import EXTREME, LEAST, TYPICAL, U64_MAX, states

Mapping = dict[str, Any]
Path = tuple[str | int, ...]

TYPICAL_MAPPING = clock_state.to_mapping(TYPICAL)
TABLES = {("provider", "config"), ("provider", "msrs")}

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text() | st.sampled_from(ClockState._fields), values),
    max_leaves=8,
)


def paths(value: object, above: Path = ()) -> Iterator[Path]:
    """Each field of a mapping, with what is within it; a fraction is one field, and so is a table."""
    members: Any = ()
    if isinstance(value, dict) and above not in TABLES:
        members = value.items()
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        members = enumerate(value)
    for name, each in members:
        if isinstance(name, str):
            yield (*above, name)
        yield from paths(each, (*above, name))


def dotted(path: Path) -> str:
    """A field as errors name it."""
    return ".".join(map(str, path)).replace(".0", "[0]").replace(".1", "[1]")


def inside(mapping: Mapping, path: Path) -> Any:  # noqa: ANN401  # that is what is in JSON
    """What is in a mapping at a path."""
    value: Any = mapping
    for name in path:
        value = value[name]
    return value


def changed(path: Path, value: object) -> Mapping:
    """The typical state with another value at a path."""
    mapping = deepcopy(TYPICAL_MAPPING)
    inside(mapping, path[:-1])[path[-1]] = value
    return mapping


def refusal(document: object) -> StateFileError:
    """The error that says what is wrong with a document, as text or as a mapping."""
    read: Callable[[Any], ClockState] = clock_state.from_mapping
    if isinstance(document, str | bytes):
        read = clock_state.from_json
    with pytest.raises(StateFileError) as caught:
        read(document)
    error = caught.value
    assert str(error) == f"{error.field}: found {error.found}; supported: {error.supported}"
    return error


ALL_PATHS = list(paths(TYPICAL_MAPPING))
LEAVES = [path for path in ALL_PATHS if not any(other[: len(path)] == path != other for other in ALL_PATHS)]
OBJECTS = [(), *(path for path in ALL_PATHS if isinstance(inside(TYPICAL_MAPPING, path), dict)), ("vcpus", 1)]


@pytest.mark.row("P-25", "E9", "J-07", "E1")
@given(state=states())
def test_what_is_saved_comes_back(state: ClockState) -> None:
    """Any state is the same after to_json and from_json, with each value's type, and so is its text."""
    text = clock_state.to_json(state)
    back = clock_state.from_json(text)
    assert back == state
    assert clock_state.to_json(back) == text
    assert clock_state.from_json(text.encode()) == clock_state.from_mapping(json.loads(text)) == state
    assert repr(clock_state.to_mapping(back)) == repr(clock_state.to_mapping(state))  # True is not 1 here


@pytest.mark.row("P-25")
def test_the_text_is_for_people_and_always_the_same() -> None:
    """One line a value, fractions and lists in one line; the order in which tables were made does not matter."""
    provider = TYPICAL.provider
    turned = provider._replace(
        config=dict(reversed(list(provider.config.items()))), msrs=dict(reversed(list(provider.msrs.items())))
    )
    text = clock_state.to_json(TYPICAL)
    assert clock_state.to_json(TYPICAL._replace(provider=turned)) == text
    assert text.endswith("}\n")
    assert '\n    "guest_ns": [86400000000001, 3],\n' in text
    assert '\n      "system_time": [8193, 12289],\n' in text


@pytest.mark.row("P-25")
@pytest.mark.parametrize("path", ALL_PATHS, ids=dotted)
def test_a_missing_field_is_named(path: Path) -> None:
    """Without any one field, the error has its dotted path."""
    mapping = deepcopy(TYPICAL_MAPPING)
    del inside(mapping, path[:-1])[path[-1]]
    error = refusal(mapping)
    assert (error.field, error.found) == (dotted(path), "nothing")


@pytest.mark.row("P-25")
@pytest.mark.parametrize("path", ALL_PATHS, ids=dotted)
def test_a_mistyped_field_is_named(path: Path) -> None:
    """A value that the field cannot hold is refused with the field's path, and so is a bool where a number is meant."""
    value = inside(TYPICAL_MAPPING, path)
    wrong: list[object] = [1.5, float("nan"), float("inf"), [[1]], {"a": {}}, "", "\x1b[2J", "é", -(2**70), 2**5000]
    wrong += [] if isinstance(value, bool) else [True]
    wrong += [0, 1] if isinstance(value, bool | str | dict | list) else ["1"]
    for each in wrong:
        error = refusal(changed(path, each))
        assert error.field.startswith(dotted(path))
        assert error.found
        assert len(error.found) < 100
        assert error.found.isprintable()


@pytest.mark.row("P-25")
@pytest.mark.parametrize("path", ALL_PATHS, ids=dotted)
def test_null_is_for_what_may_not_be_there(path: Path) -> None:
    """Only what a state can be without may be null."""
    optional = {"slew", "reference", "reference.panic_ns", "guest_tsc_hz", "wall_clock_gpa", "wall_clock.fixed_ns"}
    optional |= {
        "timeline.paused_dilation",
        "host.raw_ns",
        "host.boot_id",
        "host.asleep_ns",
        *(f"vcpus[{n}].time_page_gpa" for n in (0, 1)),
    }
    if dotted(path) in optional:
        assert inside(clock_state.to_mapping(clock_state.from_mapping(changed(path, None))), path) is None
    else:
        assert refusal(changed(path, None)).field == dotted(path)


@pytest.mark.row("P-25")
@pytest.mark.parametrize(
    ("path", "least", "most"),
    [
        (("provider", "version"), 1, 2**32 - 1),
        (("provider", "config", "features"), 0, U64_MAX),
        (("provider", "msrs", "wall_clock"), 0, U64_MAX),
        (("host", "tsc"), 0, U64_MAX),
        (("host", "tsc_hz"), 1, U64_MAX),
        (("host", "raw_ns"), -(2**63), 2**63 - 1),
        (("host", "real_ns"), -(2**63), 2**63 - 1),
        (("wall_clock_gpa",), 0, U64_MAX),
        (("vcpus", 1, "tsc_offset"), 0, U64_MAX),
        (("vcpus", 1, "tsc_adjust"), 0, U64_MAX),
        (("vcpus", 1, "tsc_aux"), 0, 2**32 - 1),
        (("vcpus", 1, "guest_tsc"), 0, U64_MAX),
        (("vcpus", 1, "time_page_gpa"), 0, U64_MAX),
    ],
    ids=lambda value: dotted(value) if isinstance(value, tuple) else "",
)
def test_numbers_have_limits(path: Path, least: int, most: int) -> None:
    """The least and the most are taken; one less and one more are refused, by name."""
    for value in (least, most):
        assert inside(clock_state.to_mapping(clock_state.from_mapping(changed(path, value))), path) == value
    for value in (least - 1, most + 1):
        error = refusal(changed(path, value))
        assert (error.field, error.found) == (dotted(path), str(value))
        assert "a whole number from" in error.supported


@pytest.mark.row("P-25")
@pytest.mark.parametrize(
    "value", [[1], [1, 2, 3], [1, 0], [1, -2], [1.0, 2], [True, 2], ["1", 2], 1, "1/2", [2**2048, 1]]
)
@pytest.mark.parametrize(
    "path", [("timeline", "guest_ns"), ("timeline", "dilation"), ("slew", "remaining_ns")], ids=dotted
)
def test_fractions_are_two_whole_numbers(path: Path, value: object) -> None:
    """A fraction is [numerator, denominator], the latter above 0, both within 2048 bits."""
    assert refusal(changed(path, value)).field == dotted(path)


@pytest.mark.row("P-25")
@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        (("timeline", "guest_ns"), [0, 1], [-1, 10**9]),
        (("timeline", "guest_ns"), [2**65 - 1, 2], [2**64, 1]),
        (("timeline", "dilation"), [1, 2**2047], [0, 1]),
        (("timeline", "dilation"), [2**65 - 1, 2], [2**64, 1]),
        (("slew", "remaining_ns"), [1 - 2**65, 2], [-(2**64), 1]),
        (("slew", "remaining_ns"), [2**65 - 1, 2], [2**64, 1]),
    ],
)
def test_fractions_have_limits(path: Path, good: list[int], bad: list[int]) -> None:
    """Guest time is not negative, a dilation is positive, and what no clock can reach is refused."""
    assert inside(clock_state.to_mapping(clock_state.from_mapping(changed(path, good))), path) == good
    assert refusal(changed(path, bad)).field == dotted(path)


@pytest.mark.row("P-25")
@pytest.mark.parametrize("path", OBJECTS, ids=dotted)
def test_an_unknown_field_is_named(path: Path) -> None:
    """A misspelt field does not pass as another one that is not there; a table's names are the provider's."""
    mapping = changed((*path, "guest_nss"), 0)
    if path in TABLES:
        assert inside(clock_state.to_mapping(clock_state.from_mapping(mapping)), path)["guest_nss"] == 0
        mapping = changed((*path, "with space"), 0)
        assert refusal(mapping).field == f'{dotted(path)}."with space"'
    else:
        error = refusal(mapping)
        assert error.field == f"{dotted(path)}.guest_nss".lstrip(".")
        assert all(name in error.supported for name in inside(TYPICAL_MAPPING, path))


@pytest.mark.row("P-25")
@pytest.mark.parametrize("path", LEAVES, ids=dotted)
def test_a_field_that_is_there_twice_is_named(path: Path) -> None:
    """Where readers of JSON would take one of two values, neither is taken."""
    marker = "<here>"
    text = json.dumps(changed(path, marker))
    member = f'"{path[-1]}": "{marker}"'
    assert member in text
    error = refusal(text.replace(member, f'"{path[-1]}": 1, "{path[-1]}": 1'))
    assert error.field == (dotted(path) if path != ("version",) else "version")
    assert error.found == "it more than once"


@pytest.mark.row("P-25")
@pytest.mark.parametrize("version", [0, 4, -1, 2**32, 1.0, "1", True, None, [1]])
def test_another_version_is_refused_first(version: object) -> None:
    """A version that this pvclock does not know is named with the one it knows, whatever else is different there."""
    for mapping in ({**TYPICAL_MAPPING, "version": version}, {"version": version, "clocks": []}):
        error = refusal(json.dumps(mapping))
        assert (error.field, error.found, error.supported) == (
            "version",
            json.dumps(version).replace("[1]", "a list of 1"),
            "1 to 3",
        )


@pytest.mark.row("P-25")
@pytest.mark.parametrize(
    "document",
    [
        *("", " ", "null", "1", '"text"', "[]", "{", "{}x", '{"version": 01}', "\ufeff{}", "{'version': 1}"),
        *(
            b"\xff\xfe{\x00}\x00",
            b'{"policy": "\xc3("}',
            b"\x00",
            "[" * 100_000,
            '{"a":' * 100_000,
            " " * (BYTES_MAX + 1),
        ),
    ],
    ids=lambda document: repr(document[:12]),
)
def test_what_is_no_state_at_all(document: str | bytes) -> None:
    """Text that is no JSON, no UTF-8, no object, too deep or too long is an error about the file."""
    assert refusal(document).field == "file"


@pytest.mark.row("P-25")
@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "1.0", "-0.0", "9" * 5000, "-" + "9" * 700]
)
def test_numbers_that_json_lets_through(number: str) -> None:
    """NaN, infinities, floats and numbers of thousands of digits are values of the wrong type where they stand."""
    text = json.dumps(changed(("vcpus", 1, "guest_tsc"), "<here>")).replace('"<here>"', number)
    assert refusal(text).field == "vcpus[1].guest_tsc"


@pytest.mark.row("E9")
@given(
    document=ANYTHING
    | st.dictionaries(st.sampled_from(ClockState._fields), ANYTHING).map(lambda m: {**m, "version": 1})
)
def test_anything_else_is_refused(document: object) -> None:
    """No document raises anything but StateFileError, as a mapping or as text."""
    refusal(document)
    refusal(json.dumps(document))


@pytest.mark.row("E9")
@given(document=st.text() | st.binary())
def test_noise_is_refused(document: str | bytes) -> None:
    """No text and no bytes raise anything but StateFileError."""
    refusal(document)


@pytest.mark.row("P-25")
def test_vcpus_have_a_limit() -> None:
    """From 1 to 4096 vCPUs make a state."""
    assert len(clock_state.from_json(clock_state.to_json(LEAST._replace(vcpus=LEAST.vcpus * 4096))).vcpus) == 4096
    for vcpus in (0, 4097):
        error = refusal({**TYPICAL_MAPPING, "vcpus": TYPICAL_MAPPING["vcpus"][:1] * vcpus})
        assert (error.field, error.found) == ("vcpus", f"a list of {vcpus}")


@pytest.mark.row("P-25")
def test_an_unsound_state_is_not_written() -> None:
    """to_json refuses what from_json would refuse, with the same name; numbers of a kind of their own become plain."""
    for state, field in (
        (TYPICAL._replace(policy=SavedPolicy("", None)), "policy"),
        (TYPICAL._replace(host=TYPICAL.host._replace(tsc=-1)), "host.tsc"),
        (TYPICAL._replace(timeline=TYPICAL.timeline._replace(dilation=0.5)), "timeline.dilation"),  # type: ignore[arg-type]
        (TYPICAL._replace(timeline=TYPICAL.timeline._replace(guest_ns=Fraction(1, 3**2000))), "timeline.guest_ns"),
        (TYPICAL._replace(provider=TYPICAL.provider._replace(msrs={1: 1})), "provider.msrs"),  # type: ignore[dict-item]
        (
            TYPICAL._replace(
                provider=TYPICAL.provider._replace(msrs=dict.fromkeys(map(str, range(65_536)), "x" * 256))
            ),
            "file",
        ),
    ):
        with pytest.raises(StateFileError) as caught:
            clock_state.to_json(state)
        assert caught.value.field == field
    flags = TYPICAL.provider._replace(config={"features": KvmFeature.CLOCKSOURCE})
    back = clock_state.from_json(clock_state.to_json(TYPICAL._replace(provider=flags)))
    assert type(back.provider.config["features"]) is int


@pytest.mark.row("P-25")
def test_pythons_own_limit_of_digits_does_not_matter() -> None:
    """The longest numbers are read and written under the least limit that Python can be given."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        assert clock_state.from_json(clock_state.to_json(EXTREME)) == EXTREME
    finally:
        sys.set_int_max_str_digits(limit)


@pytest.mark.row("P-25")
def test_a_provider_that_is_not_here_is_named() -> None:
    """A state of a provider that this pvclock lacks says which one it is, and which ones there are."""
    clock_state.check_provider(TYPICAL)
    clock_state.check_provider(LEAST)
    with pytest.raises(
        StateFileError, match=r"provider\.name: found 'Xen'; supported: 'None', 'Minimal', 'HyperV', 'KVM'"
    ):
        clock_state.check_provider(TYPICAL._replace(provider=TYPICAL.provider._replace(name="Xen")))
    with pytest.raises(StateFileError, match=r"provider\.version: found 4294967295; supported: 1 to"):
        clock_state.check_provider(TYPICAL._replace(provider=TYPICAL.provider._replace(version=2**32 - 1)))


def saved_paths(state: type[Any], above: str = "") -> Iterator[str]:
    """The fields of a NamedTuple and of those within it, as FIELDS writes them."""
    for name, hint in get_type_hints(state).items():
        parts = [part for part in (hint, *get_args(hint)) if hasattr(part, "_fields") and part is not SavedPolicy]
        is_list = parts and hint not in parts and None.__class__ not in get_args(hint)
        if parts:
            yield from saved_paths(parts[0], f"{above}{name}{'[]' * bool(is_list)}.")
        else:
            yield f"{above}{name}"


@pytest.mark.row("P-25")
def test_every_field_is_marked() -> None:
    """FIELDS has each field of a state once, in its order, then what is derived, then what is not saved, and why."""
    assert [field.path for field in FIELDS if field.mark is Mark.SAVED] == list(saved_paths(ClockState))
    assert [field.mark for field in FIELDS] == sorted((field.mark for field in FIELDS), key=list(Mark).index)
    assert len({field.path for field in FIELDS}) == len(FIELDS)
    assert {field.mark for field in FIELDS} == set(Mark)
    assert all(re.fullmatch(r".{10,}[.?]", field.meaning) for field in FIELDS)
    assert all(bool(field.kind) == (field.mark is Mark.SAVED) for field in FIELDS)


@pytest.mark.row("P-25")
def test_rows_have_each_value_once() -> None:
    """rows() gives each value of a state at its path, those of absent parts as None, and then what is not in it."""
    rows = list(clock_state.rows(TYPICAL))
    assert sorted(path for path, field, _ in rows if field.kind) == sorted(map(dotted, LEAVES))
    values = {path: value for path, _, value in rows}
    assert values["vcpus[1].tsc_aux"] == 1
    assert values["slew.remaining_ns"] == Fraction(-5_000_000_000, 7)
    assert next(value for path, _, value in clock_state.rows(LEAST) if path == "slew.policy") is None
    assert {field.path for _, field, _ in rows} == {field.path for field in FIELDS}


@pytest.mark.row("E13")
def test_the_error_keeps_what_it_names() -> None:
    """A StateFileError is a ValueError of ours with field, found, supported and path, through pickle, too."""
    error = StateFileError("host.tsc", "-1", "0 and up", "clock.json")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
    for each in (error, copy):
        assert str(each) == "clock.json: host.tsc: found -1; supported: 0 and up"
        assert (each.field, each.found, each.supported, each.path) == ("host.tsc", "-1", "0 and up", "clock.json")
    assert isinstance(copy, ValueError)
    assert isinstance(copy, PvclockError)
