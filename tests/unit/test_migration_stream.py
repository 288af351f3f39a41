"""The clock in a QEMU migration stream: found whatever guest RAM holds, read, converted, and replaced."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pvclock import GuestClock, GuestMemory, PvclockError, SimulatedBackend, StateFileError
from pvclock.commands import main
from pvclock.state import clock_state
from qemu_glue.migration import state_format
from qemu_glue.migration.kvmclock_section import FoundBy
from qemu_glue.migration.saved_clock import QemuClock
from tests.saved_states import TYPICAL
from tests.unit.saved_streams import (
    CLOCK_NS,
    DESCRIPTION_AT,
    MICROVM,
    RAM_PAGE_AT,
    SECTION,
    SECTION_AT,
    described,
    forged,
    in_libvirts_image,
    overwritten,
    saved,
    with_description,
)

pytestmark = pytest.mark.row("E7")

HOUR_NS = 3600 * 10**9
TSC_HZ = 2_596_154_000
MUTATED, MUTATED_LONG = 500, 10_000


def read(folder: Path, stream: bytes) -> QemuClock:
    """The clock in a file with that content."""
    return state_format.read(str(written(folder, stream))).clock


def written(folder: Path, stream: bytes, name: str = "vm.stream") -> Path:
    """A file with that content."""
    path = folder / name
    path.write_bytes(stream)
    return path


def convert(path: Path, *arguments: str | Path) -> int:
    """`pvclock state convert`; its exit status."""
    return main(["state", "convert", str(path), *map(str, arguments)])


# Read


def test_a_stream_of_qemus(tmp_path: Path) -> None:
    """Machine, guest time, its mark and each vCPU's registers are read where QEMU 7.2 wrote them."""
    clock = read(tmp_path, MICROVM)
    assert (clock.machine, clock.clock_ns, clock.is_reliable, clock.is_taken) == ("microvm", CLOCK_NS, True, True)
    assert clock.section == (SECTION_AT, SECTION_AT + 22, SECTION_AT + 62, FoundBy.DESCRIPTION)
    assert [(vcpu.tsc, vcpu.tsc_khz, vcpu.system_time_msr, vcpu.wall_clock_msr) for vcpu in clock.vcpus] == [
        (69_231_652_537_047, 2_596_154, 0x201001, 0x2000C0),
        (69_231_652_620_650, 2_596_154, 0x201041, 0x2000C0),
    ]


@pytest.mark.parametrize(
    ("machine", "found_by", "clock_ns", "tsc_khz"),
    [
        ("pc-i440fx-2.8", FoundBy.DESCRIPTION, 70_777_119, [2_596_154] * 2),
        ("pc-i440fx-2.3", FoundBy.DESCRIPTION, 197_461_371, [None] * 2),
        ("pc-i440fx-2.2", FoundBy.SEARCH, 41_879_411, []),
    ],
)
def test_streams_of_older_machine_types(
    machine: str, found_by: FoundBy, clock_ns: int, tsc_khz: list[int | None], tmp_path: Path
) -> None:
    """Those do not say whether the clock is reliable; 2.3 has no footers, 2.2 no description, so it is searched."""
    clock = read(tmp_path, saved(machine))
    assert (clock.clock_ns, clock.is_reliable, clock.section.found_by) == (clock_ns, None, found_by)
    assert [vcpu.tsc_khz for vcpu in clock.vcpus] == tsc_khz


def test_an_image_of_libvirts(tmp_path: Path) -> None:
    """What `virsh save` wrote is read behind its header, unless it is compressed, which is said with what to do."""
    clock = read(tmp_path, in_libvirts_image(MICROVM))
    assert (clock.machine, clock.clock_ns, len(clock.vcpus)) == ("microvm", CLOCK_NS, 2)
    with pytest.raises(StateFileError, match="save_image_format"):
        read(tmp_path, in_libvirts_image(MICROVM, compression=1))


def test_a_vcpus_optional_registers(tmp_path: Path) -> None:
    """What QEMU writes only if it is not the default is read from its subsection, behind the one before it."""
    name = b"cpu/msr_tsc_adjust"
    subsection = b"\x05" + bytes((len(name),)) + name + struct.pack(">IQ", 1, 5000)
    at = MICROVM.index(b"\x7e", MICROVM.index(b"cpu/tsc_khz") + 11 + 4 + 8)

    def with_adjust(description: dict[str, Any]) -> None:
        cpu = next(device for device in description["devices"] if device["name"] == "cpu")
        fields = [{"name": "env.tsc_adjust", "type": "uint64", "size": 8}]
        cpu["subsections"].append({"vmsd_name": name.decode(), "version": 1, "fields": fields})

    stream = described(with_adjust)
    clock = read(tmp_path, stream[:at] + subsection + stream[at:])
    assert [vcpu.tsc_adjust for vcpu in clock.vcpus] == [5000, 0]


