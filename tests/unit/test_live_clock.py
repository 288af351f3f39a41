"""A memory has one live clock: a restored one takes over, and follows what was followed, or says that it does not."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Final

import pytest

from pvclock import ConfigError, GuestClock, GuestMemory, RangeError, SimulatedBackend, StateError, StateFileError
from pvclock.errors import TscOffsetNotHonoured, WrongType
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.meter.stress import republish
from pvclock.readings import Sample
from pvclock.state.clock_state import SavedPolicy, from_json, to_json
from pvclock.timekeeping.events import EventKind
from tests.unit.clocks import NS_PER_S, SYSTEM_TIME, guest_ns

HZ: Final = 2_500_000_000


def a_vm(**options: int | str) -> tuple[GuestClock, SimulatedBackend, GuestMemory]:
    """A VM that has run for 1 s on the host of the field's report."""
    backend = SimulatedBackend(HZ, tsc=10**13, ref_ns=4 * 10**12, realtime_ns=1_800_000_000 * NS_PER_S, boot_id="one")
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 1, backend=backend, **options)  # type: ignore[arg-type]  # any of its options
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    backend.advance(ns=NS_PER_S)
    return clock, backend, memory


def told(clock: GuestClock, kind: EventKind) -> list[str]:
    """What was told of that kind."""
    return [event.why for event in clock.events.read().events if event.kind is kind]


# One live clock a memory

OPERATIONS: Final[dict[str, Callable[[GuestClock], object]]] = {
    "refresh": lambda clock: clock.refresh(),
    "tick": lambda clock: clock.tick(),
    "dilate": lambda clock: clock.dilate(2),
    "slew": lambda clock: clock.slew(1),
    "skip": lambda clock: clock.skip(1),
    "offset": lambda clock: clock.offset(1),
    "pause": lambda clock: clock.pause(),
    "resume": lambda clock: clock.resume(),
    "run_for": lambda clock: clock.run_for(1),
    "reset": lambda clock: clock.reset(),
    "follow": lambda clock: clock.follow("raw"),
    "save": lambda clock: clock.save(),
    "republish": lambda clock: republish(clock, 1, [Fraction(1)]),
    "host_write_msr": lambda clock: clock.host_write_msr(0, 0x10, 1),
    "repair_tsc": lambda clock: clock.repair_tsc(),
    "write_msr page": lambda clock: clock.write_msr(0, SYSTEM_TIME, 0x3001),
    "write_msr wall clock": lambda clock: clock.write_msr(0, 0x4B564D00, 0x3000),
    "write_msr TSC": lambda clock: clock.write_msr(0, 0x10, 1),
}


@pytest.mark.row("E1", "E9")
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_old_clocks_next_operation_is_refused(name: str) -> None:
    """After a rollback in place each operation of the old clock is a StateError; memory and TSCs stay the new one's."""
    clock, backend, memory = a_vm()
    clock.pause()
    state = clock.save()
    clock.resume()
    restored = GuestClock.restore(state, memory, backend=backend)
    restored.resume("freeze")
    image, offsets = memory.read(0, 1 << 16), dict(backend.tsc_offsets)
    with pytest.raises(StateError, match="another clock has taken over this one's memory"):
        OPERATIONS[name](clock)
    assert (memory.read(0, 1 << 16), backend.tsc_offsets) == (image, offsets)


@pytest.mark.row("E1", "E9")
def test_after_a_rollback_the_guest_reads_the_new_clocks_time() -> None:
    """The old one's last refresh, which showed the guest 234 years, is refused, and the page is the new one's."""
    clock, backend, memory = a_vm()
    backend.advance(ns=100 * NS_PER_S)
    clock.pause()
    state, image = clock.save(), memory.read(0, 1 << 16)
    clock.resume()
    backend.advance(ns=50 * NS_PER_S)
    clock.refresh()
    memory.write(0, image)
    restored = GuestClock.restore(state, memory, backend=backend)
    restored.resume("freeze")
    backend.advance(ns=NS_PER_S)
    restored.refresh()
    with pytest.raises(StateError, match="taken over"):
        clock.refresh()
    assert restored.now() == 102 * NS_PER_S
    assert abs(guest_ns(backend, memory) - 102 * NS_PER_S) <= 1


