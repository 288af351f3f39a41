"""Every kind of guest that the meter measures gives what the protocol promises: the same assertions for all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest

from pvclock import Reference, StateError, read_tsc
from pvclock.host.linux import host_clocksource
from pvclock.meter import in_process_guest
from pvclock.meter.comparison import compare
from pvclock.meter.drift.host_reference import HostReference
from pvclock.meter.findings import failures
from pvclock.meter.guest import EngineGuest, Guest
from pvclock.meter.in_process_guest import InProcessGuest
from pvclock.meter.machine_guest import MachineGuest
from pvclock.meter.observe import observe_clock, wait_until_all_read
from pvclock.meter.stress import THREAD_BURSTS, VCPU_BURSTS, Bursts, stress_publishing
from pvclock.payloads.probe import State
from qemu_glue.guest import own_guest, qemu_guest
from tests import oracle
from tests.waiting import HANG_S, wait_until

FEATURES = 0x0100_0009
PAGE_TRIES = 100
READ_GIVES_UP_S = 0.7
"""GuestClock.read() gives a page half a second to become even."""
EPOCH_LIMIT_NS = 1_000_000
EARLY_EPOCH_LIMIT_NS = 50_000_000
"""KVM before Linux 6.7 reads the time of day and then kvmclock, and may lose its CPU in between."""

Maker: TypeAlias = Callable[[], Guest]

ON_KVM = pytest.mark.kvm
KINDS = [
    pytest.param(lambda: MachineGuest("engine", 2), id="engine", marks=ON_KVM),
    pytest.param(lambda: MachineGuest("kernel", 2), id="kernel", marks=ON_KVM),
    pytest.param(lambda: qemu_guest(FEATURES, 2), id="qemu", marks=[ON_KVM, pytest.mark.qemu]),
    pytest.param(lambda: own_guest(2), id="engine by QMP", marks=ON_KVM),
    pytest.param(lambda: InProcessGuest(2), id="in process"),
]


@pytest.fixture(params=KINDS)
def make_guest(request: pytest.FixtureRequest) -> Maker:
    """What makes a guest of one kind, with two vCPUs."""
    make: Maker = request.param
    return make


@pytest.fixture
def guest(make_guest: Maker) -> Iterator[Guest]:
    """A guest of each kind that reads its clock."""
    with make_guest() as made:
        made.start()
        yield made


@pytest.mark.row("E3", "E13", "K-08", "K-12")
def test_what_a_started_guest_gives(guest: Guest) -> None:
    """Findings and a page for each vCPU, newer and newer readings, and findings that are final in the end."""
    guest.check_running()
    assert guest.vcpus == len(guest.records()) == len(guest.pages()) == 2
    before, newest = guest.records(), guest.newest_ns()
    wait_until(lambda: all(now.reads > then.reads for now, then in zip(guest.records(), before, strict=True)))
    wait_until(lambda: guest.newest_ns() > newest)
    for page in guest.pages():
        assert page.version % 2 == 0 < page.version
        assert abs(page.shown_khz - guest.tsc_hz // 1000) <= 1
    records = guest.finish()
    assert [record.state for record in records] == [State.DONE] * 2
    assert not any(failures(records).values())
    assert all(record.first_ns < record.last_ns and record.first_tsc < record.last_tsc for record in records)
    assert all(record.reads > then.reads for record, then in zip(records, before, strict=True))
    assert {record.features & FEATURES for record in records} == {FEATURES}


@pytest.mark.row("E3", "E13")
def test_a_reading_is_by_the_page_and_placed_on_the_hosts_tsc(guest: Guest) -> None:
    """A reading is what its page gives at its TSC, and its instant on the host's TSC is within its bound."""
    for _ in range(PAGE_TRIES):
        begin = read_tsc()
        wait_until_all_read(guest)
        first, page, second = guest.reading(), guest.pages()[0], guest.reading()
        end = read_tsc()
        if guest.pages()[0] == page:  # else KVM has published in between
            break
    else:
        pytest.fail("KVM publishes all the time")
    assert second.ns >= first.ns
    line = page.tsc_timestamp, page.system_time, page.tsc_to_system_mul, page.tsc_shift
    assert oracle.TimeInfo(page.version, 0, *line, page.flags, 0).read(second.tsc) == second.ns
    if host_clocksource() != "tsc":
        return  # there KVM moves guests' TSCs, and the host's TSC may not be one clock
    for each in (first, second):
        assert begin <= each.host_tsc + each.bound_ticks
        assert each.host_tsc - each.bound_ticks <= end
        assert 2 * each.bound_ticks <= end - begin
    passed = second.host_tsc - first.host_tsc
    assert abs(second.tsc - first.tsc - passed) <= first.bound_ticks + second.bound_ticks