# A guest's RAM may hold anything


@pytest.mark.parametrize("at", [RAM_PAGE_AT, 0x4000, 140_000])
def test_what_a_guest_has_in_its_ram_is_not_looked_at(at: int, tmp_path: Path) -> None:
    """A section in a page of RAM, byte by byte like QEMU's, and an end and a description behind it change nothing."""
    fake = forged(7 * HOUR_NS) + b"\0\x06" + struct.pack(">I", 2) + b"{}"
    clock = read(tmp_path, overwritten(MICROVM, at, fake))
    assert (clock.clock_ns, clock.section.begin) == (CLOCK_NS, SECTION_AT)


def test_two_sections_and_nothing_that_tells_which(tmp_path: Path) -> None:
    """Without a description a second one is no guess: the error has both places."""
    old = saved("pc-i440fx-2.2")
    assert read(tmp_path, old).clock_ns == 41_879_411
    at = old.index(b"\x04\0\0\0\0\x05timer")
    stream = old[:at] + forged(7 * HOUR_NS) + bytes(4096) + old[at:]
    with pytest.raises(StateFileError, match="more than one section") as refused:
        read(tmp_path, stream)
    assert str(at) in refused.value.found


def test_a_description_that_leads_astray(tmp_path: Path) -> None:
    """Where one device is not as described, the section is searched for, and a second one in RAM is told, too."""

    def change(description: dict[str, Any]) -> None:
        description["devices"][-2]["fields"][0]["size"] += 1

    stream = described(change)
    clock = read(tmp_path, stream)
    assert (clock.clock_ns, clock.section.found_by, clock.vcpus) == (CLOCK_NS, FoundBy.SEARCH, ())
    assert "i8254 0 is not where" in clock.why_no_vcpus
    with pytest.raises(StateFileError, match="more than one section"):
        read(tmp_path, overwritten(stream, RAM_PAGE_AT, forged(1)))


def test_a_fake_needs_all_of_a_section(tmp_path: Path) -> None:
    """The search takes none with another version, footer or mark, nor one that no section or end follows."""
    old = saved("pc-i440fx-2.2")
    at = old.index(b"\x04\0\0\0\0\x05timer")
    for wrong in (
        forged(1).replace(b"kvmclock\0\0\0\0\0\0\0\x01", b"kvmclock\0\0\0\0\0\0\0\x02"),
        forged(1).replace(b"\x7e\0\0\0\x0e", b"\x7e\0\0\0\x0d"),
        forged(1).replace(b"\x01\x7e", b"\x02\x7e"),
        forged(1).replace(b"\x04\0\0\0\x0f\x08acpi-ged", b"\x09\0\0\0\x0f\x08acpi-ged"),
    ):
        assert wrong != forged(1)
        assert read(tmp_path, old[:at] + wrong + old[at:]).clock_ns == 41_879_411


def test_a_fake_hides_no_section(tmp_path: Path) -> None:
    """One that takes the beginning of QEMU's for what follows it is found, and so is QEMU's: neither is a guess."""
    old = saved("pc-i440fx-2.2")
    at = old.index(b"\x08kvmclock\0\0\0\0\0\0\0\x01") - 5
    fake = old[at : at + 5 + 17 + 8]
    with pytest.raises(StateFileError, match=f"at {at} and {at + len(fake)}"):
        read(tmp_path, old[:at] + fake + old[at:])


def test_a_ram_full_of_almost_sections_costs_no_more(tmp_path: Path) -> None:
    """A guest that fills its RAM with what a section begins with does not have each one looked at by itself."""
    almost = SECTION[: SECTION.index(b"kvmclock") + 16 + 8] + b"\x09"
    old, count, calls = saved("pc-i440fx-2.2"), 40_000, 0
    path = written(tmp_path, old[:40] + almost * count + old[40:])

    def count_call(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count_call)
    try:
        clock = state_format.read(str(path)).clock
    finally:
        sys.setprofile(None)
    assert clock.clock_ns == 41_879_411
    assert calls < count


