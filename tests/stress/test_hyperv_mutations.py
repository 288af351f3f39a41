"""Damaged configurations and saved states of clocks with Hyper-V's interface, alone and beside KVM's: 10^5 of each.

Each configuration is a ConfigError with a text, or makes an interface that its own config makes again; each state is a
StateFileError, or makes a clock that works.
"""

from __future__ import annotations

import json
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any, Final

import pytest

from pvclock import (
    ConfigError,
    GuestClock,
    GuestMemory,
    MsrFault,
    PvclockError,
    SimulatedBackend,
    StateFileError,
    WrongType,
)
from pvclock.providers.guest_interface import GuestInterface
from pvclock.providers.hyperv import offer, synic
from pvclock.providers.hyperv.stimers import SyntheticTimers
from pvclock.providers.interface import ClockServices
from pvclock.providers.options import option_types
from pvclock.providers.registry import PROVIDERS
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState
from tests.stress.test_clock_state_mutations import KINDS
from tests.unit.hyperv_provider import full_vmm

pytestmark = pytest.mark.stress

COUNTS: Final = (300, pytest.param(100_000, marks=pytest.mark.long))
NAMES: Final = ("HyperV", "HyperV+KVM")
HZ: Final = 2_596_132_000
SIZE: Final = 1 << 16
TEXT_MAX: Final = 2000
"""Of an error: a line or some, whatever was found."""

# Configurations

TEXTS: Final = (
    *("Microsoft Hv", "VBoxVBoxVBox", "GenuineIntel", "AuthenticAMD", "HygonGenuine", "linux", "document"),
    *("virtualbox", "", "x" * 13, "Ünïcödé 1234", "\0" * 12, "twelve chars", "\ud800" * 12, "9" * 1000),
)
NUMBERS: Final = (0, 1, 2, 0x3, 0x60, 0x2FF, 0x100108B, 2**13, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64, -1, 10**400)
OTHERS: Final[tuple[object, ...]] = (
    *(None, True, False, 1.0, float("nan"), b"Microsoft Hv", (), [], {}, object(), int),
    *({"VendorID": "Microsoft Hv"}, {"VSInterface": 1}, {"HypercallDebugInterface": True}, {"VendorID": None}, {1: 2}),
)
NODES: Final = ("VendorID", "VSInterface", "HypercallDebugInterface", "Vendor", 1)
KEYS: Final = ("Provider", "KVM", "vendor", "", "x" * 99, 7, None, (), "features\0")


def damaged_configurations(seed: int) -> Iterator[dict[Any, object]]:
    """Configurations of both providers with one to four of their options, or anything else, as anything."""
    source = random.Random(seed)  # noqa: S311  # a sample, no secret
    options = {name: ("version", "HyperV", *option_types(PROVIDERS[name])) for name in NAMES}
    while True:
        name = source.choice(NAMES)
        config: dict[Any, object] = {"provider": name} if source.random() < 0.95 else {}
        for _ in range(source.randint(1, 4)):
            key = source.choice(options[name] if source.random() < 0.95 else KEYS)
            config[key] = any_value(source, key)
        yield config


def any_value(source: random.Random, key: object) -> object:
    """Mostly of a type that the option may have; numbers with few bits, so that some of them can be served."""
    kind = source.random()
    if kind < 0.1:
        return source.choice(OTHERS)
    if key == "HyperV":  # VirtualBox's node
        return {source.choice(NODES): source.choice([*TEXTS, *OTHERS]) for _ in range(source.randrange(3))}
    if key in ("vs_interface", "hypercall_debug", "enforce_cpuid") and kind < 0.9:
        return source.random() < 0.5
    if key in ("profile", "vendor_id", "cpu_vendor") and kind < 0.9:
        return source.choice(TEXTS)
    few = sum({1 << source.randrange(16) for _ in range(source.randint(0, 6))})
    return source.choice([few, few | 0x60, 0x2FF & ~few, source.getrandbits(64), source.choice(NUMBERS)])


def services() -> ClockServices:
    """Those of a clock whose VMM serves everything."""
    memory = GuestMemory(bytearray(SIZE))
    clock = GuestClock(memory, 2, "None", backend=SimulatedBackend(HZ, 10**6), vmm=full_vmm())
    return clock.interface.provider.clock


def refusal(make: Callable[[], object]) -> str | None:
    """What the error of ours says; None without one."""
    try:
        make()
    except (ConfigError, WrongType, StateFileError) as error:
        return str(error)
    return None


