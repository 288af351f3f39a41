"""A machine of ours as objects by QMP: what is where, its clock as a device, memory, registers, a true schema."""

from __future__ import annotations

import ctypes
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pvclock import Gpa
from pvclock.kvm import open_kvm
from pvclock.machine import Machine
from pvclock.machine.devices.power_button import PowerButton
from pvclock.meter.machine_guest import wait_until_reading
from pvclock.payloads import probe
from pvclock.testing.machines import made
from qemu_glue.errors import QmpFailed
from qemu_glue.face.devices import Device
from qemu_glue.face.kvmclock_device import KVMCLOCK_STATE, KvmclockModel
from qemu_glue.face.machine_tree import MachineTree
from qemu_glue.face.pvclock_device import PVCLOCK_STATE
from qemu_glue.face.served import serve
from qemu_glue.face.vmstate import save_section
from qemu_glue.face.vmstate_load import load_section
from qemu_glue.watch.mtree import MtreeRange, host_address, read_ram_ranges
from tests.kvm.test_qmp_machine import Served, a_client, served
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E15")]

LOOP: Final = bytes.fromhex("ebfe")
RAM_BYTES: Final = 16 << 20
CLOCK: Final = "/machine/peripheral/pvclock"
RELEASED: Final = 7
ASKED_TO_END: Final = bytes.fromhex(  # until the power button reads 1; then writes 1, and ends with what it reads and 7
    "ba1206"  # mov $0x612, %dx
    "ed a801 74fb"  # 1: in %dx, %ax; test $1, %al; jz 1b
    "b80100 ef"  # mov $1, %ax; out %ax, %dx
    "ec 0407 e6f4 f4"  # in %dx, %al; add $7, %al; out %al, $0xf4; hlt
)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Served]:
    """Return one with the engine's clock, that can have a third vCPU."""
    yield from served(tmp_path, max_vcpus=3)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Served]:
    """Return one with the kernel's clock."""
    yield from served(tmp_path, clock="kernel")


def children(served: Served, path: str) -> dict[str, str]:
    """The types of an object's children, by their names."""
    listed = served.ask("qom-list", path=path)
    kinds = {each["name"]: re.fullmatch(r"child<(.*)>", each["type"]) for each in listed}
    return {name: found[1] for name, found in kinds.items() if found}


def get(served: Served, path: str, name: str) -> Any:  # noqa: ANN401  # JSON
    """A property."""
    return served.ask("qom-get", path=path, property=name)


def test_vcpus_are_where_qemu_has_them(engine: Served) -> None:
    """device[N] in their order; one that comes later is hot-plugged, and in peripheral-anon."""
    paths = [each["qom-path"] for each in engine.ask("query-cpus-fast")]
    assert paths == ["/machine/unattached/device[0]", "/machine/unattached/device[1]"]
    assert engine.machine.add_vcpu() == 2
    late = engine.ask("query-cpus-fast")[2]["qom-path"]
    assert late == "/machine/peripheral-anon/device[0]"
    for number, path in enumerate([*paths, late]):
        assert get(engine, path, "type") == "host-x86_64-cpu"
        assert get(engine, path, "apic-id") == number
        assert get(engine, path, "hotplugged") is (number == 2)
        assert get(engine, path, "tsc-frequency") == engine.machine.clock.tsc_hz  # type: ignore[union-attr]
    assert get(engine, "/machine", "smp") == {"cpus": 3, "maxcpus": 3}
    with pytest.raises(QmpFailed, match="part of its machine"):
        engine.ask("qom-set", path=late, property="realized", value=False)


def test_the_kernel_s_clock_and_tsc(kernel: Served) -> None:
    """Its device is QEMU's; the frequency is KVM's, while the vCPUs run."""
    assert "kvmclock" in children(kernel, "/machine/unattached").values()
    assert not children(kernel, "/machine/peripheral")
    kernel.ask("stop")
    khz = kernel.machine.vcpus[0].get_tsc_khz()
    kernel.ask("cont")
    assert get(kernel, "device[0]", "tsc-frequency") == khz * 1000


def test_devices_are_those_on_the_bus() -> None:
    """Of a PC, and one that its VMM adds while it is served; as QEMU's type where that is what it is."""
    with Machine(LOOP, platform="pc") as machine:
        tree = MachineTree(machine)

        devices = tree.root().find("unattached").children.values()
        ports = [each for each in devices if each.type.parent is not None and each.type.parent.name == "isa-device"]
        found: dict[str, list[object]] = {each.type.name: [each.get("iobase"), each.get("iosize")] for each in ports}
        expected = {"isa-debugcon": [0xE9, 1], "isa-debug-exit": [0xF4, 1], "isa-serial": [0x3F8, 8]}
        expected |= {"pvpanic": [0x505, 1], "i8042": [0x64, 1]}
        assert {name: found[name] for name in expected} == expected
        machine.bus.add_mmio(0xD0000000, 0x1000, Silent())
        last = list(tree.root().find("unattached").children.values())[-1]
        assert (last.type.name, last.get("name")) == ("pvclock-memory-device", "silence")
        assert (last.get("base"), last.get("size"), last.get("realized")) == (0xD0000000, 0x1000, True)


