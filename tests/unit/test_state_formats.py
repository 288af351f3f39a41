"""The formats of `pvclock state` beside its own: VirtualBox's saved unit, and how formats are found."""

from __future__ import annotations

import json
import struct
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pvclock import GuestClock, GuestMemory, SimulatedBackend, StateFileError
from pvclock.commands import main, state_clock, state_formats, state_virtualbox
from pvclock.commands.state_formats import Given, StateFormat, format_of, named_format
from pvclock.state import clock_state
from qemu_glue.migration import state_format as qemu
from tests.saved_states import HYPERV, TYPICAL
from tests.unit.saved_streams import MICROVM

pytestmark = pytest.mark.row("E7")

HZ = 10**9
VCPUS = ((0x2001, 5 * 10**6, 7 * 10**9, 0x2000, 8, 2), (0x3000, 0, 0, 0, 0, 0))
UNIT = (
    struct.pack("<III", 3, 0, 1)
    + b"".join(struct.pack("<QQQQIB", *vcpu) for vcpu in VCPUS)
    + struct.pack("<QI", 0x4000, 0x1000009)
)
"""As VirtualBox saves it: vCPU 0 has a page, in which guest time was 7 s at TSC 5,000,000."""
GIVEN = ("--tsc-hz", str(HZ), "--guest-tsc", str(5 * 10**6 + 250), "--saved-at", "2026-11-28T00:00:00+01:00")


def unit(folder: Path, content: bytes = UNIT) -> str:
    """A file with a unit."""
    path = folder / "vm.unit"
    path.write_bytes(content)
    return str(path)


def test_formats_are_found_by_what_files_begin_with(tmp_path: Path) -> None:
    """JSON, a stream and a unit are told apart; anything else is taken for a clock's own state."""
    stream = tmp_path / "vm.stream"
    stream.write_bytes(MICROVM)
    text = tmp_path / "text"
    text.write_text("hello")
    own = str(tmp_path / "clock.json")
    clock_state.write(own, TYPICAL)
    files = [own, str(stream), unit(tmp_path), str(text)]
    assert [format_of(file) for file in files] == ["clock", "qemu", "virtualbox", "clock"]


def test_each_format_has_the_shape_of_one() -> None:
    """The modules behind the entry points are formats, by the types, too."""
    modules: dict[str, StateFormat] = {"clock": state_clock, "qemu": qemu, "virtualbox": state_virtualbox}
    assert {name: named_format(name) for name in state_formats.format_names()} == modules


