"""The device model: objects with properties in a tree, devices and their resets, and the pvclock device."""

from __future__ import annotations

import itertools
from fractions import Fraction
from functools import partial
from typing import Any, Final

import pytest

from pvclock import (
    ConfigError,
    GuestClock,
    GuestMemory,
    KvmFeature,
    RangeError,
    SimulatedBackend,
    StateError,
    StateFileError,
)
from pvclock.machine import RunState, RunStates
from qemu_glue.errors import QmpRefusal
from qemu_glue.face.devices import DEVICE, Device, DeviceClass
from qemu_glue.face.object_commands import ObjectCommands
from qemu_glue.face.objects import CONTAINER, OBJECT, Object, ObjectType, ancestry, properties_of
from qemu_glue.face.properties import (
    BOOL,
    INT,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    Property,
    PropertyType,
    checked,
    enumeration,
    structure,
)
from qemu_glue.face.pvclock_device import PVCLOCK, PVCLOCK_STATE, PvclockModel
from qemu_glue.face.resets import assert_reset, release_reset, reset
from qemu_glue.face.vmstate import save_section
from qemu_glue.face.vmstate_load import load_section

pytestmark = pytest.mark.row("E15")

COLOUR: Final = enumeration("Colour", "red", "green")
SYSTEM_TIME_MSR: Final = 0x4B564D01
PAGE: Final = 0x2000
LAMP: Final = ObjectType(
    "lamp",
    DEVICE,
    "It shines.",
    (
        Property(
            "colour", COLOUR, "Of its light.", lambda it: it.model["colour"], lambda it, to: it.model.update(colour=to)
        ),
        Property(
            "watts", UINT8, "What it takes.", None, lambda it, to: it.model.update(watts=to), is_configuration=True
        ),
    ),
)


class Tree:
    """A tree with a lamp, /machine/peripheral/lamp, and another, /machine/unattached/device[0]."""

    def __init__(self) -> None:
        self.root = Object(CONTAINER)
        machine = self.root.add("machine", Object(CONTAINER))
        self.lamp, self.other = (Device(DeviceClass(LAMP), {"colour": "red"}) for _ in range(2))
        machine.add("peripheral", Object(CONTAINER)).add("lamp", self.lamp.object)
        machine.add("unattached", Object(CONTAINER)).add("device[*]", self.other.object)


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        (BOOL, 1, "Invalid parameter type for 'p', expected: boolean"),
        (STRING, 3, "Invalid parameter type for 'p', expected: string"),
        (INT, True, "Invalid parameter type for 'p', expected: integer"),
        (INT, 1.5, "Invalid parameter type for 'p', expected: integer"),
        (INT, 1 << 63, "Invalid parameter type for 'p', expected: integer"),
        (UINT8, 256, "Parameter 'p' expects uint8_t"),
        (UINT16, -1, "Parameter 'p' expects uint16_t"),
        (UINT16, "x", "Parameter 'p' expects uint64"),
        (UINT32, 1 << 32, "Parameter 'p' expects uint32_t"),
        (UINT64, 1 << 64, "Parameter 'p' expects uint64"),
        (COLOUR, "blue", "Parameter 'p' does not accept value 'blue'"),
        (COLOUR, 1, "Invalid parameter type for 'p', expected: string"),
        (structure("Things"), 3, "Invalid parameter type for 'p', expected: object"),
    ],
)
def test_what_a_property_cannot_be(kind: PropertyType, value: object, why: str) -> None:
    """It is refused in QEMU's words."""
    with pytest.raises(QmpRefusal) as refused:
        checked("p", kind, value)
    assert str(refused.value) == why


def test_what_properties_can_be() -> None:
    """The ends of each range, and each value of an enumeration."""
    for kind in (INT, UINT8, UINT16, UINT32, UINT64):
        assert [checked("p", kind, value) for value in (kind.low, kind.high)] == [kind.low, kind.high]
    assert [checked("p", COLOUR, value) for value in ("red", "green")] == ["red", "green"]
    assert (checked("p", BOOL, False), checked("p", STRING, "")) == (False, "")


def test_types_have_their_parents_properties() -> None:
    """In the order from the root down; one of the same name takes the place of the parent's."""
    assert [each.name for each in ancestry(LAMP)] == ["lamp", "device", "object"]
    names = ["type", "realized", "hotplugged", "hotpluggable", "colour", "watts"]
    assert [each.name for each in properties_of(LAMP)] == names
    dim = ObjectType("dim-lamp", LAMP, "", (Property("colour", STRING, "Any.", None),))
    assert [each.name for each in properties_of(dim)] == names
    assert {each.name: each.type for each in properties_of(dim)}["colour"] is STRING