class Silent:
    """A device that says nothing."""

    name = "silence"

    def read(self, _offset: int, length: int) -> bytes:
        """See Device."""
        return bytes(length)

    def write(self, _offset: int, _data: bytes) -> None:
        """See Device."""

    def reset(self) -> None:
        """See Device."""


def test_the_clock_is_a_device(engine: Served) -> None:
    """Its properties are the clock's own, and are changed as by its methods; what was configured stays."""
    clock = engine.machine.clock
    assert clock is not None
    expected = {"provider": "KVM", "reference": "off", "rate": "1", "resume-policy": "freeze", "realized": True}
    assert {name: get(engine, CLOCK, name) for name in expected} == expected
    assert get(engine, "pvclock", "features") == clock.interface.config["features"]
    for name, chosen in {"rate": "1/4", "resume-policy": "advance", "reference": "raw"}.items():
        engine.ask("qom-set", path=CLOCK, property=name, value=chosen)
        assert get(engine, CLOCK, name) == chosen
    assert (str(clock.dilation), str(clock.policy), str(clock.reference)) == ("1/4", "advance", "raw")
    assert get(engine, CLOCK, "guest-ns") <= clock.now()
    refused: tuple[tuple[str, object, str], ...] = (
        ("features", 1, "after it was realized"),
        ("provider", "Minimal", "after it was realized"),
        ("rate", "0", "dilat"),
        ("rate", 1, "expected: string"),
        ("resume-policy", "later", "choose from freeze, advance"),
        ("guest-ns", 1, "is not writable"),
    )
    for name, value, why in refused:
        with pytest.raises(QmpFailed, match=why):
            engine.ask("qom-set", path=CLOCK, property=name, value=value)
    assert (str(clock.dilation), clock.interface.name) == ("1/4", "KVM")


def the_clock_device(tree: MachineTree) -> Device:
    """The device of that machine's clock."""
    device = tree.root().find("pvclock").subject
    assert isinstance(device, Device)
    return device


def test_a_machine_s_clock_is_saved_and_rolled_back(engine: Served) -> None:
    """By its section: the clock goes back to what it was when the section was written."""
    machine = engine.machine
    machine.pause()
    model = the_clock_device(MachineTree(machine)).model
    section = save_section(PVCLOCK_STATE, model, 5)
    before = machine.clock
    assert before is not None
    saved_ns = before.now()
    before.skip(10**9)
    load_section(PVCLOCK_STATE, model, section)
    assert machine.clock is not before
    assert machine.clock is not None
    assert machine.clock.now() == saved_ns
    assert int(get(engine, CLOCK, "guest-ns")) == saved_ns


def test_the_kernel_s_clock_in_qemu_s_section() -> None:
    """What KVM says goes in, and what a section says is given to KVM."""
    with Machine(LOOP, clock="kernel") as machine:
        model = KvmclockModel(machine.vm)
        first = machine.vm.get_clock()["clock"]
        section = save_section(KVMCLOCK_STATE, model, 1)
        assert first <= model.clock <= machine.vm.get_clock()["clock"]
        later = section.replace(model.clock.to_bytes(8, "big"), (1 << 60).to_bytes(8, "big"))
        load_section(KVMCLOCK_STATE, model, later)
        assert machine.vm.get_clock()["clock"] >= 1 << 60


def test_ram_is_where_the_lines_for_people_say(engine: Served) -> None:
    """As `pvclock watch` reads them: RAM's range, and in this process's memory what the guest has there."""
    assert read_ram_ranges(engine.monitor) == [MtreeRange(0, RAM_BYTES, "pvclock.ram", 0)]  # type: ignore[arg-type]
    engine.ask("stop")
    gpa = Gpa(probe.time_page_address(0))
    expected = engine.machine.memory.read(gpa, 32)
    assert ctypes.string_at(host_address(engine.monitor, gpa), 32) == expected
    words = engine.ask("human-monitor-command", command_line=f"xp /8xw {gpa:#x}").split()
    found = b"".join(int(word, 16).to_bytes(4, "little") for word in words if word.startswith("0x"))
    assert found == expected
    assert engine.ask("query-memdev")[0]["size"] == RAM_BYTES
    assert get(engine, "/objects/pvclock.ram", "type") == "memory-backend-memfd"