def test_a_vm_without_kvmclock(tmp_path: Path) -> None:
    """Whatever is in RAM, a stream that describes its devices and no kvmclock among them has none."""

    def change(description: dict[str, Any]) -> None:
        for device in description["devices"]:
            device["name"] = device["name"].replace("kvmclock", "no_clock")

    stream = described(change).replace(SECTION, SECTION.replace(b"\x08kvmclock", b"\x08no_clock"))
    with pytest.raises(StateFileError, match="no kvmclock among the devices"):
        read(tmp_path, overwritten(stream, RAM_PAGE_AT, forged(1)))


# Hostile and damaged files


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda it: it.update(devices={}), "description.devices"),
        (lambda it: it.pop("devices"), "description.devices"),
        (lambda it: it["devices"].append(7), "devices[17]"),
        (lambda it: it["devices"][3].update(instance_id=-1), "devices[3].instance_id"),
        (lambda it: it["devices"][3].update(name="x" * 256), "devices[3].name"),
        (lambda it: it["devices"][3]["fields"][0].update(size=True), "devices[3].fields[0].size"),
        (lambda it: it["devices"][3]["fields"][0].update(array_len=2**63), "devices[3].fields[0].array_len"),
        (lambda it: it["devices"][11].update(version=2) or it["devices"][11]["fields"].clear(), None),
    ],
    ids=["object", "missing", "no device", "instance", "name", "bool", "length", "no fields"],
)
def test_descriptions_that_are_wrong(
    change: Callable[[dict[str, Any]], object], field: str | None, tmp_path: Path
) -> None:
    """The error names the member; a well-formed one that is not of this stream makes it be searched."""
    if field is None:
        assert read(tmp_path, described(change)).section.found_by is FoundBy.SEARCH
        return
    with pytest.raises(StateFileError) as refused:
        read(tmp_path, described(change))
    assert refused.value.field == field


@pytest.mark.parametrize(
    "document",
    [
        b"[" * 100_000,
        b'{"devices": [' + b'{"subsections": [' * 300 + b"]}" * 300 + b"]}",
        b'{"devices": [{"name": "a", "instance_id": ' + b"9" * 5000 + b', "fields": []}]}',
        b'{"devices": [], "devices": []}' + b" " * 100,
        b"\xff{}",
        b"null",
    ],
    ids=["deep", "subsections", "digits", "repeated", "no UTF-8", "null"],
)
def test_hostile_descriptions(document: bytes, tmp_path: Path) -> None:
    """JSON that is deep, long or none at all is an error of the description, or of what it lacks."""
    with pytest.raises(StateFileError) as refused:
        read(tmp_path, with_description(document))
    assert refused.value.field.startswith(("description", "devices[0]", "kvmclock"))


def test_subsections_within_each_other_are_bounded(tmp_path: Path) -> None:
    """A hundred of them, each within the one before, are refused for their number."""
    deepest: dict[str, Any] = {"vmsd_name": "x", "version": 1, "fields": []}
    for _ in range(100):
        deepest = {**deepest, "subsections": [deepest]}
    with pytest.raises(StateFileError, match="up to 16 of them"):
        read(tmp_path, described(lambda it: it["devices"][0].update(subsections=[deepest])))


def test_damaged_streams(tmp_path: Path) -> None:
    """Five hundred of them: each is read, or refused with an error of ours, in bounded memory."""
    damage_many(tmp_path, MUTATED)


@pytest.mark.long
def test_ten_thousand_damaged_streams(tmp_path: Path) -> None:
    """The same of ten thousand."""
    damage_many(tmp_path, MUTATED_LONG)


def damage_many(folder: Path, count: int) -> None:
    """Damage the devices' part of a stream in `count` ways; bounded memory, no other error, and both ends are met."""
    chance = random.Random(19)  # noqa: S311  # the same each time
    sound = MICROVM[:40] + MICROVM[143_787:]  # without RAM
    path = written(folder, sound)
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    for _ in range(count):
        path.write_bytes(damaged(sound, chance))
        try:
            state_format.read(str(path))
            outcomes["read"] += 1
        except PvclockError:
            outcomes["refused"] += 1
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(outcomes.values()) == count
    assert min(outcomes.values()) > count // 100
    assert peak_bytes < 8 << 20


def damaged(stream: bytes, chance: random.Random) -> bytes:
    """The stream with a few bytes changed, left out or put in, or cut off."""
    changed = bytearray(stream)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed))
        match chance.randrange(4):
            case 0:
                changed[at] = chance.randrange(256)
            case 1:
                changed[at : at + chance.randrange(1, 64)] = b""
            case 2:
                changed[at:at] = chance.choice((SECTION, forged(1), chance.randbytes(9)))
            case 3:
                del changed[max(at, 8) :]
    return bytes(changed)