@pytest.mark.row("E1", "E9")
def test_a_failed_restore_leaves_the_old_clock_live() -> None:
    """Whatever is wrong with the state: memory and the vCPUs' TSC offsets stay, and the old clock goes on."""
    clock, backend, memory = a_vm(tsc_offset=12345, timing_leaf=True)
    clock.pause()
    state = clock.save()
    clock.resume("freeze")
    config = {**state.provider.config, "colour": 1}
    wrong = [
        state._replace(policy=SavedPolicy("later", None)),
        state._replace(sleep_policy=SavedPolicy("later", None)),
        state._replace(provider=state.provider._replace(name="Xen")),
        state._replace(provider=state.provider._replace(config=config)),
        state._replace(provider=state.provider._replace(msrs={"colour": 1})),
        state._replace(host=state.host._replace(tsc_hz=HZ * 2), guest_tsc_hz=HZ * 2),
    ]
    for each in wrong:
        image = memory.read(0, 1 << 16)
        with pytest.raises(StateFileError):
            GuestClock.restore(each, memory, backend=backend)
        assert (backend.tsc_offsets, memory.read(0, 1 << 16)) == ({0: 12345}, image)
        clock.refresh()
        assert clock.now() == NS_PER_S
    for option in ("reference", "vcpu_host", "policy"):
        with pytest.raises(ConfigError, match="sundial"):
            GuestClock.restore(state, memory, backend=backend, **{option: "sundial"})  # type: ignore[arg-type]
    clock.refresh()
    assert backend.tsc_offsets == {0: 12345}


@pytest.mark.row("E1", "E9")
def test_a_clock_that_cannot_be_made_leaves_the_old_one_live() -> None:
    """A configuration that is none changes neither who is live nor the vCPUs' TSCs."""
    clock, backend, memory = a_vm(tsc_offset=12345)
    with pytest.raises(ConfigError):
        GuestClock(memory, 1, "Xen", backend=backend, tsc_offset=5)
    assert backend.tsc_offsets == {0: 12345}
    clock.skip(1)


@pytest.mark.row("E1", "E9")
def test_a_new_clock_takes_over_too() -> None:
    """As a restored one does; both can take over in turn."""
    clock, backend, memory = a_vm()
    newer = GuestClock(memory, 1, backend=backend)
    with pytest.raises(StateError, match="taken over"):
        clock.refresh()
    newest = GuestClock(memory, 1, backend=backend)
    with pytest.raises(StateError, match="taken over"):
        newer.refresh()
    newest.refresh()


# What is followed


@pytest.mark.row("E1", "E11")
@pytest.mark.parametrize("reference", ["raw", "monotonic", "realtime"])
def test_a_restored_clock_follows_on(reference: str) -> None:
    """What was followed is followed, with the same bounds, through the state's file."""
    clock, backend, memory = a_vm()
    clock.follow(reference, max_ppm=77.5, panic_ns=10**9)
    clock.pause()
    state = from_json(to_json(clock.save()))
    restored = GuestClock.restore(state, memory, backend=backend)
    assert restored.reference == reference
    assert restored.save().reference == state.reference == (reference, Fraction(155, 2), 10**9)
    restored.resume()
    restored.tick()
    assert restored.steering is not None


@pytest.mark.row("E1", "E11")
def test_the_caller_may_choose_another_reference() -> None:
    """reference= is followed rather than what was saved, "off" and a source of samples too."""
    clock, backend, memory = a_vm(reference="monotonic")
    clock.pause()
    state = clock.save()
    assert GuestClock.restore(state, memory, backend=backend, reference="realtime").reference == "realtime"
    assert GuestClock.restore(state, memory, backend=backend, reference="off").reference == "off"
    source = GuestClock.restore(state, memory, backend=backend, reference=lambda: Sample(backend.tsc, 0, 1.0))
    assert source.reference == "injected"


