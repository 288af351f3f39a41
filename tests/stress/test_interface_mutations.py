"""Damaged saved units and configurations, 10^5 of each: refused by an error of ours with nothing changed, or taken."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import NoneType
from typing import Any, Final

import pytest

from pvclock import ConfigError, GuestClock, GuestMemory, SimulatedBackend, StateFileError
from pvclock.providers.guest_interface import GuestInterface
from pvclock.providers.registry import PROVIDERS

MUTATIONS: Final = (20_000, pytest.param(100_000, marks=pytest.mark.long))
HZ: Final = 2_596_132_000
SIZE: Final = 1 << 14
FEATURES: Final = 1 << 0 | 1 << 3
NUMBERS: Final = {"None": 0, "Minimal": 1, "HyperV": 2, "KVM": 3, "HyperV+KVM": 0x203}
NEWEST: Final = {"None": 1, "Minimal": 1, "HyperV": 1, "KVM": 2, "HyperV+KVM": 2}
HEADER: Final = struct.Struct("<II")
UNIT: Final = struct.Struct("<II I QQQQIB QQQQIB QI")
"""Provider's number and version; KVM's version, twice system-time MSR, TSC, ns, page, its version and flags; wall-clock
MSR, features."""
EXTREMES: Final = (0, 1, 2, 3, 7, 0x2001, 0x2FF1, SIZE - 16 | 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
HYPERV_MSRS: Final = struct.Struct("<QQQ")
"""After Hyper-V's version: guest OS id, hypercall and reference TSC MSR."""
Damage = Callable[[random.Random, bytes], bytes]


def clocks() -> tuple[dict[str, GuestClock], dict[str, bytearray]]:
    """A used, paused clock of two vCPUs for each provider, and their memories."""
    made, memories = {}, {name: bytearray(SIZE) for name in PROVIDERS}
    for name in PROVIDERS:
        options: dict[str, object] = {"features": FEATURES} if name == "KVM" else {}
        config = {"provider": name, **options}
        clock = GuestClock(GuestMemory(memories[name]), 2, config, backend=SimulatedBackend(HZ, 10**6))
        made[name] = clock
    made["KVM"].write_msr(0, 0x4B564D01, 0x1001)
    made["KVM"].write_msr(1, 0x4B564D01, 0x1041)
    for clock in made.values():
        clock.pause()
    return made, memories


def flip(source: random.Random, data: bytes) -> bytes:
    """Another value for one to three bytes."""
    damaged = bytearray(data)
    for _ in range(source.randint(1, 3)):
        damaged[source.randrange(len(damaged))] = source.getrandbits(8)
    return bytes(damaged)


def cut(source: random.Random, data: bytes) -> bytes:
    """An end that is missing."""
    return data[: source.randrange(len(data))]


def grow(source: random.Random, data: bytes) -> bytes:
    """Bytes too many, somewhere."""
    at = source.randrange(len(data) + 1)
    return data[:at] + source.randbytes(source.randint(1, 40)) + data[at:]


def put_extreme(source: random.Random, data: bytes) -> bytes:
    """Something extreme in the place of a word, aligned or not."""
    damaged, form = bytearray(data), source.choice(["<I", "<Q"])
    width = struct.calcsize(form)
    value = source.choice(EXTREMES) & ((1 << 8 * width) - 1)
    struct.pack_into(form, damaged, source.randrange(max(len(damaged) - width, 0) + 1), value)
    return bytes(damaged)


def put_msr(source: random.Random, data: bytes) -> bytes:
    """Another system-time MSR, with the page where it says, or another one."""
    if len(data) < 90:
        return flip(source, data)
    damaged, at = bytearray(data), 12 + 37 * source.randrange(2)
    msr = source.choice([*EXTREMES, source.getrandbits(64), source.getrandbits(14) | 1])
    struct.pack_into("<Q", damaged, at, msr)
    struct.pack_into("<Q", damaged, at + 24, source.choice([0, msr & ~1, source.getrandbits(14)]))
    return bytes(damaged)


DAMAGES: Final[tuple[Damage, ...]] = (flip, cut, grow, put_extreme, put_msr)


def damaged_units(units: Mapping[str, bytes]) -> Iterator[tuple[str, str, bytes]]:
    """(provider to load it, kind of damage, unit) for ever, the same ones each time."""
    source = random.Random(20_261_122)  # noqa: S311  # a sample, no secret
    names = list(units)
    while True:
        damage = source.choice(DAMAGES)
        saver = source.choice(names)
        loader = saver if source.random() < 0.9 else source.choice(names)
        yield loader, damage.__name__, damage(source, units[saver])


def state_of(clock: GuestClock) -> tuple[object, ...]:
    """All that a unit could change, but for guest memory, and for what never comes again."""
    interface = clock.interface
    return (
        interface.version,
        {name: each for name, each in interface.provider.save().items() if not name.endswith("reference_sequence")},
        interface.config,
        [each.time_page_gpa for each in clock.save().vcpus],
    )


def refusal(attempt: Callable[[], object]) -> ConfigError | StateFileError | None:
    """Why it was refused, if it was; nothing else may be raised."""
    try:
        attempt()
    except (ConfigError, StateFileError) as error:
        return error
    return None