def test_registers_are_those_of_the_vcpus(engine: Served) -> None:
    """Of vCPUs that run, which go on; and of such that are stopped, as KVM has them."""
    running = engine.ask("human-monitor-command", command_line="info registers -a")
    assert re.findall(r"^CPU#(\d)\r$", running, re.MULTILINE) == ["0", "1"]
    wait_until_reading(engine.machine)
    engine.ask("stop")
    for vcpu in engine.machine.vcpus:
        lines = engine.ask("human-monitor-command", command_line="info registers", cpu_index=vcpu.vcpu_id)
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        assert re.findall(r"^RIP=(\w+) RFL=(\w+) ", lines, re.MULTILINE) == [
            (f"{regs['rip']:016x}", f"{regs['rflags']:08x}")
        ]
        kind = rf"^CS ={sregs['cs']['selector']:04x} .* DPL={sregs['cs']['dpl']} CS64 \["
        assert re.search(kind, lines, re.MULTILINE)
        assert f" CR3={sregs['cr3']:016x} " in lines


def test_virtual_memory_is_saved(engine: Served, tmp_path: Path) -> None:
    """By a vCPU's page tables, over pages; what these do not map, or a file that cannot be, is refused."""
    file = tmp_path / "memory"
    engine.ask("stop")
    vcpu = engine.machine.vcpus[1]
    begin = vcpu.get_regs()["rip"] & ~0xFFF
    engine.ask("memsave", val=begin + 0xF00, size=0x200, filename=str(file), cpu_index=1)
    gpas = [vcpu.translate(begin + 0xF00), vcpu.translate(begin + 0x1000)]
    assert None not in gpas
    assert file.read_bytes() == b"".join(engine.machine.memory.read(gpa, 0x100) for gpa in gpas)  # type: ignore[arg-type]
    for val, size in ((0, -1), (-1, 1), (0, RAM_BYTES + 1), (1 << 46, 1)):
        with pytest.raises(QmpFailed, match="Invalid addr"):
            engine.ask("memsave", val=val, size=size, filename=str(file))
    with pytest.raises(QmpFailed, match="expects a CPU number"):
        engine.ask("memsave", val=begin, size=1, filename=str(file), cpu_index=2)
    for name in (str(tmp_path / "none" / "file"), "a\0b"):
        with pytest.raises(QmpFailed, match="Could not open"):
            engine.ask("memsave", val=begin, size=1, filename=name)


JSON_TYPES: Final = {"int": (int,), "string": (str,), "boolean": (bool,), "null": (type(None),), "number": (int, float)}


class Schema:
    """What query-qmp-schema tells, and whether a value is of a type in it."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = {each["name"]: each for each in entries}
        assert len(self.entries) == len(entries)

    def problems(self, value: object, type_name: str, where: str) -> list[str]:
        """What of `value` is not of that type."""
        entry = self.entries[type_name]
        is_one = False
        match entry["meta-type"], value:
            case "builtin", _:
                is_one = type(value) in JSON_TYPES.get(entry["json-type"], (type(value),))
            case "enum", _:
                is_one = value in entry["values"]
            case "alternate", _:
                is_one = any(not self.problems(value, each["type"], where) for each in entry["members"])
            case "array", list():
                parts = [self.problems(each, entry["element-type"], f"{where}[]") for each in value]
                return [problem for part in parts for problem in part]
            case "object", dict():
                return self._problems_of_object(value, entry["members"], where)
        return [] if is_one else [f"{where}: {value!r} is not of type {entry}"]

    def _problems_of_object(self, value: dict[str, object], members: list[dict[str, Any]], where: str) -> list[str]:
        known = {each["name"]: each for each in members}
        problems = [f"{where}.{name} is not in the schema" for name in value if name not in known]
        for name, member in known.items():
            if name in value:
                problems += self.problems(value[name], member["type"], f"{where}.{name}")
            elif "default" not in member:
                problems.append(f"{where}.{name} is missing")
        return problems


def test_the_schema_is_true(engine: Served) -> None:
    """Each command is in it; each query's answer and each event is of the type that it tells; no type is missing."""
    schema = Schema(engine.ask("query-qmp-schema"))
    commands = {name for name, each in schema.entries.items() if each["meta-type"] == "command"}
    assert commands == {each["name"] for each in engine.ask("query-commands")}
    arguments: dict[str, dict[str, str]] = {
        "qom-list": {"path": CLOCK},
        "qom-list-properties": {"typename": "pvclock"},
        "device-list-properties": {"typename": "isa-serial"},
        "qom-list-types": {},
        "human-monitor-command": {"command_line": "info status"},
    }
    asked = {name for name in commands if name.startswith("query-")} | {"x-pvclock-query"} | set(arguments)
    for name in sorted(asked):
        answer = engine.ask(name, **arguments.get(name, {}))
        assert not schema.problems(answer, schema.entries[name]["ret-type"], name)
    engine.ask("x-pvclock-follow", reference="raw")
    engine.machine.clock.tick()  # type: ignore[union-attr]  # the engine's
    answer = engine.ask("x-pvclock-query")
    assert answer["steering"] is not None
    assert not schema.problems(answer, schema.entries["x-pvclock-query"]["ret-type"], "steering")
    assert all(vcpu["page"] for vcpu in answer["vcpus"][:2])
    for name in ("stop", "cont", "system_reset"):
        assert not schema.problems(engine.ask(name), schema.entries[name]["ret-type"], name)