def test_paths_lead_to_objects() -> None:
    """Absolute ones from the root, others from any object that they lead on from, if from one only."""
    tree = Tree()
    assert tree.lamp.object.path == "/machine/peripheral/lamp"
    assert tree.other.object.path == "/machine/unattached/device[0]"
    assert tree.root.path == "/"
    for path in ("/machine/peripheral/lamp", "lamp", "peripheral/lamp", "//machine//peripheral/lamp/"):
        assert tree.root.find(path) is tree.lamp.object
    for path, error_class in (("/lamp", "DeviceNotFound"), ("nope", "DeviceNotFound"), ("", "GenericError")):
        with pytest.raises(QmpRefusal) as refused:
            tree.root.find(path)
        assert refused.value.error_class == error_class


def test_a_name_in_two_places_is_ambiguous() -> None:
    """Unless its path begins at the root."""
    tree = Tree()
    tree.root.add("lamp", Object(CONTAINER))
    with pytest.raises(QmpRefusal, match="Path 'lamp' is ambiguous"):
        tree.root.find("lamp")
    assert tree.root.find("/machine/peripheral/lamp") is tree.lamp.object


def test_children_come_and_go() -> None:
    """Each has one parent and a name of its own; an index is the first that is free."""
    tree = Tree()
    unattached = tree.root.find("unattached")
    added = [unattached.add("device[*]", Object(CONTAINER)) for _ in range(2)]
    assert [each.name for each in added] == ["device[1]", "device[2]"]
    added[0].remove()
    assert unattached.add("device[*]", Object(CONTAINER)).name == "device[1]"
    assert (added[0].parent, added[0].path) == (None, "/")
    with pytest.raises(QmpRefusal, match="already parented at /machine/unattached/device"):
        tree.root.add("again", added[1])
    for name in ("device[1]", "type"):
        with pytest.raises(QmpRefusal, match="duplicate property"):
            unattached.add(name, Object(CONTAINER))


def test_properties_are_read_and_written() -> None:
    """By what the type says; children are told by their paths, and are not writable."""
    lamp = Tree().lamp
    lamp.object.set("colour", "green")
    assert (lamp.object.get("colour"), lamp.object.get("type"), lamp.object.get("realized")) == ("green", "lamp", False)
    for name, why in {"type": "is not writable", "nope": "not found", "hotplugged": "is not writable"}.items():
        with pytest.raises(QmpRefusal, match=rf"Property 'lamp\.{name}' {why}"):
            lamp.object.set(name, 1)
    with pytest.raises(QmpRefusal, match=r"Property 'lamp\.watts' is not readable"):
        lamp.object.get("watts")
    machine = Tree().root.find("/machine")
    assert machine.get("peripheral") == "/machine/peripheral"
    with pytest.raises(QmpRefusal, match=r"Property 'container\.peripheral' is not writable"):
        machine.set("peripheral", "/")


def test_a_realized_device_is_configured_no_more() -> None:
    """Its configuration stays until it is unrealized; the rest can change."""
    tree = Tree()
    tree.lamp.object.set("watts", 5)
    tree.lamp.object.set("realized", True)
    with pytest.raises(QmpRefusal) as refused:
        tree.lamp.object.set("watts", "not even looked at")
    where = "on device 'lamp' (type 'lamp') after it was realized"
    assert str(refused.value) == f"Attempt to set property 'watts' {where}"
    tree.lamp.object.set("colour", "green")
    tree.other.realize()
    with pytest.raises(QmpRefusal, match=r"on anonymous device \(type 'lamp'\)"):
        tree.other.object.set("watts", 5)
    tree.lamp.object.set("realized", False)
    tree.lamp.object.set("watts", 6)
    assert tree.lamp.model == {"colour": "green", "watts": 6}


def test_realize_is_all_or_nothing_and_once() -> None:
    """One that raises leaves the device as it was."""
    calls: list[str] = []

    def fail_once(_model: object) -> None:
        calls.append("realize")
        if len(calls) == 1:
            raise RangeError("no")

    device = Device(DeviceClass(LAMP, realize=fail_once, unrealize=lambda _: calls.append("unrealize")), None)
    with pytest.raises(RangeError):
        device.realize()
    assert not device.is_realized
    with pytest.raises(StateError, match="realize"):
        device.check_realized("shine")
    for act in (device.realize, device.realize, device.unrealize, device.unrealize):
        act()
    assert calls == ["realize", "realize", "unrealize"]


