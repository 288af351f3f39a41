"""The register by which a PC's guest learns of vCPUs: what it reads, and when its interrupt is raised."""

from __future__ import annotations

import pytest

from pvclock.machine.devices.vcpu_register import VcpuRegister

pytestmark = pytest.mark.row("E22")


class Wiring:
    """A register of `vcpus`, and the level of its line."""

    def __init__(self, vcpus: int) -> None:
        self.vcpus = vcpus
        self._line = False
        self.register = VcpuRegister(lambda: self.vcpus, self.set_line)

    def set_line(self, is_high: bool) -> None:
        """Take the level."""
        self._line = is_high

    def is_raised(self) -> bool:
        """Is the line high?"""
        return self._line


def test_the_line_is_high_while_the_guest_knows_fewer() -> None:
    """From the first that comes until the guest has written how many there are, also where one comes meanwhile."""
    wiring = Wiring(2)
    wiring.register.tell()
    assert not wiring.is_raised()
    wiring.vcpus = 3
    wiring.register.tell()
    assert wiring.is_raised()
    wiring.vcpus = 4
    wiring.register.write(0, b"\3\0")
    assert wiring.is_raised()
    wiring.register.write(0, b"\4\0")
    assert not wiring.is_raised()


def test_a_guest_that_boots_knows_all() -> None:
    """After a reset nobody is told of those that the tables have."""
    wiring = Wiring(1)
    wiring.vcpus = 3
    wiring.register.tell()
    wiring.register.reset()
    assert not wiring.is_raised()
    wiring.register.tell()
    assert not wiring.is_raised()


@pytest.mark.parametrize(("offset", "length", "read"), [(0, 2, "0401"), (0, 1, "04"), (1, 1, "01"), (0, 4, "04010000")])
def test_any_access_reads(offset: int, length: int, read: str) -> None:
    """16 bits, the lowest first, and zeros behind them."""
    assert Wiring(0x104).register.read(offset, length).hex() == read


@pytest.mark.parametrize(("offset", "data"), [(0, b"\1"), (1, b"\1"), (1, b"\0\1"), (0, b"\1\0\0\0")])
def test_only_the_whole_register_is_written(offset: int, data: bytes) -> None:
    """Anything else is ignored: the guest still knows of all."""
    wiring = Wiring(3)
    wiring.register.write(offset, data)
    assert not wiring.is_raised()


def test_a_guest_can_write_what_it_likes() -> None:
    """More than there are lowers the line; fewer raises it."""
    wiring = Wiring(3)
    wiring.register.write(0, b"\0\0")
    assert wiring.is_raised()
    wiring.register.write(0, b"\xff\xff")
    assert not wiring.is_raised()