def test_a_format_of_another_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package adds a format by an entry point, and no other code knows of it."""
    point = EntryPoint("units", "pvclock.commands.state_virtualbox", state_formats.GROUP)
    monkeypatch.setattr(state_formats, "entry_points", lambda **_: [point])
    assert (state_formats.format_names(), format_of(unit(tmp_path))) == (["units"], "units")


def test_show_and_check_a_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each field has its meaning, times are in seconds, and that a unit does not tell the time is said."""
    assert main(["state", "show", unit(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for text in ("vcpus[0].ns", "7.000000000 s", "vcpus[1].gpa", "0x1000009", "tsc_timestamp", "NOT SAVED", "KVM"):
        assert text in shown
    assert main(["state", "check", "--json", unit(tmp_path)]) == 0
    (report,) = json.loads(capsys.readouterr().out)["result"]["files"]
    assert report["summary"] == "valid: VirtualBox's unit of provider KVM, version 0, 2 vCPUs"
    assert report["notes"] == ["the unit does not say what time it was: VirtualBox saves that apart"]
    for wrong, field in ((UNIT[:-1], "unit.kvm"), (UNIT[:8], "unit.kvm"), (UNIT + bytes(1 << 20), "file")):
        assert main(["state", "check", "--json", unit(tmp_path, wrong)]) == 1
        (report,) = json.loads(capsys.readouterr().out)["result"]["files"]
        assert report["field"] == field


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_unit_of_hyperv(version: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its MSRs are shown, of as many vCPUs as its length tells, whatever its version; a clock is not made of it."""
    part = hyperv_part(version, vcpus=3)
    path = unit(tmp_path, struct.pack("<II", 2, 0) + part)
    assert main(["state", "show", path]) == 0
    shown = capsys.readouterr().out
    assert "HV_X64_MSR_REFERENCE_TSC" in shown
    assert ("vcpus[2].message_page" in shown, "vcpus[3]" in shown) == (version > 1, False)
    assert main(["state", "convert", path, "--to", "clock", "-o", str(tmp_path / "out"), *GIVEN]) == 2
    assert "HyperV has no line of time" in capsys.readouterr().err


def hyperv_part(version: int, vcpus: int) -> bytes:
    """Hyper-V's part of a unit, which VirtualBox saves by that version."""
    names = (b"Hyper-V hypercall page", b"Hyper-V TSC page")
    regions = b"".join(
        struct.pack("<BBIQI", number, 0, 4096, 2**64 - 1, len(name)) + name for number, name in enumerate(names)
    )
    first = struct.pack("<I3Q6I", version, 0, 0, 0, *range(6)) + regions + struct.pack("<I", 7)
    if version == 1:
        return first
    debug = struct.pack("<4Q3I", 0, 0, 0, 0, 0, 0, 0) + (bytes(4) if version == 4 else b"")
    sints = 16 if version > 2 else 1
    return first + debug + struct.pack(f"<{1 + sints}Q", 0x5001, *[1 << 16] * sints) * vcpus + b"\xff"


def test_a_clock_of_a_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page's line gives guest time at the TSC that is given, and a clock restored from it goes on from there."""
    out = tmp_path / "clock.json"
    assert main(["state", "convert", unit(tmp_path), "--to", "clock", "-o", str(out), *GIVEN]) == 0
    assert "assumed" in capsys.readouterr().out
    state = clock_state.read(out)
    assert state.timeline.guest_ns == 7 * 10**9 + 250
    assert state.host.real_ns == 1_795_820_400 * 10**9
    backend = SimulatedBackend(HZ)
    clock = GuestClock.restore(state, GuestMemory(bytearray(0x8000)), backend=backend)
    clock.resume()
    assert clock.read(0) - (7 * 10**9 + 250) in (0, 1)
    assert (clock.read_msr(0, 0x4B564D01), clock.read_msr(1, 0x4B564D01)) == (0x2001, 0x3000)
    assert (clock.guest_tsc(0, backend.tsc), clock.page(1)) == (5 * 10**6 + 250, None)


def test_a_unit_of_a_clock(tmp_path: Path) -> None:
    """A clock with KVM's interface becomes a unit whose lines go through its instant, and that unit the same clock."""
    state, saved, again = (tmp_path / name for name in ("clock.json", "vm.unit", "again.json"))
    clock_state.write(state, TYPICAL)
    assert main(["state", "convert", str(state), "--to", "virtualbox", "-o", str(saved)]) == 0
    unit_part = state_virtualbox.read(str(saved)).as_json()
    assert (unit_part["vcpus[0].tsc"], unit_part["vcpus[0].ns"]) == (654_321_012_345, 28_800_000_000_000)
    given = Given(tsc_hz=HZ, guest_tsc=654_321_012_345, saved_ns=0)
    clock, _ = state_virtualbox.read(str(saved)).clock_state(given)
    clock_state.write(again, clock)
    assert clock.provider.msrs == TYPICAL.provider.msrs
    assert int(clock.timeline.guest_ns) == int(TYPICAL.timeline.guest_ns)
    assert [vcpu.time_page_gpa for vcpu in clock.vcpus] == [0x2000, 0x3000]


def test_what_does_not_become_a_unit_or_a_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is missing or contradicts is named, and nothing is written."""
    hyperv, out = tmp_path / "hyperv.json", tmp_path / "out"
    clock_state.write(hyperv, HYPERV)
    without_page = UNIT.replace(struct.pack("<Q", 0x2001), struct.pack("<Q", 0x2000))
    for arguments, why in (
        ((str(hyperv), "--to", "virtualbox"), "interface is HyperV"),
        ((unit(tmp_path), "--to", "clock", *GIVEN[2:]), "give --tsc-hz, --guest-tsc and --saved-at"),
        ((unit(tmp_path), "--to", "clock", *GIVEN, "--features", "1"), "leave out --features"),
        ((unit(tmp_path), "--to", "clock", *GIVEN, "--guest-tsc", "1"), "is before the page's 0x4c4b40"),
    ):
        assert main(["state", "convert", *arguments, "-o", str(out)]) == 2
        assert why in capsys.readouterr().err
    assert main(["state", "convert", unit(tmp_path, without_page), "--to", "clock", *GIVEN, "-o", str(out)]) == 2
    assert "no vCPU of the unit has a time page" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(StateFileError, match="a directory"):
        state_virtualbox.read(str(tmp_path))