@pytest.mark.row("E9", "G-18", "G-19", "V-36", "V-37", "H-71")
@pytest.mark.parametrize("mutations", MUTATIONS)
def test_damaged_units(mutations: int) -> None:
    """A damaged unit is refused by name, with the clock as it was; or it loads, and is saved as loaded."""
    made, memories = clocks()
    units = {name: clock.interface.save_unit() for name, clock in made.items()}
    before = {name: state_of(clock) for name, clock in made.items()}
    contents = {name: bytes(memory) for name, memory in memories.items()}
    outcomes: Counter[tuple[str, bool]] = Counter()
    for loader, damage, data in islice(damaged_units(units), mutations):
        clock = made[loader]
        error = refusal(lambda: clock.interface.load_unit(data))  # noqa: B023  # called at once
        outcomes[damage, error is None] += 1
        assert isinstance(error, must_be(loader, data))
        if error is not None:
            assert str(error)
            assert state_of(clock) == before[loader]
            assert memories[loader] == contents[loader]
            continue
        assert_loaded(clock, loader, data)
        clock.interface.load_unit(units[loader])
        assert state_of(clock) == before[loader]
        contents[loader] = bytes(memories[loader])
    assert sum(outcomes.values()) == mutations
    assert all(outcomes[damage.__name__, False] > mutations // 50 for damage in DAMAGES)
    assert outcomes["put_msr", True] > mutations // 50
    assert memories["None"] == memories["Minimal"] == bytes(SIZE)


def must_be(loader: str, data: bytes) -> tuple[type, ...]:
    """What may become of it by its numbers and its length: an error, or None."""
    if len(data) < HEADER.size:
        return (StateFileError,)
    number, version = HEADER.unpack_from(data)
    if number != NUMBERS[loader]:
        return (ConfigError,)
    if version > NEWEST[loader] or (loader == "KVM" and data[8:12] != b"\1\0\0\0"):
        return (StateFileError,)
    if loader != "HyperV" and len(data) != (UNIT.size if loader == "KVM" else HEADER.size):
        return (StateFileError,)
    return (NoneType, ConfigError, StateFileError)


def assert_loaded(clock: GuestClock, provider: str, data: bytes) -> None:
    """What a unit says stands in the clock, and is saved again."""
    saved = clock.interface.save_unit()
    if provider == "HyperV":  # the rest holds what is VirtualBox's own, and is as long
        assert HYPERV_MSRS.unpack_from(saved, HEADER.size + 4) == HYPERV_MSRS.unpack_from(data, HEADER.size + 4)
        assert [clock.read_msr(0, msr) for msr in (0x40000000, 0x40000001, 0x40000021)] == [
            *HYPERV_MSRS.unpack_from(data, HEADER.size + 4)
        ]
        return
    if provider != "KVM":
        assert saved == data
        return
    found, expected = UNIT.unpack(saved), UNIT.unpack(data)
    assert found[:3] == expected[:3]
    assert found[-2:] == expected[-2:]
    for vcpu, at in enumerate((3, 9)):
        msr, gpa = expected[at], expected[at] & ~1
        assert found[at] == clock.read_msr(vcpu, 0x4B564D01) == msr
        is_served = msr & 1 and gpa % 4096 <= 4096 - 32
        assert clock.save().vcpus[vcpu].time_page_gpa == (gpa if is_served else None)
    assert clock.read_msr(0, 0x4B564D00) == expected[-2]


KEYS: Final = (
    *("provider", "version", "profile", "features", "enforce_cpuid", "apic_bus_hz", "privileges", "vendor_id"),
    *("recommendations", "kvm_features", "hyperv_features"),
)
NAMES: Final = (*PROVIDERS, "Xen", "kvm", "linux", "document", "virtualbox", "", "None\0")
OTHERS: Final[tuple[object, ...]] = (
    None,
    True,
    False,
    1.0,
    float("nan"),
    b"KVM",
    (),
    [],
    {},
    object(),
    KEYS,
    int,
    "9" * 1000,
)


def damaged_configurations() -> Iterator[dict[Any, object]]:
    """Configurations with anything in them, for ever, the same ones each time."""
    source = random.Random(20_261_123)  # noqa: S311  # a sample, no secret
    while True:
        config: dict[Any, object] = {"provider": source.choice(list(PROVIDERS))} if source.random() < 0.9 else {}
        for _ in range(source.randint(0, 3)):
            key = (
                source.choice(KEYS) if source.random() < 0.9 else source.choice(["", "Provider", "x" * 99, 7, None, ()])
            )
            number = source.choice([source.getrandbits(5), source.getrandbits(70), -source.getrandbits(65), *EXTREMES])
            config[key] = source.choice([number, number, source.choice(NAMES), source.choice(OTHERS)])
        yield config


@pytest.mark.row("E9", "G-01", "G-02", "G-03", "E13")
@pytest.mark.parametrize("mutations", MUTATIONS)
def test_damaged_configurations(mutations: int) -> None:
    """A damaged configuration is a ConfigError that says something, or makes an interface that its own config makes."""
    made, _ = clocks()
    clock = made["None"].interface.provider.clock
    outcomes: Counter[tuple[str | None, bool]] = Counter()
    for config in islice(damaged_configurations(), mutations):
        error = refusal(lambda: GuestInterface(config, clock, 2))  # noqa: B023  # called at once
        if error is not None:
            assert str(error)
            outcomes[None, False] += 1
            continue
        interface = GuestInterface(config, clock, 2)
        outcomes[interface.name, True] += 1
        assert config.keys() <= {*KEYS, "Provider"}
        assert interface.name == config.get("provider", config.get("Provider", "None"))
        assert interface.name in PROVIDERS
        assert interface.version == (0 if interface.name == "None" else config.get("version", 0))
        assert 0 <= interface.version < 2**32
        assert GuestInterface({"provider": interface.name, **interface.config}, clock, 2).config == interface.config
    assert outcomes[None, False] > mutations // 3
    assert all(outcomes[name, True] > mutations // 50 for name in PROVIDERS)