class Board:
    """A parent with two children and one that is not realized; what they do in a reset is in `calls`.

    fails_in: the phase and the device that raise.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fails_in: tuple[str, str] | None = None
        self.parent = self._device("parent")
        self.root = Object(CONTAINER)
        self.root.add("parent", self.parent.object)
        for name in ("first", "second"):
            self.parent.object.add(name, self._device(name).object)
        self.parent.object.add("idle", self._device("idle", is_realized=False).object)

    def _device(self, name: str, *, is_realized: bool = True) -> Device:
        def call(phase: str) -> Any:  # noqa: ANN401
            def note(model: str) -> None:
                self.calls.append((phase, model))
                if self.fails_in == (phase, model):
                    raise RangeError("no")

            return note

        device = Device(
            DeviceClass(LAMP, reset_enter=call("enter"), reset_hold=call("hold"), reset_exit=call("exit")), name
        )
        if is_realized:
            device.realize()
        return device


def test_a_reset_comes_in_three_phases() -> None:
    """All enter, children first; then all are held; then all leave.  What is not realized is left alone."""
    board = Board()
    reset(board.root)
    order = ("first", "second", "parent")
    assert board.calls == list(itertools.product(("enter", "hold", "exit"), order))


def test_a_reset_within_a_reset() -> None:
    """Who is in one already is not entered again, and leaves with the last."""
    board = Board()
    first = board.root.find("first")
    assert_reset(first)
    assert board.calls == [("enter", "first"), ("hold", "first")]
    reset(board.root)
    assert ("exit", "first") not in board.calls
    assert board.calls.count(("enter", "first")) == 1
    release_reset(first)
    assert board.calls[-1] == ("exit", "first")
    with pytest.raises(StateError, match="/parent/first is not in reset"):
        release_reset(first)


@pytest.mark.parametrize("phase", ["enter", "hold", "exit"])
def test_a_reset_that_fails_keeps_nobody_in_it(phase: str) -> None:
    """What a phase raises ends that reset; the next one is whole."""
    board = Board()
    board.fails_in = phase, "second"
    with pytest.raises(RangeError):
        reset(board.root)
    board.fails_in, board.calls = None, []
    reset(board.root)
    assert board.calls == list(itertools.product(("enter", "hold", "exit"), ("first", "second", "parent")))


def test_a_device_that_goes_leaves_the_reset() -> None:
    """One that is unrealized while it is in reset, and realized again, is reset as any other."""
    board = Board()
    first = board.root.find("first")
    assert_reset(board.root)
    first.set("realized", False)
    first.set("realized", True)
    board.calls.clear()
    reset(first)
    assert board.calls == [("enter", "first"), ("hold", "first"), ("exit", "first")]


def a_model(ram: bytearray) -> PvclockModel:
    """One of a simulated host's."""
    return PvclockModel.of_clock(GuestMemory(ram), 2, backend=SimulatedBackend(tsc_hz=2_500_000_000))


def test_the_pvclock_device_is_configured_and_realized() -> None:
    """Its clock is made by its properties, with GuestClock's errors; what the clock can change stays writable."""
    model = a_model(bytearray(1 << 20))
    device = Device(PVCLOCK, model)
    it = device.object
    with pytest.raises(StateError, match="not realized"):
        it.get("guest-ns")
    unset = {"provider": "KVM", "features": 0, "reference": "off", "resume-policy": "freeze", "rate": "1"}
    assert {name: it.get(name) for name in unset} == unset
    it.set("features", 1 << 60)
    with pytest.raises(ConfigError, match="cannot be served here"):
        device.realize()
    features = int(KvmFeature.CLOCKSOURCE2)
    chosen = {"features": features, "resume-policy": "advance", "rate": "3/2"}
    for name, value in chosen.items():
        it.set(name, value)
    device.realize()
    assert {name: it.get(name) for name in chosen} == chosen
    clock = model.clock
    assert isinstance(clock, GuestClock)
    assert (str(clock.policy), str(clock.dilation), it.get("tsc-frequency")) == ("advance", "3/2", 2_500_000_000)
    it.set("rate", "0.5")
    it.set("resume-policy", "freeze")
    assert (str(clock.policy), str(clock.dilation), it.get("rate")) == ("freeze", "1/2", "1/2")
    with pytest.raises(QmpRefusal, match="after it was realized"):
        it.set("provider", "Minimal")