def test_events_are_of_the_schema(tmp_path: Path) -> None:
    """Each that a machine sends for what is done to it, with its data."""
    path = tmp_path / "qmp.sock"
    wanted = {"STOP", "RESUME", "RESET", "SHUTDOWN", "X_PVCLOCK_CHANGE"}
    told: list[Any] = []
    with made(None) as machine, serve(machine, path, list), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(HANG_S)
        client.connect(str(path))
        for name in ("qmp_capabilities", "query-qmp-schema", "stop", "cont", "system_reset", "quit"):
            client.sendall(json.dumps({"execute": name, "id": name}).encode())
        with client.makefile("rb") as file:
            while not wanted <= {each.get("event") for each in told}:
                told.append(json.loads(file.readline()))
    (entries,) = [each["return"] for each in told if each.get("id") == "query-qmp-schema"]
    schema = Schema(entries)
    for each in (each for each in told if "event" in each):
        assert not schema.problems(each.get("data", {}), schema.entries[each["event"]]["arg-type"], each["event"])


def test_arguments_are_those_of_the_schema(engine: Served) -> None:
    """Of each command: a required one that is missing, one of another type, one that is unknown are refused by name."""
    schema = Schema(engine.ask("query-qmp-schema"))
    for name, entry in schema.entries.items():
        if entry["meta-type"] != "command" or name == "qmp_capabilities":
            continue
        for member in schema.entries[entry["arg-type"]]["members"]:
            if "default" not in member:
                with pytest.raises(QmpFailed, match=r"Parameter '.*' is missing"):
                    engine.monitor.execute(name, {})
            if member["type"] != "any":
                with pytest.raises(QmpFailed, match=rf"'{member['name']}'|is missing"):
                    engine.monitor.execute(name, {member["name"]: {"no": "such thing"}})
        with pytest.raises(QmpFailed, match=r"is missing|'nobody' is unexpected"):
            engine.monitor.execute(name, {"nobody": 1})


def test_what_its_guest_cannot_be_asked(engine: Served) -> None:
    """Where there is no power button none is pressed, and the answer says what can be done."""
    with pytest.raises(QmpFailed, match="no power button; quit ends it"):
        engine.ask("system_powerdown")
    assert engine.ask("query-status")["running"]


def test_a_power_button_is_pressed(tmp_path: Path) -> None:
    """A PC's guest reads it, releases it and ends; the client is told, and the next one is told that it has ended."""
    path = tmp_path / "qmp.sock"
    with (
        Machine(ASKED_TO_END, platform="pc") as machine,
        serve(machine, path, list),
        a_client(path) as monitor,
    ):
        machine.start()
        monitor.execute("system_powerdown")
        assert machine.wait(HANG_S) == RELEASED
        assert "POWERDOWN" in [event.name for event in monitor.take_events()]
        with pytest.raises(QmpFailed, match="Resetting the Virtual Machine is required"):
            monitor.execute("system_powerdown")


def test_a_power_button_is_as_wide_as_it_says() -> None:
    """Its line is high while it is pressed; reads of any width, and writes of anything but 1, leave it so."""
    levels: list[bool] = []
    button = PowerButton(levels.append)
    button.press()
    for offset, length, expected in (
        (0, 1, b"\1"),
        (0, 2, b"\1\0"),
        (0, 4, b"\1\0\0\0"),
        (1, 1, b"\0"),
        (1, 4, bytes(4)),
    ):
        assert button.read(offset, length) == expected
    for offset, data in ((1, b"\1"), (0, b"\0\1"), (0, b"\2")):
        button.write(offset, data)
    assert levels == [True]
    button.write(0, b"\1\0")
    assert (levels, button.read(0, 2)) == ([True, False], bytes(2))
    button.press()
    button.reset()
    assert levels[2:] == [True, False]


def test_two_vms_of_one_process() -> None:
    """Each has its own RAM, and says where that is."""
    with open_kvm() as kvm, Machine(LOOP, kvm=kvm) as first, Machine(LOOP, kvm=kvm) as second:
        assert first.memory.host_address(0) + (16 << 20) - 1 == first.memory.host_address((16 << 20) - 1)
        assert first.memory.host_address(0) != second.memory.host_address(0)
