"""The clock in a stream that a real QEMU has saved: read, moved forward, and taken by the QEMU that loads it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pvclock import GuestClock, GuestMemory, SimulatedBackend, StateError
from pvclock.commands import main
from pvclock.meter.findings import newest_ns, read_pages, shown_by
from pvclock.payloads import clockprobe, probe
from pvclock.state import clock_state
from qemu_glue.guest import qemu_guest
from qemu_glue.migration import state_format
from qemu_glue.migration.kvmclock_section import FoundBy
from qemu_glue.migration.saved_clock import QemuClock
from qemu_glue.peer.launch import Qemu
from qemu_glue.peer.lifecycle import loading, save, wait_until_loaded
from tests.qemu.private_qemu import RAM_BYTES, PrivateQemu, private_qemu
from tests.waiting import HANG_S

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.row("E7", "E15")]

FEATURES = 0x0100_0009
HOUR_NS = 3600 * 10**9
MARGIN_NS = 10**6
"""KVM's clock and this host's may drift apart by some ppm meanwhile."""


class Saved(NamedTuple):
    """A VM that was paused, and saved as a stream in `path`: its clock there, and its pages and newest reading.

    took_ns: both together, at most.
    """

    path: Path
    clock: QemuClock
    shown_ns: int
    newest_ns: int
    took_ns: int


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A guest with two vCPUs that read their clock, stopped and saved."""
    path = tmp_path_factory.mktemp("streams") / "vm stream"
    with qemu_guest(FEATURES, 2) as guest:
        guest.start()
        begun_ns = time.monotonic_ns()
        guest.pause()
        save(guest.vmm, str(path))
        took_ns = time.monotonic_ns() - begun_ns
        clock = state_format.read(str(path)).clock
        shown_ns = shown_by(read_pages(guest.memory, 2)[0], clock.vcpus[0].tsc)
        return Saved(path, clock, shown_ns, newest_ns(guest.memory), took_ns)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A file to write a stream to, which is not left behind."""
    path = tmp_path / "changed.stream"
    yield path
    path.unlink(missing_ok=True)


def goes_on_from(stream: Path) -> tuple[int, int]:
    """The least and the most that a guest's clock can have been when it was continued.

    By a reading of the guest's, and by how long the host's clock says that it has run at most.
    """
    arguments = (*loading(str(stream)), "-S")  # else a VM that was running goes on as soon as it is loaded
    with Qemu(clockprobe(), features=FEATURES, vcpus=2, cmdline="cpus=2", arguments=arguments) as qemu:
        wait_until_loaded(qemu)
        before_ns, readings = time.monotonic_ns(), probe.read_record(qemu.memory, 0).last_tsc
        qemu.resume()
        deadline = time.monotonic() + HANG_S
        while probe.read_record(qemu.memory, 0).last_tsc == readings:
            qemu.check_running()
            if time.monotonic() > deadline:
                raise StateError("observe", "vCPU 0 reads nothing", "give it a CPU")
        ns = probe.read_record(qemu.memory, 0).last_ns
        return ns - (time.monotonic_ns() - before_ns), ns


def save_stream(qemu: PrivateQemu, out: Path) -> None:
    """Have it write its VM to that file."""
    qemu.execute("migrate", uri=f"exec:cat > {out}")
    deadline = time.monotonic() + HANG_S
    while (answer := qemu.execute("query-migrate"))["status"] != "completed":  # type: ignore[index]
        assert time.monotonic() < deadline, answer
        time.sleep(0.001)


def test_what_qemu_saved_is_read(saved: Saved) -> None:
    """The section's time is that of the stop: not before the guest's newest reading, nor before its page at its TSC."""
    assert saved.clock.section.found_by is FoundBy.DESCRIPTION
    assert (saved.clock.machine, saved.clock.is_reliable, len(saved.clock.vcpus)) == ("microvm", True, 2)
    pages = [vcpu.system_time_msr & ~1 for vcpu in saved.clock.vcpus]
    assert sorted(pages) == [probe.time_page_address(vcpu) for vcpu in range(2)]
    assert saved.clock.clock_ns >= saved.newest_ns
    assert saved.clock.clock_ns >= saved.shown_ns
    assert saved.clock.clock_ns - saved.shown_ns < saved.took_ns + MARGIN_NS


def test_an_unchanged_stream_goes_on(saved: Saved) -> None:
    """A guest goes on from the section's time, to which QEMU adds nothing."""
    least, most = goes_on_from(saved.path)
    assert least - MARGIN_NS <= saved.clock.clock_ns <= most