@pytest.mark.row("E1", "E11")
def test_a_source_of_samples_cannot_be_saved_and_that_is_told() -> None:
    """A clock that followed a source of the caller's follows nothing after a restore, and says so."""
    clock, backend, memory = a_vm()
    clock.follow(lambda: Sample(backend.tsc, backend.ref_ns, 1.0))
    clock.pause()
    restored = GuestClock.restore(from_json(to_json(clock.save())), memory, backend=backend)
    assert restored.reference == "off"
    (why,) = told(restored, EventKind.REFUSED)
    assert "injected" in why


@pytest.mark.row("E1", "E11", "P-08")
def test_where_time_is_the_guests_execution_nothing_is_followed_and_that_is_told() -> None:
    """A state that followed a clock is restored on an unslaved backend all the same."""
    clock, backend, memory = a_vm(reference="monotonic")
    clock.pause()
    restored = GuestClock.restore(clock.save(), memory, backend=ExecutionTimeBackend(backend))
    assert restored.reference == "off"
    (why,) = told(restored, EventKind.REFUSED)
    assert "monotonic" in why


@pytest.mark.row("E1", "E11")
def test_a_clock_that_followed_nothing_says_nothing() -> None:
    """And a state of version 1 says that it does not know."""
    clock, backend, memory = a_vm()
    clock.pause()
    state = clock.save()
    assert not told(GuestClock.restore(state, memory, backend=backend), EventKind.REFUSED)
    old = from_json(to_json(state._replace(version=1)))
    (why,) = told(GuestClock.restore(old, memory, backend=backend), EventKind.RESTORE)
    assert "a state of version 1 does not say" in why
    assert "what the clock followed" in why


# What is accepted can be saved


@pytest.mark.row("E9", "P-25")
@pytest.mark.parametrize("panic_ns", [0, -1, 2**64, 1.5])
def test_a_panic_threshold_that_cannot_be_saved_is_refused(panic_ns: float) -> None:
    """Whole ns from 1 to 2^64-1; what was followed stays."""
    clock, _, _ = a_vm(reference="monotonic")
    with pytest.raises((RangeError, WrongType)):
        clock.follow("raw", panic_ns=panic_ns)  # type: ignore[arg-type]  # that is the point
    assert clock.reference == "monotonic"
    to_json(clock.save())


@pytest.mark.row("E9", "P-25")
@pytest.mark.parametrize("max_ppm", [0.1, 5e-324, 1 / 3, 100_000])
def test_each_max_ppm_that_is_taken_can_be_saved(max_ppm: float) -> None:
    """However small or odd."""
    clock, _, memory = a_vm()
    clock.follow("raw", max_ppm=max_ppm)
    state = clock.save()
    assert state.reference is not None
    assert state.reference.max_ppm == pytest.approx(Fraction(max_ppm), rel=1e-15, abs=0)
    assert from_json(to_json(state)) == state
    restored = GuestClock.restore(state, memory, backend=clock.backend)
    assert restored.save().reference == state.reference


# On a host without TSC offsets


@pytest.mark.row("J-07", "J-06")
def test_adjust_and_aux_survive_a_restore_on_a_host_without_offsets() -> None:
    """Neither needs an offset: both read as saved, before resume() and after it, and are saved again."""
    clock, _, memory = a_vm()
    clock.write_msr(0, 0x3B, 10**11)
    clock.write_msr(0, 0xC0000103, 7)
    clock.pause()
    host = SimulatedBackend(HZ, tsc=99, honours_tsc_offset=False)
    restored = GuestClock.restore(clock.save(), memory, backend=host)
    for _ in range(2):
        assert (restored.read_msr(0, 0x3B), restored.read_msr(0, 0xC0000103)) == (10**11, 7)
        vcpu = restored.save().vcpus[0]
        assert (vcpu.tsc_adjust, vcpu.tsc_aux) == (10**11, 7)
        if restored.is_paused:
            restored.resume()
    assert restored.read_msr(0, 0x10) == 99
    assert isinstance(restored.refused_offset, TscOffsetNotHonoured)
