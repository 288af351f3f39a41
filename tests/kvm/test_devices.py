"""Devices on a machine's bus, real guests that talk to them, and a coalesced console under a flood."""

from __future__ import annotations

from threading import Event, Thread
from typing import Final

import pytest

from pvclock.boot import EntryState, enter
from pvclock.errors import ConfigError, WrongType
from pvclock.machine import CONSOLE_PORT, EXIT_PORT, Machine
from tests.kvm.guests import HLT, out
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E9")]

IMAGE: Final = 0x7C00
DATA: Final = 0x5000
RUNNABLE: Final = 0

ADDER_PORT: Final = 0x510
BEYOND_RAM: Final = 0x20000


class Adder:
    """Adds up the bytes that are written to it; a read gives the sum, in each byte."""

    name = "adder"

    def __init__(self) -> None:
        self.sum = 0
        self.offsets: list[int] = []

    def read(self, _offset: int, length: int) -> bytes:
        """Give the sum."""
        return bytes([self.sum & 0xFF]) * length

    def write(self, offset: int, data: bytes) -> None:
        """Add."""
        self.offsets.append(offset)
        self.sum += sum(data)

    def reset(self) -> None:
        """Begin at 0."""
        self.sum = 0


def mov_dx(port: int) -> bytes:
    """Load a port's number."""
    return b"\xba" + port.to_bytes(2, "little")


ADD_BY_PORTS: Final = (
    mov_dx(ADDER_PORT)
    + bytes.fromhex("b005 ee 42 b80102 ef 4a ec")  # mov $5, %al; out; inc %dx; mov $0x201, %ax; out %ax; dec %dx; in
    + bytes([0xE6, EXIT_PORT])
)
ADD_BY_MMIO: Final = (
    bytes.fromhex("b80020 8ed8 c606000005 c7060100 0102 a00000")  # mov $0x2000, %ds; movb $5, 0; movw $0x201, 1; mov 0
    + bytes([0xE6, EXIT_PORT])
)


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("image", [ADD_BY_PORTS, ADD_BY_MMIO], ids=["ports", "mmio"])
def test_a_device_of_the_users_own(image: bytes, coalesced: bool) -> None:
    """Its guest writes to it by bytes and words and reads the sum; coalesced writes have come before the read."""
    adder = Adder()
    with Machine(image, memory_bytes=1 << 16) as machine:
        machine.bus.add_ports(ADDER_PORT, 4, adder, coalesced=coalesced)
        machine.bus.add_mmio(BEYOND_RAM, 4, adder, coalesced=coalesced)
        machine.start()
        assert machine.wait(HANG_S) == 8
        machine.reset()
        assert adder.sum == 0
        machine.start()
        assert machine.wait(HANG_S) == 8
    assert adder.offsets == [0, 1] * 2


def test_what_a_device_may_not_have() -> None:
    """RAM, KVM's own pages, the PICs' ports and those of the machine's devices; the error names both."""
    with Machine(HLT) as machine:
        for first, owner in ((0xE9, "debug console"), (0xF4, "exit port"), (0x20, "an in-kernel PIC")):
            with pytest.raises(ConfigError, match=rf"ports of adder \(.*\) overlap those of {owner} \("):
                machine.bus.add_ports(first, 1, Adder())
        for gpa, owner in ((0, "RAM"), (0xFEC00000, "the IOAPIC"), (0xFEE00FFF, "the local APIC"), (0xFFFBD000, "KVM")):
            with pytest.raises(ConfigError, match=rf"addresses of adder \(.*\) overlap those of {owner}"):
                machine.bus.add_mmio(gpa, 1, Adder())


class Broken(Adder):
    """Returns what is not an answer."""

    name = "broken"

    def read(self, _offset: int, length: int) -> bytes:
        """Be one byte short."""
        return bytes(length - 1)


def test_a_device_that_fails_ends_the_run() -> None:
    """wait() raises its error, which names it."""
    with Machine(ADD_BY_PORTS) as machine:
        machine.bus.add_ports(ADDER_PORT, 4, Broken())
        machine.start()
        with pytest.raises(WrongType, match=r"what the broken's read\(\) returned"):
            machine.wait(HANG_S)
        assert machine.run_state.current == "internal-error"