@pytest.mark.parametrize("rate", ["", "x", "-1", "1/0", "1/-2", "1e99", "9" * 21, "1 / 2"])
def test_what_is_no_rate(rate: str) -> None:
    """It is refused before a number is made of it, which might be huge."""
    with pytest.raises(ConfigError, match="give guest seconds in a host second"):
        Device(PVCLOCK, a_model(bytearray(1 << 20))).object.set("rate", rate)


def test_the_pvclock_device_follows_the_run_state() -> None:
    """Guest time stands still while the VM does not run, whatever it stops for."""
    model = a_model(bytearray(1 << 20))
    Device(PVCLOCK, model).realize()
    run_states = RunStates()
    run_states.add_handler(model.change_run_state)
    states = (
        RunState.RUNNING,
        RunState.PAUSED,
        RunState.RUNNING,
        RunState.SHUTDOWN,
        RunState.PRELAUNCH,
        RunState.RUNNING,
    )
    paused = []
    for state in states:
        run_states.update(lambda state=state: state)  # type: ignore[misc]  # bound now
        paused.append(model.clock.is_paused)
    assert paused == [False, True, False, True, True, False]


def test_the_pvclock_device_is_reset_and_unrealized() -> None:
    """Its MSRs are as after power-on; unrealized it has no clock any more."""
    model = a_model(bytearray(1 << 20))
    device = Device(PVCLOCK, model)
    device.realize()
    clock = model.clock
    for end in (partial(reset, device.object), device.unrealize):
        clock.write_msr(0, SYSTEM_TIME_MSR, PAGE | 1)
        assert clock.page(0) is not None
        end()
        assert clock.page(0) is None
    with pytest.raises(StateError, match="not realized"):
        model.clock  # noqa: B018  # a property that raises


def test_the_pvclock_device_moves_by_its_section() -> None:
    """Guest time, rate, policy and pages are there again; a section that is damaged changes nothing."""
    ram = bytearray(1 << 20)
    model = a_model(ram)
    Device(PVCLOCK, model).realize()
    model.clock.write_msr(1, SYSTEM_TIME_MSR, PAGE | 1)
    model.clock.dilate(1, 3)
    model.clock.skip(10**9)
    model.set_policy("advance")
    model.clock.pause()
    section = save_section(PVCLOCK_STATE, model, 9)

    loaded = a_model(bytearray(ram))
    damaged = section.replace(b'"dilation"', b'"dilatiom"')
    assert damaged != section
    for wrong in (section[:-1], section + b"\0", damaged):
        with pytest.raises(StateFileError):
            load_section(PVCLOCK_STATE, loaded, wrong)
    load_section(PVCLOCK_STATE, loaded, section)
    assert loaded.clock.is_paused
    clock = loaded.clock
    assert (clock.dilation, str(clock.policy)) == (Fraction(1, 3), "advance")
    assert clock.now() == model.clock.now() >= 10**9
    assert clock.read(1) - model.clock.read(1) in (0, 1)


def test_types_by_qmp() -> None:
    """A tree of a VMM's own is served by the same commands: types, and a device's own properties."""
    tree = Tree()
    table = ObjectCommands(lambda: tree.root, [LAMP, CONTAINER]).table()
    assert table["qom-list-types"].run() == [
        {"name": "lamp", "parent": "device"},
        {"name": "container", "parent": "object"},
    ]
    kinds = table["qom-list-types"].run(implements="device", abstract=True)
    assert kinds == [{"name": "lamp", "parent": "device"}, {"name": "device", "abstract": True, "parent": "object"}]
    assert {"name": OBJECT.name, "abstract": True} in table["qom-list-types"].run(abstract=True)  # type: ignore[operator]
    listed: Any = table["device-list-properties"].run(typename="lamp")
    assert [each["name"] for each in listed] == ["colour", "watts"]
    with pytest.raises(QmpRefusal, match="non-abstract device type"):
        table["device-list-properties"].run(typename="container")
    table["qom-set"].run(path="lamp", property="colour", value="green")
    assert table["qom-get"].run(path="/machine/peripheral/lamp", property="colour") == "green"