@pytest.mark.parametrize("machine", ["microvm-7.2", "pc-i440fx-2.2"])
def test_streams_of_gigabytes(machine: str, tmp_path: Path) -> None:
    """A stream with holes for RAM is read in little memory, by its description or by a search."""
    stream = saved(machine)
    hole = (8 << 30) if machine == "microvm-7.2" else (64 << 20)
    path = tmp_path / "large.stream"
    with path.open("wb") as file:
        file.write(stream[:8])
        file.seek(hole)
        file.write(stream[8:])
    tracemalloc.start()
    clock = state_format.read(str(path)).clock
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert clock.section.begin > hole
    assert peak_bytes < 40 << 20


def test_what_is_no_stream(tmp_path: Path) -> None:
    """Another version, a stream that was cut off, a folder and a FIFO are told for what they are."""
    with pytest.raises(StateFileError, match=r"stream\.version: found 2"):
        read(tmp_path, overwritten(MICROVM, 4, b"\0\0\0\x02"))
    with pytest.raises(StateFileError, match="no kvmclock section"):
        read(tmp_path, MICROVM[:SECTION_AT])
    with pytest.raises(StateFileError, match="virsh save` did not finish"):
        read(tmp_path, in_libvirts_image(MICROVM).replace(b"LibvirtQemudSave", b"LibvirtQemudPart"))
    with pytest.raises(StateFileError, match="a directory"):
        state_format.read(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StateFileError, match="a FIFO"):
        state_format.read(str(tmp_path / "fifo"))