def test_an_hour_later_is_what_the_guest_sees(saved: Saved, out: Path) -> None:
    """QEMU accepts a stream whose clock was moved by an hour, and its guest goes on from there."""
    assert main(["state", "convert", str(saved.path), "--to", "qemu", "--skip", "3600s", "-o", str(out)]) == 0
    least, most = goes_on_from(out)
    assert least - MARGIN_NS <= saved.clock.clock_ns + HOUR_NS <= most


def test_the_reliable_byte_decides(saved: Saved, out: Path) -> None:
    """With it cleared QEMU takes the time from the guest's page, as noted; a conversion sets it again."""
    content = bytearray(saved.path.read_bytes())
    at = saved.clock.section.clock_at
    content[at : at + 8] = (saved.clock.clock_ns + HOUR_NS).to_bytes(8, "big")
    assert saved.clock.section.reliable_at is not None
    content[saved.clock.section.reliable_at] = 0
    out.write_bytes(content)
    assert "vCPU 0's page" in " ".join(state_format.read(str(out)).notes)
    least, most = goes_on_from(out)
    assert least - MARGIN_NS <= saved.shown_ns <= most
    assert main(["state", "convert", str(out), "--to", "qemu", "-o", str(out)]) == 0
    assert state_format.read(str(out)).clock.is_taken
    least, most = goes_on_from(out)
    assert least - MARGIN_NS <= saved.clock.clock_ns + HOUR_NS <= most


def test_there_and_back(saved: Saved, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A guest of QEMU's lives on our clock for an hour at twice the rate, and goes on in QEMU from there, at KVM's."""
    state = tmp_path / "clock.json"
    assert main(["state", "convert", str(saved.path), "--to", "clock", "-o", str(state)]) == 0
    ours = clock_state.read(state)
    assert ours.guest_tsc_hz is not None
    backend = SimulatedBackend(ours.guest_tsc_hz)
    clock = GuestClock.restore(ours, GuestMemory(bytearray(RAM_BYTES)), backend=backend)
    clock.dilate(2)
    clock.resume()
    backend.advance(ns=HOUR_NS)
    clock.pause()
    clock_state.write(state, clock.save())
    capsys.readouterr()
    assert main(["state", "convert", str(state), "--to", "qemu", "--into", str(saved.path), "-o", str(out)]) == 0
    assert "not in a stream: its dilation of 2" in capsys.readouterr().out
    assert state_format.read(str(out)).clock.clock_ns == pytest.approx(saved.clock.clock_ns + 2 * HOUR_NS, abs=2)
    least, most = goes_on_from(out)
    assert least - MARGIN_NS <= saved.clock.clock_ns + 2 * HOUR_NS <= most


def test_what_has_no_clock_of_ours_to_change(saved: Saved, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A VM that was not under KVM, and a stream without its end, are refused, each for its own reason."""
    with private_qemu("-S", accel="tcg") as qemu:
        save_stream(qemu, out)
    assert main(["state", "check", str(out)]) == 1
    assert "no kvmclock among the devices that the stream describes" in capsys.readouterr().out
    out.write_bytes(saved.path.read_bytes()[: saved.clock.section.begin])
    assert main(["state", "check", str(out)]) == 1
    assert "no kvmclock section" in capsys.readouterr().out


@pytest.mark.long
def test_a_vm_that_was_running(out: Path) -> None:
    """Its clock was read when its devices were saved: not before its guest's last reading, nor its page at its TSC."""
    with qemu_guest(FEATURES, 2) as guest:
        guest.start()
        save(guest.vmm, str(out))
        clock = state_format.read(str(out)).clock
        assert clock.clock_ns >= newest_ns(guest.memory)
        assert clock.clock_ns >= shown_by(read_pages(guest.memory, 2)[0], clock.vcpus[0].tsc)
    least, most = goes_on_from(out)
    assert least - MARGIN_NS <= clock.clock_ns <= most


@pytest.mark.parametrize(
    ("machine", "found_by", "is_reliable"),
    [
        ("q35", FoundBy.DESCRIPTION, True),
        pytest.param("pc-i440fx-2.8", FoundBy.DESCRIPTION, None, marks=pytest.mark.long),
        pytest.param("pc-i440fx-2.2", FoundBy.SEARCH, None, marks=pytest.mark.long),
    ],
)
def test_machine_types(machine: str, found_by: FoundBy, is_reliable: bool | None, out: Path) -> None:
    """Streams of this QEMU's other machine types, saved before the first instruction, are read by their own layout."""
    with private_qemu("-machine", machine, "-S") as qemu:
        save_stream(qemu, out)
    clock = state_format.read(str(out)).clock
    assert (clock.section.found_by, clock.is_reliable) == (found_by, is_reliable)
    assert 0 <= clock.clock_ns < 10**9 * HANG_S