def try_configuration(config: Mapping[Any, object], clock: ClockServices) -> bool:
    """Was it accepted?  Nothing but an error of ours with a text comes out, and what it makes it makes again."""
    refused = refusal(lambda: GuestInterface(config, clock, 2))
    if refused is not None:
        assert 0 < len(refused) < TEXT_MAX
        return False
    interface = GuestInterface(config, clock, 2)
    assert interface.name in PROVIDERS
    assert all(0 <= register < 2**32 for leaf in interface.provider.cpuid_leaves.values() for register in leaf)
    again = GuestInterface({"provider": interface.name, **interface.config}, clock, 2)
    assert again.config == interface.config
    assert again.provider.cpuid_leaves == interface.provider.cpuid_leaves
    return True


@pytest.mark.row("E9", "E13", "H-01", "H-20")
@pytest.mark.parametrize("count", COUNTS)
def test_damaged_configurations(count: int) -> None:
    """Any values of the options are a ConfigError that says something, or an interface that its config makes again."""
    clock, outcomes = services(), Counter[bool]()
    for config in islice(damaged_configurations(20_261_127), count):
        outcomes[try_configuration(config, clock)] += 1
    assert outcomes[False] > count // 3
    assert outcomes[True] > count // 20


@pytest.mark.row("E9", "E13")
def test_the_damage_finds_a_configuration_that_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vendor id of any text, CPUID's registers are no longer registers, or an error of Python's comes out."""
    monkeypatch.setattr(offer, "_checked_vendor_id", lambda vendor_id: vendor_id)
    clock = services()
    tries = (partial(try_configuration, config, clock) for config in islice(damaged_configurations(20_261_127), 300))
    with pytest.raises((AssertionError, UnicodeError, ValueError, OverflowError)):
        list(map(operator.call, tries))


# Saved states

SETTINGS: Final = MappingProxyType(
    {0x40000000: 0x8100_0005_0A00_0000, 0x40000001: 0x4001, 0x40000021: 0x5001, 0x40000080: 1, 0x40000083: 0x6001}
)
"""OS id, hypercall page, reference TSC page, SynIC with its message page."""


def used_state(name: str, **options: object) -> ClockState:
    """Of a guest that uses all: pages, a message that waits, one-shot, periodic and direct timers, a crash."""
    backend = SimulatedBackend(HZ, 10**6, boot_id="one")
    clock = GuestClock(GuestMemory(bytearray(SIZE)), 2, name, backend=backend, vmm=full_vmm(), **options)  # type: ignore[arg-type]  # a test's own choice
    if name != "HyperV":
        clock.write_msr(1, 0x4B564D01, 0x7001)
    for index, value in SETTINGS.items():
        clock.write_msr(0, index, value)
    for index, value in {0x40000092: 0x20, 0x400000B0: 2 << 16 | 1, 0x400000B1: 10, 0x400000B2: 2 << 16 | 1}.items():
        clock.write_msr(0, index, value)
    for index, value in {0x400000B3: 11, 0x400000B4: 0x1203 | 0x30 << 4, 0x400000B5: 10_000, 0x40000100: 7}.items():
        clock.write_msr(0, index, value)
    clock.write_msr(0, 0x40000106, 1 << 16 | 0xF1)
    clock.read_msr(0, 0x40000020)
    backend.advance(ns=10**6)
    clock.expire_timers()
    clock.pause()
    return clock.save()


def damaged_states(seed: int) -> Iterator[tuple[str, bytes]]:
    """(kind of damage, JSON) for ever: damage of the file, and one or two other values in what the provider saved."""
    source = random.Random(seed)  # noqa: S311  # a sample, no secret
    states = [
        used_state("HyperV"),
        used_state("HyperV+KVM"),
        used_state("HyperV", profile="virtualbox", enforce_cpuid=False),
    ]
    texts = [clock_state.to_json(state).encode() for state in states]
    while True:
        text = source.choice(texts)
        if source.random() < 0.4:
            kind = source.choice(list(KINDS))
            yield kind, KINDS[kind](source, text)
        else:
            yield "other values", with_other_values(source, text)


def with_other_values(source: random.Random, text: bytes) -> bytes:
    """Other numbers in place of what was saved by name."""
    document = json.loads(text)
    saved = document["provider"][source.choice(["msrs", "msrs", "msrs", "config"])]
    for _ in range(source.randint(1, 2)):
        name = source.choice(list(saved))
        if isinstance(saved[name], list) and saved[name] and source.random() < 0.9:
            saved[name][source.randrange(len(saved[name]))] = other_number(source)
        else:
            saved[name] = source.choice([other_number(source), [], None, [0, 1], [1, 1], True, "text"])
    return json.dumps(document).encode()


def other_number(source: random.Random) -> int:
    """An address, flags of a timer, a time, a limit."""
    near = source.choice([0, 0x5001, 0x6001, SIZE - 1, 0x20, 1 << 16, 2 << 16 | 1, 0x1203, 10_000, 1 << 32, 1 << 64])
    return source.choice([near, near + source.randint(-2, 2), source.getrandbits(64)])


def try_state(damaged: bytes) -> bool:
    """Was it accepted?  If so, the clock runs, its time does not go back, and it is saved and restored as it is."""
    memory = GuestMemory(bytearray(SIZE))
    backend = SimulatedBackend(HZ, 10**9, boot_id="two")
    try:
        state = clock_state.from_json(damaged)
        clock = GuestClock.restore(state, memory, backend=backend, vmm=full_vmm(), any_tsc_hz=True)
    except StateFileError as error:
        assert_clear(error)
        return False
    assert plain(clock.save()) == retold(plain(state)), "it is not what was loaded"
    with suppress(PvclockError):  # time that ends soon, a policy of nobody's
        use(clock, backend)
    return True


def assert_clear(error: StateFileError) -> None:
    """It tells what was found where, and what could be there."""
    assert all((error.field, error.found, error.supported))


def plain(state: ClockState) -> Mapping[str, object]:
    """What the provider saved, but for what goes on when it is loaded: reference time; and queues are in any order."""
    saved = {name.rpartition("-")[2]: value for name, value in state.provider.msrs.items()}
    waiting = saved.pop("stimer_waiting", ())
    kept = {name: value for name, value in saved.items() if name not in ("reference_units", "reference_sequence")}
    return {**kept, "waiting": sorted(waiting)} if isinstance(waiting, tuple) else kept


def retold(saved: Mapping[str, object]) -> Mapping[str, object]:
    """What a load makes of it: a guest with re-enlightenment hears of this host's frequency, where it is another."""
    control = saved.get("reenlightenment_control", 0)
    assert isinstance(control, int)
    if not control >> 16 & 1 or saved["told_tsc_hz"] == HZ:
        return saved
    return {**saved, "tsc_emulation_status": 1, "told_tsc_hz": HZ}


