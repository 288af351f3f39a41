"""VMState descriptions: their bytes are QEMU's, and what those bytes cannot be is refused with nothing changed."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace
from typing import Any, Final

import pytest

from pvclock import StateFileError
from qemu_glue.face.kvmclock_device import KVMCLOCK_STATE
from qemu_glue.face.vmstate import (
    BOOL,
    BYTES,
    INT32,
    INT64,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    Field,
    VmState,
    described,
    save,
    save_section,
    section_bytes_max,
    section_name,
    section_pattern,
)
from qemu_glue.face.vmstate_load import load, load_section
from tests.unit.saved_streams import CLOCK_NS, DESCRIPTION_AT, MICROVM, SECTION

pytestmark = pytest.mark.row("E15", "E7")

SECTION_ID: Final = 0x0E
KINDS: Final = {
    "uint8": (UINT8, 0xA5),
    "uint16": (UINT16, 0xA5A6),
    "uint32": (UINT32, 0xA5A6A7A8),
    "uint64": (UINT64, 0xA5A6A7A8A9AAABAC),
    "int32": (INT32, -2),
    "int64": (INT64, -3),
    "bool": (BOOL, True),
}
LOUD: Final = VmState("lamp/loud", 1, 1, (Field("volume", UINT8),), needed=lambda it: it.volume > 0)
TUNE: Final = VmState("lamp/tune", 2, 1, (Field("notes", UINT16, "count"), Field("tempo_hz", UINT8, since=2)))
QUIET_TUNE: Final = TUNE._replace(needed=lambda it: bool(it.notes))
LAMP: Final = VmState(
    "lamp",
    3,
    2,
    (
        Field("watts", UINT16),
        Field("count", UINT32),
        Field("colour", UINT8, 3),
        Field("label", BYTES, 4),
        Field("is_on", BOOL, since=3),
    ),
    (LOUD, QUIET_TUNE),
)


def a_lamp(**differences: Any) -> SimpleNamespace:  # noqa: ANN401
    """A model with a value for each field."""
    usual = {"watts": 60, "count": 0, "colour": [1, 2, 3], "label": b"lamp", "is_on": True}
    return SimpleNamespace(**{**usual, "volume": 0, "notes": [], "tempo_hz": 7, **differences})


def kvmclock(clock: int = CLOCK_NS, clock_is_reliable: bool = True) -> SimpleNamespace:
    """The model of a kvmclock without a VM."""
    return SimpleNamespace(clock=clock, clock_is_reliable=clock_is_reliable, read=list, write=list)


def test_kvmclock_is_written_as_a_qemu_wrote_it() -> None:
    """Byte by byte what stands in a stream of QEMU 7.2, and by the same description what that says of it."""
    model = kvmclock()
    assert save_section(KVMCLOCK_STATE, model, SECTION_ID) == SECTION
    devices = json.loads(MICROVM[DESCRIPTION_AT:])["devices"]
    (theirs,) = [each for each in devices if each["name"] == "kvmclock"]
    del theirs["name"], theirs["instance_id"], theirs["vmsd_name"]
    assert described(KVMCLOCK_STATE, model) == theirs


def test_kvmclock_is_read_as_a_qemu_wrote_it() -> None:
    """Into a model, which is told; without the subsection, as of machine types up to 2.8, its attribute stays."""
    calls: list[str] = []
    model = kvmclock(0, clock_is_reliable=False)
    model.write = lambda: calls.append("write")
    load_section(KVMCLOCK_STATE, model, SECTION)
    assert (model.clock, model.clock_is_reliable, calls) == (CLOCK_NS, True, ["write"])
    old = kvmclock(0, clock_is_reliable=False)
    load(KVMCLOCK_STATE, old, CLOCK_NS.to_bytes(8, "big"), 1)
    assert (old.clock, old.clock_is_reliable) == (CLOCK_NS, False)


def test_a_section_is_found_by_its_description() -> None:
    """The pattern matches it whole, with and without the subsection, and names its fields."""
    found = re.search(section_pattern(KVMCLOCK_STATE), MICROVM[MICROVM.index(SECTION) :], re.DOTALL)
    assert found is not None
    assert (found["id"], found["clock"], found["clock_is_reliable"]) == (
        SECTION[1:5],
        CLOCK_NS.to_bytes(8, "big"),
        b"\x01",
    )
    assert found[0] == SECTION[:-5]
    assert section_bytes_max(KVMCLOCK_STATE) == len(SECTION)
    assert section_name(KVMCLOCK_STATE) == SECTION[5:22]


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_field(name: str) -> None:
    """Big-endian, as long as its name says, alone and in an array; read as it was written."""
    kind, value = KINDS[name]
    state = VmState("it", 1, 1, (Field("one", kind), Field("many", kind, 2)))
    data = save(state, SimpleNamespace(one=value, many=[value, value]))
    expected = int(value).to_bytes(kind.form.size, "big", signed=name.startswith("int"))
    assert data == expected * 3
    model = SimpleNamespace()
    load(state, model, data, 1)
    assert (model.one, model.many) == (value, [value, value])
    assert type(model.one) is type(value)


def test_subsections_are_written_where_they_are_needed() -> None:
    """In their order, each under its name; and read in whatever order they come."""
    plain = save(LAMP, a_lamp())
    assert plain == b"\x00\x3c" + b"\0\0\0\0" + b"\1\2\3" + b"lamp" + b"\1"
    model = a_lamp(volume=9, count=2, notes=[1, 2])
    loud, tune = b"\x05\x09lamp/loud\0\0\0\1\x09", b"\x05\x09lamp/tune\0\0\0\2\0\1\0\2\7"
    data = save(LAMP, model)
    fields = plain[:2] + b"\0\0\0\2" + plain[6:]
    assert data == fields + loud + tune
    for order in (loud + tune, tune + loud):
        read = SimpleNamespace()
        load(LAMP, read, fields + order, 3)
        assert vars(read) == vars(model)


def test_older_versions_are_read() -> None:
    """They lack what came later; older than the minimum, or newer than this, is refused."""
    model = SimpleNamespace(is_on="as it was")
    load(LAMP, model, save(LAMP, a_lamp())[:-1], 2)
    assert (model.watts, model.is_on) == (60, "as it was")
    for version in (1, 4):
        with pytest.raises(StateFileError, match=r"lamp\.version.*2 to 3"):
            load(LAMP, model, save(LAMP, a_lamp()), version)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        save(LAMP, a_lamp())[:-1],
        save(LAMP, a_lamp()) + b"\0",
        save(LAMP, a_lamp())[:-1] + b"\2",
        save(LAMP, a_lamp()) + b"\x05\x09lamp/nope\0\0\0\1",
        save(LAMP, a_lamp()) + b"\x05\x09lamp/loud\0\0\0\2\0",
        save(LAMP, a_lamp()) + b"\x05\x09lamp/loud\0\0\0\1",
        save(LAMP, a_lamp()) + b"\x05\x09lamp/loud\0\0\0\1\1" * 2,
        save(LAMP, a_lamp()) + b"\x05\xfflamp",
        save(LAMP, a_lamp()) + b"\x05",
    ],
)
def test_what_is_no_state_changes_nothing(data: bytes) -> None:
    """Cut, too long, of unknown subsections or versions, the same twice, or a bool of 2."""
    model = SimpleNamespace()
    with pytest.raises(StateFileError):
        load(LAMP._replace(post_load=lambda _: pytest.fail("told")), model, data, 3)
    assert vars(model) == {}


@pytest.mark.parametrize("change", [(0, b"\x01"), (5, b"\x09"), (6, b"K"), (21, b"\2"), (-5, b"\x7d"), (-1, b"\0")])
def test_what_is_no_section(change: tuple[int, bytes]) -> None:
    """Another kind, another name, another version or another footer."""
    at, byte = change
    section = bytearray(SECTION)
    section[at] = byte[0]
    model = kvmclock(0)
    with pytest.raises(StateFileError):
        load_section(KVMCLOCK_STATE, model, bytes(section))
    assert model.clock == 0


def test_a_model_that_its_fields_cannot_hold() -> None:
    """The error names the field."""
    for wrong, field in ({"watts": 1 << 16}, "watts"), ({"colour": [1]}, "colour"), ({"label": b"x"}, "label"):
        with pytest.raises(StateFileError, match=rf"lamp\.{field}"):
            save(LAMP, a_lamp(**wrong))


def test_an_array_of_a_number_that_the_stream_says() -> None:
    """It is read by the field before it; a number that the stream has no bytes for makes nothing."""
    state = VmState(
        "it", 1, 1, (Field("count", UINT32), Field("values", UINT64, "count"), Field("text", BYTES, "count"))
    )
    model = SimpleNamespace(count=2, values=[1, 2], text=b"ab")
    data = save(state, model)
    read = SimpleNamespace()
    load(state, read, data, 1)
    assert vars(read) == vars(model)
    with pytest.raises(StateFileError, match=r"it\.values"):
        load(state, read, b"\xff\xff\xff\xff" + data[4:], 1)
    signed = VmState("it", 1, 1, (Field("count", INT32), Field("text", BYTES, "count")))
    with pytest.raises(StateFileError, match="-1 elements"):
        load(signed, read, b"\xff\xff\xff\xff", 1)
    assert described(state, model)["fields"] == [
        {"name": "count", "type": "uint32", "size": 4},
        {"name": "values", "array_len": 2, "type": "uint64", "size": 8},
        {"name": "text", "type": "buffer", "size": 2},
    ]


def test_damaged_sections_are_refused_or_read() -> None:
    """Whatever byte is changed: no other error, and no value outside its kind."""
    chance = random.Random(19)  # noqa: S311  # no secret
    for _ in range(2000):
        section = bytearray(SECTION)
        for _ in range(chance.randint(1, 3)):
            section[chance.randrange(len(section))] = chance.randrange(256)
        model = kvmclock(0)
        try:
            load_section(KVMCLOCK_STATE, model, bytes(section[: chance.choice([None, len(section) - 1, 30])]))
        except StateFileError:
            assert model.clock == 0
        assert model.clock_is_reliable in (True, False)