# The command


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        (gzip.compress(MICROVM), "what gzip has compressed", "decompress it first, by gzip"),
        (lzma.compress(MICROVM), "what xz has compressed", "decompress it first, by xz"),
        (bytes.fromhex("28b52ffd") + MICROVM, "what zstd has compressed", "decompress it first, by zstd"),
        (b"QFI\xfb\0\0\0\3" + bytes(64), "a disk image of QEMU's", "`migrate` it to a file"),
    ],
    ids=["gzip", "xz", "zstd", "qcow2"],
)
def test_what_is_taken_for_a_stream(
    content: bytes, what: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A compressed stream and a disk image are told for what they are, with what to do."""
    assert main(["state", "check", str(written(tmp_path, content))]) == 1
    said = capsys.readouterr().out
    assert what in said
    assert remedy in said


def test_show_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`state show` has each field in units with its meaning, `state check` a line, and notes of what QEMU will do."""
    path = written(tmp_path, MICROVM)
    old = written(tmp_path, saved("pc-i440fx-2.2"), "old.stream")
    assert main(["state", "show", str(path)]) == 0
    shown = capsys.readouterr().out
    for text in ("0.266482777 s", "clock_is_reliable", "cpu[1].tsc", "2596.154000 MHz", "KVM_SET_CLOCK", "NOT SAVED"):
        assert text in shown
    assert main(["state", "check", str(path), str(old)]) == 0
    first, second, *notes = capsys.readouterr().out.splitlines()
    assert first == f"{path}: valid: QEMU stream of microvm, 2 vCPUs, guest time 0.266482777 s, reliable"
    assert second == f"{old}: valid: QEMU stream, guest time 0.041879411 s, not reliable"
    assert ["vCPU 0's page" in notes[0], "found by a search" in notes[1], "vCPUs are not read" in notes[2]] == [
        True
    ] * 3
    assert main(["state", "check", str(written(tmp_path, MICROVM[:-1]))]) == 0
    assert "found by a search" in capsys.readouterr().out
    assert main(["state", "check", "--json", str(written(tmp_path, b"QEVM"))]) == 1
    (report,) = json.loads(capsys.readouterr().out)["result"]["files"]
    assert (report["field"], report["ok"]) == ("stream.version", False)


def test_an_unreliable_clock_is_noted(tmp_path: Path) -> None:
    """QEMU takes the page's time where the byte is 0, unless vCPU 0 has no page."""
    unreliable = overwritten(MICROVM, SECTION_AT + 62, b"\0")
    assert not read(tmp_path, unreliable).is_taken
    stream = unreliable.replace(struct.pack(">QQ", 0x201001, 0x2000C0), struct.pack(">QQ", 0x201000, 0x2000C0))
    assert read(tmp_path, stream).is_taken
    with pytest.raises(StateFileError, match="found 0x2; supported: 0 or 1"):
        read(tmp_path, overwritten(MICROVM, SECTION_AT + 62, b"\x02"))


# Replaced


def test_an_hour_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`state convert --skip` writes a copy of the stream in which the eight bytes differ, and no other."""
    path, later = written(tmp_path, MICROVM), tmp_path / "later.stream"
    assert convert(path, "--to", "qemu", "--skip", "3600s", "-o", later) == 0
    expected = overwritten(MICROVM, SECTION_AT + 22, struct.pack(">Q", CLOCK_NS + HOUR_NS))
    assert later.read_bytes() == expected
    assert path.read_bytes() == MICROVM
    assert "guest time 3600.266482777 s, reliable" in capsys.readouterr().out


def test_the_reliable_byte_is_set(tmp_path: Path) -> None:
    """A clock that QEMU would not have taken becomes one that it takes, in the file itself if that is asked for."""
    path = written(tmp_path, in_libvirts_image(overwritten(MICROVM, SECTION_AT + 62, b"\0")))
    assert convert(path, "--to", "qemu", "-o", path) == 0
    assert path.read_bytes() == in_libvirts_image(MICROVM)


def test_a_clock_of_ours_in_qemus_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A clock's state goes into a stream by whole ns, and what the stream cannot hold of it is told."""
    path, state, out = written(tmp_path, MICROVM), tmp_path / "clock.json", tmp_path / "out.stream"
    clock_state.write(state, TYPICAL)
    assert convert(state, "--to", "qemu", "--into", path, "-o", out) == 0
    assert state_format.read(str(out)).clock.clock_ns == 86_400_000_000_001 // 3
    said = capsys.readouterr().out
    for text in ("dilation of 1/10", "slewed in", "reference", "policy advance", "time of day"):
        assert f"not in a stream: {text}" in said or text in said
    assert said.count("not in a stream") == 5


def test_what_a_stream_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A time before the stream's, a stream with no place for the mark, no stream at all: refused, nothing written."""
    path, state, out = written(tmp_path, MICROVM), tmp_path / "clock.json", tmp_path / "out.stream"
    assert convert(path, "--to", "clock", "-o", state) == 0
    early = clock_state.read(state)
    clock_state.write(state, early._replace(timeline=early.timeline._replace(guest_ns=early.timeline.guest_ns - 1)))
    old = written(tmp_path, saved("pc-i440fx-2.8"), "old.stream")
    capsys.readouterr()
    for arguments, why in (
        ((state, "--to", "qemu", "--into", path, "-o", out), "go back by 0.000000001 s"),
        ((old, "--to", "qemu", "--skip", "1s", "-o", out), "machine type from 2.9 on"),
        ((state, "--to", "qemu", "-o", out), "not made anew"),
        ((path, "--to", "clock", "--into", path, "-o", out), "leave out --into"),
        ((path, "--to", "clock"), "convert needs --output"),
        ((path, "-o", out), "convert needs --to"),
        ((path, path, "--to", "clock", "-o", out), "takes one FILE; 2 were given"),
        ((path, "--to", "qemu", "--skip", "584y", "-o", out), "not a length of time"),
        ((path, "--to", "qemu", "--skip", "18446744073.5s", "-o", out), "below 2^64"),
        ((state, "--to", "clock", "--features", "1", "-o", out), "holds all that it needs"),
        ((path, "--to", "clock", "--guest-tsc", "1", "-o", out), "leave out --guest-tsc"),
        ((saved_old_type(tmp_path), "--to", "clock", "-o", out), "give --tsc-hz"),
        ((path, "--to", "clock", "--saved-at", "noon", "-o", out), "is not a time"),
    ):
        assert convert(*arguments) == 2
        assert why in capsys.readouterr().err
        assert not out.exists()
    assert main(["state", "show", str(path), "--to", "clock"]) == 2
    assert "show takes none of convert's options" in capsys.readouterr().err


def saved_old_type(folder: Path) -> Path:
    """A stream that does not say the TSC's frequency."""
    return written(folder, saved("pc-i440fx-2.3"), "2.3.stream")


def test_a_patch_over_the_edge_of_a_chunk(tmp_path: Path) -> None:
    """The clock is replaced wherever it lies in a large file."""
    for shift in (1, 4, 8):
        filler = bytes((1 << 20) - SECTION_AT - 22 - 9 + shift)
        path = written(tmp_path, MICROVM[:40] + filler + MICROVM[40:])
        assert convert(path, "--to", "qemu", "--skip", "1s", "-o", tmp_path / "out") == 0
        at = SECTION_AT + 22 + len(filler)
        expected = overwritten(path.read_bytes(), at, struct.pack(">Q", CLOCK_NS + 10**9))
        assert (tmp_path / "out").read_bytes() == expected


def test_a_section_on_the_edge_of_a_chunk_is_found(tmp_path: Path) -> None:
    """A search finds the section wherever it lies in a large file, once."""
    old = saved("pc-i440fx-2.2")
    section_at = old.index(b"\x08kvmclock\0\0\0\0\0\0\0\x01") - 5
    for shift in (0, 6, 12, 24):
        filler = bytes((1 << 20) - section_at - shift)
        clock = read(tmp_path, old[:8] + filler + old[8:])
        assert (clock.clock_ns, clock.section.begin) == (41_879_411, (1 << 20) - shift)


# As a clock's state


def test_a_clock_goes_on_from_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Restored by pvclock, guest time, TSC and pages are the stream's, and the vCPUs agree, as KVM makes them."""
    path, out = written(tmp_path, MICROVM), tmp_path / "clock.json"
    assert convert(path, "--to", "clock", "--saved-at", "2026-11-28T02:16:00Z", "-o", out) == 0
    said = capsys.readouterr().out
    assert "features 0x1000009" in said
    assert "--saved-at" not in said
    state = clock_state.read(out)
    assert state.host.real_ns == 1_795_832_160 * 10**9
    backend = SimulatedBackend(TSC_HZ)
    clock = GuestClock.restore(state, GuestMemory(bytearray(0x210000)), backend=backend)
    clock.resume()
    assert clock.read(0) - CLOCK_NS in (0, 1)
    assert [clock.guest_tsc(vcpu, backend.tsc) for vcpu in range(2)] == [69_231_652_537_047] * 2
    pages = [clock.page(vcpu) for vcpu in range(2)]
    assert [page is not None and page.flags & 1 for page in pages] == [1, 1]
    assert clock.read_msr(1, 0x4B564D01) == 0x201041


def test_vcpus_that_do_not_agree_stay_so(tmp_path: Path) -> None:
    """A vCPU's TSC that is a second or more off vCPU 0's is kept, as KVM does, and what is given is taken."""
    other = 69_231_652_537_047 - TSC_HZ
    stream = MICROVM.replace(struct.pack(">Q", 69_231_652_620_650), struct.pack(">Q", other))
    path, out = written(tmp_path, stream), tmp_path / "clock.json"
    assert convert(path, "--to", "clock", "--features", "9", "--tsc-hz", "3000000000", "-o", out) == 0
    state = clock_state.read(out)
    assert [vcpu.guest_tsc for vcpu in state.vcpus] == [69_231_652_537_047, 69_231_652_537_047]
    assert (state.provider.config["features"], state.guest_tsc_hz) == (9, 3_000_000_000)
    assert convert(path, "--to", "clock", "-o", out) == 0
    assert [vcpu.guest_tsc for vcpu in clock_state.read(out).vcpus] == [69_231_652_537_047, other]


def test_a_guests_steal_time_goes_with_it(tmp_path: Path) -> None:
    """A steal-time record that the guest has enabled is in the clock's state, and its feature is offered."""
    name = b"cpu/steal_time_msr"
    subsection = b"\x05" + bytes((len(name),)) + name + struct.pack(">IQ", 1, 0x3001)
    at = MICROVM.index(b"\x7e", MICROVM.index(b"cpu/tsc_khz") + 11 + 4 + 8)

    def change(description: dict[str, Any]) -> None:
        cpu = next(device for device in description["devices"] if device["name"] == "cpu")
        fields = [{"name": "env.steal_time_msr", "type": "uint64", "size": 8}]
        cpu["subsections"].append({"vmsd_name": name.decode(), "version": 1, "fields": fields})

    stream = described(change)
    path, out = written(tmp_path, stream[:at] + subsection + stream[at:]), tmp_path / "clock.json"
    assert convert(path, "--to", "clock", "-o", out) == 0
    state = clock_state.read(out)
    assert (state.provider.config["features"], state.provider.msrs["steal_time"]) == (0x1000029, (0x3001, 0))


def test_the_section_is_as_in_qemus_source() -> None:
    """Header, u64, subsection and footer of the kvmclock section stand in the stream byte by byte, and once."""
    assert MICROVM.count(SECTION) == 1
    assert MICROVM[DESCRIPTION_AT - 6] == 0