def use(clock: GuestClock, backend: SimulatedBackend) -> None:
    """Let time run, the timers expire, and the guest read and write."""
    clock.resume("freeze")
    before = counter(clock)
    for _ in range(3):
        backend.advance(ns=10**6)
        clock.expire_timers()
        clock.tick()
    assert counter(clock) >= before, "reference time went back"
    for index in (0x40000021, 0x40000083, 0x400000B0, 0x400000B1):
        with suppress(MsrFault):
            clock.write_msr(0, index, clock.read_msr(0, index))
    clock.pause()
    state = clock.save()
    assert clock_state.from_json(clock_state.to_json(state)) == state


def counter(clock: GuestClock) -> int:
    """The reference counter; 0 where none is offered."""
    try:
        return clock.read_msr(0, 0x40000020)
    except MsrFault:
        return 0


@pytest.mark.row("E9", "P-25", "H-72")
@pytest.mark.parametrize("count", COUNTS)
def test_damaged_states(count: int) -> None:
    """A damaged state is a StateFileError that names a field, or a clock that works and that is what was saved."""
    outcomes: Counter[tuple[str, bool]] = Counter()
    for kind, damaged in islice(damaged_states(20_261_128), count):
        outcomes[kind, try_state(damaged)] += 1
    assert sum(outcomes.values()) == count
    assert outcomes["other values", False] > count // 10
    assert outcomes["other values", True] > count // 10


def careless_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers that adopt numbers of messages that wait, whatever timers those are."""
    checked = SyntheticTimers.checked

    def adopt_all(timers: SyntheticTimers, saved: Mapping[str, object]) -> Any:  # noqa: ANN401  # as the original
        try:
            return checked(timers, saved)
        except ConfigError:
            configs, counts, dues = (saved[f"stimer_{name}"] for name in ("config", "count", "due"))
            return lambda: timers._adopt(list(zip(configs, counts, dues, strict=True)), saved["stimer_waiting"])  # type: ignore[call-overload,arg-type]

    monkeypatch.setattr(SyntheticTimers, "checked", adopt_all)


def careless_synic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SynIC that takes any list of numbers for its registers."""
    monkeypatch.setattr(synic, "saved_numbers", lambda saved, name, *_: saved[name])


@pytest.mark.row("E9", "H-72")
@pytest.mark.parametrize("careless", [careless_timers, careless_synic])
def test_the_damage_finds_a_part_that_does_not_check(careless: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401  # a function
    """A part that adopts what no guest can have written raises an error of Python's, or saves something else."""
    states = [damaged for _, damaged in islice(damaged_states(20_261_128), 300)]
    careless(monkeypatch)
    with pytest.raises((AssertionError, TypeError, IndexError, ValueError, OverflowError, AttributeError)):
        list(map(try_state, states))