@pytest.mark.row("E13", "K-07")
def test_when_a_guests_time_began(guest: Guest) -> None:
    """The wall clock record, the server's own account and the guest's readings tell one and the same epoch."""
    record_ns, account_ns = guest.wall_clock_ns(), guest.epoch_ns()
    before = time.time_ns()
    wait_until_all_read(guest)
    newest, now = guest.newest_ns(), time.time_ns()  # it was read between the two
    early_limit_ns = EARLY_EPOCH_LIMIT_NS if guest.server.is_kvm else EPOCH_LIMIT_NS
    if account_ns is not None:
        assert -early_limit_ns <= record_ns - account_ns <= EPOCH_LIMIT_NS
    assert before - newest - early_limit_ns <= record_ns <= now - newest + EPOCH_LIMIT_NS


@pytest.mark.row("E13", "K-17")
def test_a_paused_guest(guest: Guest) -> None:
    """While it is paused its clock stands where its server says so, and pages are the same for whoever reads them."""
    guest.pause()
    newest = guest.newest_ns()
    time.sleep(0.05)
    assert guest.newest_ns() == newest
    assert guest.pages_by_server() in ([], guest.pages())
    guest.resume()
    wait_until(lambda: guest.newest_ns() > newest)
    if guest.server.stops_when_paused:
        wait_until(lambda: all(record.stopped == 1 for record in guest.records()))


@pytest.mark.row("E3", "E9", "E13", "K-16")
def test_every_guest_is_observed_alike(make_guest: Maker) -> None:
    """The same observations are made of each, and all that can be judged of one clock alone is right."""
    checks = compare([observe_clock(make_guest, 0.3)])
    assert len(checks) == 20
    assert [check for check in checks if not check.ok] == []


@pytest.mark.row("E3", "E13")
def test_a_series_of_every_guest(guest: Guest) -> None:
    """A clock that is left alone goes on as the host's does, within the bounds of its readings, and does not step."""
    readings = HostReference(Reference.RAW).readings("guest", guest, 0.0)
    begun_s = time.monotonic()
    for _ in range(10):
        readings.take()
        time.sleep(0.02)
    assert len(readings.points) == len(readings.steps_ns) == 10
    first, *_, last = readings.points
    if host_clocksource() == "tsc":
        assert abs(last.ahead_ns) <= first.bound_ns + last.bound_ns + 1000 * last.s  # 1 ppm: the nominal rate
    assert all(abs(step_ns) <= 1 for step_ns in readings.steps_ns)
    begin = readings.points[0].s
    assert begin == 0 < last.s < time.monotonic() - begun_s


@pytest.mark.stress
@pytest.mark.row("E9", "E11", "K-12")
@pytest.mark.parametrize(
    ("make", "bursts"),
    [
        pytest.param(lambda: MachineGuest("engine", 2), VCPU_BURSTS, id="engine", marks=ON_KVM),
        pytest.param(lambda: InProcessGuest(2), THREAD_BURSTS, id="in process"),
    ],
)
def test_an_engines_clock_is_republished_under_every_guest(make: Callable[[], EngineGuest], bursts: Bursts) -> None:
    """Where the meter can change the clock, readers see nothing wrong and publishes step by 0 or +1 ns."""
    with make() as guest:
        seen = stress_publishing(guest, 0.5, bursts=bursts)
    assert seen.reads > 0 < seen.publishing.publishes
    assert not any(seen.failures.values())
    assert 0 <= seen.publishing.least_step_ns <= seen.publishing.most_step_ns <= 1


@pytest.mark.row("E13", "K-08")
def test_a_page_that_stays_odd_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread waits for a page whose publisher lost its CPU, and reports one that stays odd for too long."""
    with InProcessGuest(1) as guest:
        guest.start()
        memory, gpa = guest.engine_clock.memory, in_process_guest.time_page_gpa(0)
        version = guest.pages()[0].version
        monkeypatch.setattr(in_process_guest, "ODD_LIMIT_S", HANG_S)  # a busy host may make it as long as the usual one
        memory.write(gpa, (version + 1).to_bytes(4, "little"))
        time.sleep(READ_GIVES_UP_S)
        memory.write(gpa, (version + 2).to_bytes(4, "little"))
        reads = guest.records()[0].reads
        wait_until(lambda: guest.records()[0].reads > reads)
        monkeypatch.setattr(in_process_guest, "ODD_LIMIT_S", 0.01)
        reads = guest.records()[0].reads
        wait_until(lambda: guest.records()[0].reads > reads + 10_000)  # by then it goes by the new limit
        memory.write(gpa, (version + 3).to_bytes(4, "little"))
        with pytest.raises(StateError, match="odd"):
            wait_until(lambda: bool(guest.check_running()))  # type: ignore[func-returns-value]  # it raises


@pytest.mark.row("E13")
def test_a_thread_that_cannot_begin_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that says so comes out, not one of the clean-up, and the first thread has ended."""
    first = in_process_guest.Reader.start

    def start(reader: in_process_guest.Reader) -> None:
        if reader.vcpu:
            raise RuntimeError("no thread more")
        first(reader)

    monkeypatch.setattr(in_process_guest.Reader, "start", start)
    with pytest.raises(RuntimeError, match="no thread more"), InProcessGuest(2) as guest:
        guest.start()
    assert not [thread for thread in threading.enumerate() if thread.name == "pvclock-reader-0"]
