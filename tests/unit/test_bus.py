"""The bus: which device answers, overlaps, what nobody has, and what a device may do."""

from __future__ import annotations

from errno import ENOSPC
from typing import cast

import pytest

from pvclock import ConfigError, RangeError, WrongType
from pvclock.errors import KvmError
from pvclock.kvm.exits import CoalescedWrite
from pvclock.machine import Bus
from pvclock.machine.bus import CoalescedRing

pytestmark = pytest.mark.row("style")

ONES = b"\xff"


class Register:
    """Four bytes that can be read and written."""

    def __init__(self, name: str = "register") -> None:
        self.name = name
        self.bytes = bytearray(4)
        self.log: list[tuple[int, bytes]] = []
        self.resets = 0

    def read(self, offset: int, length: int) -> bytes:
        """Give what was written."""
        return bytes(self.bytes[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """Keep it."""
        self.log.append((offset, data))
        self.bytes[offset : offset + len(data)] = data

    def reset(self) -> None:
        """Be zero."""
        self.bytes[:] = bytes(4)
        self.resets += 1


def test_an_access_reaches_its_device() -> None:
    """Ports and MMIO are spaces of their own; a device sees offsets into its range."""
    bus, port, memory = Bus(), Register(), Register()
    bus.add_ports(0x510, 4, port)
    bus.add_mmio(0x510, 4, memory)
    bus.write_port(0x512, 1, b"\x05")
    bus.write_mmio(0x510, b"\x01\x02")
    assert (port.log, memory.log) == ([(2, b"\x05")], [(0, b"\x01\x02")])
    assert (bus.read_port(0x512, 1), bus.read_mmio(0x510, 2)) == (b"\x05", b"\x01\x02")


def test_repeated_items_are_one_access_each() -> None:
    """OUTSW of three words is three writes."""
    bus, device = Bus(), Register()
    bus.add_ports(0, 2, device)
    bus.write_port(0, 2, b"aabbcc")
    assert device.log == [(0, b"aa"), (0, b"bb"), (0, b"cc")]


def test_an_access_belongs_to_where_it_begins() -> None:
    """A word at a device's last port is its; one that begins before it is nobody's."""
    bus, device = Bus(), Register()
    bus.add_ports(0x10, 1, device)
    bus.write_port(0x10, 2, b"ab")
    bus.write_port(0x0F, 2, b"cd")
    assert device.log == [(0, b"ab")]


@pytest.mark.parametrize("address", [0, 0xF, 0x14, 0xFFFF])
def test_what_nobody_has(address: int) -> None:
    """Reads give ones, writes are ignored."""
    bus, device = Bus(), Register()
    bus.add_ports(0x10, 4, device)
    bus.add_mmio(0x10, 4, device)
    bus.write_port(address, 1, b"x")
    bus.write_mmio(address, b"x")
    assert (bus.read_port(address, 2), bus.read_mmio(address, 8)) == (ONES * 2, ONES * 8)
    assert device.log == []


@pytest.mark.parametrize(("first", "count"), [(0x10, 4), (0x13, 1), (0xE, 3), (0, 0x100), (0x13, 8)])
def test_an_overlap_names_both(first: int, count: int) -> None:
    """Neither ports nor addresses are two devices', nor a device's and the machine's own."""
    bus = Bus()
    bus.add_ports(0x10, 4, Register("timer"))
    bus.reserve_mmio(0x10, 4, "RAM")
    with pytest.raises(ConfigError, match=r"ports of serial \(0x.*\) overlap those of timer \(0x10 to 0x13\)"):
        bus.add_ports(first, count, Register("serial"))
    with pytest.raises(ConfigError, match=r"addresses of serial \(0x.*\) overlap those of RAM \(0x10 to 0x13\)"):
        bus.add_mmio(first, count, Register("serial"))
    bus.add_ports(0x14, 4, Register("next"))
    bus.add_ports(0xC, 4, Register("before"))


def test_ranges_that_cannot_be() -> None:
    """Empty ones, and those beyond the ports or the addresses that x86 has."""
    bus = Bus()
    for first, count in ((0, 0), (0xFFFF, 2), (1 << 16, 1)):
        with pytest.raises(ConfigError, match="give one or more, which end within 0x10000"):
            bus.add_ports(first, count, Register())
    with pytest.raises(ConfigError, match="within 0x10000000000000"):
        bus.add_mmio((1 << 52) - 1, 2, Register())
    with pytest.raises(RangeError, match=r"first is -1"):
        bus.add_ports(-1, 2, Register())


def test_what_is_not_a_device() -> None:
    """WrongType says what a device has."""
    with pytest.raises(WrongType, match=r"device is .*; it can be a device: an object with name, read"):
        Bus().add_ports(0, 1, object())  # type: ignore[arg-type]
    nameless = Register()
    nameless.name = None  # type: ignore[assignment]
    with pytest.raises(WrongType, match=r"device\.name is None; it can be text"):
        Bus().add_mmio(0, 1, nameless)


@pytest.mark.parametrize("answer", [b"", b"abc", "ab", None, bytearray(2)])
def test_an_answer_of_another_length_or_type(answer: object) -> None:
    """The error names the device and what it can return."""
    bus, device = Bus(), Register("clock")
    device.read = lambda *_: answer  # type: ignore[method-assign, assignment]
    bus.add_ports(0, 4, device)
    with pytest.raises(WrongType, match=r"what the clock's read\(\) returned is .*; it can be bytes, 2 of them"):
        bus.read_port(0, 2)


def test_who_has_what() -> None:
    """By address; a reserved range has no device.  What is returned is the caller's."""
    bus, device = Bus(), Register("it")
    bus.add_ports(0x20, 2, device)
    bus.reserve_ports(0x10, 1, "a PIC")
    bus.add_mmio(0x1000, 8, device)
    ports = [(claim.base, claim.end, claim.name, claim.device) for claim in bus.port_claims]
    assert ports == [(0x10, 0x11, "a PIC", None), (0x20, 0x22, "it", device)]
    assert [(claim.base, claim.device) for claim in bus.memory_claims] == [(0x1000, device)]
    bus.port_claims.clear()
    assert len(bus.port_claims) == 2


def test_reset_reaches_each_device_once() -> None:
    """However many ranges it has."""
    bus, device = Bus(), Register()
    bus.add_ports(0, 4, device)
    bus.add_ports(8, 4, device)
    bus.add_mmio(0, 4, device)
    bus.write_port(0, 1, b"x")
    bus.reset()
    assert (device.resets, bus.read_port(0, 1)) == (1, b"\0")


def test_a_device_may_use_the_bus() -> None:
    """The bus's lock is its own thread's already."""
    bus, target = Bus(), Register()

    class Forwarder(Register):
        def write(self, offset: int, data: bytes) -> None:
            bus.write_port(8 + offset, 1, data)

    bus.add_ports(8, 4, target)
    bus.add_ports(0, 4, Forwarder())
    bus.write_port(1, 1, b"x")
    assert target.log == [(1, b"x")]


class OneByOne:
    """A ring whose writes the test puts there."""

    def __init__(self, *writes: CoalescedWrite) -> None:
        self.writes = writes

    def take(self) -> tuple[CoalescedWrite, ...]:
        """Give them once."""
        taken, self.writes = self.writes, ()
        return taken

    def register(self, _claim: object, *, is_port: bool) -> None:
        """Take any range."""


def test_a_coalesced_write_whose_device_fails() -> None:
    """Its error comes out of flush() after all other writes have reached their devices, in their order."""

    class Failing(Register):
        def write(self, offset: int, data: bytes) -> None:
            super().write(offset, data)
            raise ZeroDivisionError

    failing, device = Failing(), Register()
    ring = OneByOne(*(CoalescedWrite(True, port, b"%d" % place) for place, port in enumerate((4, 0, 4, 1))))
    bus = Bus(cast("CoalescedRing", ring))
    bus.add_ports(0, 4, device, coalesced=True)
    bus.add_ports(4, 4, failing, coalesced=True)
    with pytest.raises(ZeroDivisionError):
        bus.flush()
    assert (device.log, failing.log) == ([(0, b"1"), (1, b"3")], [(0, b"0"), (0, b"2")])
    bus.flush()


def test_a_coalesced_write_that_is_interrupted() -> None:
    """Those behind it reach their devices with the next flush()."""

    class Interrupting(Register):
        def write(self, _offset: int, _data: bytes) -> None:
            raise KeyboardInterrupt

    device = Register()
    ring = OneByOne(CoalescedWrite(True, 4, b"x"), CoalescedWrite(True, 0, b"y"))
    bus = Bus(cast("CoalescedRing", ring))
    bus.add_ports(0, 4, device, coalesced=True)
    bus.add_ports(4, 4, Interrupting(), coalesced=True)
    with pytest.raises(KeyboardInterrupt):
        bus.flush()
    bus.flush()
    assert device.log == [(0, b"y")]


def test_a_range_that_the_ring_refuses() -> None:
    """The device does not have it then, and another one can."""

    class Full(OneByOne):
        def register(self, _claim: object, *, is_port: bool) -> None:
            raise KvmError("KVM_REGISTER_COALESCED_MMIO", ENOSPC)

    bus, device = Bus(cast("CoalescedRing", Full())), Register()
    with pytest.raises(KvmError):
        bus.add_ports(0, 4, device, coalesced=True)
    assert bus.read_port(0, 1) == ONES
    bus.add_ports(0, 4, device)
    assert bus.read_port(0, 1) == b"\0"