class Slow(Adder):
    """Counts its accesses, and keeps the first one waiting until it is told to go on."""

    name = "slow"

    def __init__(self) -> None:
        super().__init__()
        self.accesses = 0
        self.is_asked, self.may_answer = Event(), Event()

    def read(self, _offset: int, length: int) -> bytes:
        """Answer ones, late the first time."""
        self.accesses += 1
        self.is_asked.set()
        assert self.may_answer.wait(HANG_S)
        return b"\xff" * length

    def write(self, offset: int, data: bytes) -> None:
        """Take it, late the first time."""
        self.read(offset, len(data))


def test_a_start_while_an_exit_of_the_last_run_is_served() -> None:
    """What that exit says is of the last run, and is forgotten."""
    slow = Slow()
    with Machine(out(0x50, 1) + out(EXIT_PORT, 5) + bytes.fromhex("ebfe")) as machine:
        machine.bus.add_ports(0x50, 1, slow, coalesced=True)
        machine.start()
        assert slow.is_asked.wait(HANG_S)
        machine.runner.gate.end()  # as another vCPU's crash does
        starting = Thread(target=machine.start)
        starting.start()
        starting.join(0.05)
        slow.may_answer.set()
        starting.join()
        assert (machine.run_state.current, machine.exit_code) == ("running", None)


@pytest.mark.parametrize(
    ("instruction", "accesses"),
    [("66a1fe0f", 2), ("b90001 f3a4", 256)],  # mov 0xffe, %eax: over a page's end; mov $256, %cx; rep movsb
    ids=["two pages", "repeated"],
)
def test_a_reset_within_an_instruction(instruction: str, accesses: int) -> None:
    """What the kernel has yet to do of an instruction that reads a device several times is not done to the new boot."""
    slow = Slow()
    load_ds = bytes.fromhex("b80020 8ed8")  # mov $0x2000, %ds
    with Machine(load_ds + bytes.fromhex(instruction) + out(EXIT_PORT, 7), memory_bytes=1 << 16) as machine:
        machine.bus.add_mmio(BEYOND_RAM, 0x2000, slow)
        machine.start()
        assert slow.is_asked.wait(HANG_S)
        resetting = Thread(target=machine.reset)
        resetting.start()
        while not machine.runner.gate.has_ended():
            pass
        slow.may_answer.set()
        resetting.join()
        assert machine.wait(HANG_S) == 7
    assert slow.accesses == 1 + accesses


# The console

WRITES: Final = 50_000

# BL: which vCPU; mov $WRITES, %cx
# 1: mov %cl, %al; and $31, %al; or %bl, %al; out %al, $0xe9; loop 1b
# lock incb DATA; 2: cmpb $2, DATA; jne 2b; out %al, $0xf4
FLOOD: Final = (
    b"\xb9"
    + WRITES.to_bytes(2, "little")
    + bytes.fromhex("88c8 241f 08d8 e6e9 e2f6 f0fe060050 803e005002 75f9")
    + out(EXIT_PORT, 0)
)


@pytest.mark.parametrize("coalesces", [True, False], ids=["ring", "exits"])
def test_a_flood_from_two_vcpus(coalesces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each vCPU's bytes are there, all of them and in its order, while somebody reads the console all the time.

    Where KVM has no ring for ports each byte is an exit.
    """
    if not coalesces:
        monkeypatch.setattr("pvclock.machine.bus.CoalescedRing.register", lambda *_, **__: None)
    with Machine(FLOOD, vcpus=2) as machine:
        for vcpu in machine.vcpus:
            enter(vcpu, EntryState("real", IMAGE, {"rbx": 0x40 | vcpu.vcpu_id << 5}))
            vcpu.set_mp_state(RUNNABLE)
        machine.start()
        while not machine.runner.join(0.001):
            assert len(machine.console) <= 2 * WRITES
        assert machine.wait(HANG_S) == 0
        text = machine.console.encode()
    assert len(text) == 2 * WRITES
    for number in range(2):
        written = [byte & 31 for byte in text if byte >> 5 & 1 == number]
        assert written == [n & 31 for n in range(WRITES, 0, -1)]


def test_the_console_is_there_after_close() -> None:
    """What waits in the ring, which goes with the vCPUs, is taken before."""
    spin = bytes.fromhex("c606005001 ebfe")  # movb $1, DATA; jmp .
    with Machine(out(CONSOLE_PORT, 0x21) + spin) as machine:
        machine.start()
        while not any(machine.memory.read(DATA, 1)):
            pass
    assert machine.console == "!"
