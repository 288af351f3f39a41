"""Which device answers an access to an I/O port, or to guest-physical memory without RAM?"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from operator import attrgetter
from typing import Final, NamedTuple, Protocol

from pvclock.arguments import flag, serving, text, whole
from pvclock.errors import ConfigError, WrongType
from pvclock.kvm import Vcpu, Vm
from pvclock.kvm.exits import CoalescedWrite
from pvclock.quantities import U64_MASK

__all__ = ["Bus", "Claim", "CoalescedRing", "Device"]

PORTS_END: Final = 1 << 16
MEMORY_END: Final = 1 << 52
"""The widest physical address that x86 has."""

NOBODY_ANSWERS: Final = b"\xff"


class Device(Protocol):
    """What a guest reads and writes at a range of ports, or of guest-physical addresses.

    offset: the access's first byte, from the start of the range; an access may end behind it.  The bus makes one call
    at a time, on the accessing vCPU's thread or, for coalesced writes, on any: against the guest a device needs no lock
    of its own, and what other threads of the host call is the device's to guard.  An error that it raises ends the
    machine's run, and Machine.wait() raises it; that of a coalesced write comes out of the call that took it from the
    ring, which may be a flush().
    """

    @property
    def name(self) -> str:
        """What errors call it."""

    def read(self, offset: int, length: int) -> bytes:
        """The `length` bytes that the guest gets."""

    def write(self, offset: int, data: bytes) -> object:
        """Take what the guest wrote, in one access."""

    def reset(self) -> object:
        """Be as after power-on; no vCPU runs meanwhile."""


class Claim(NamedTuple):
    """A range of addresses and its device; None for one that answers in the kernel, or by itself."""

    base: int
    length: int
    name: str
    device: Device | None

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.base + self.length

    def __str__(self) -> str:
        return f"{self.name} ({self.base:#x} to {self.end - 1:#x})"


class AddressSpace:
    """The claims of one address space, none over another.  find() takes no lock: a change replaces the lists."""

    def __init__(self, noun: str, end: int) -> None:
        self._noun = noun
        self._end = end
        self._table: tuple[list[int], list[Claim]] = [], []

    def add(self, claim: Claim) -> None:
        """ConfigError, which names both, if it overlaps another claim; or if it is empty or ends beyond the space."""
        if claim.length < 1 or claim.end > self._end:
            where = f"{claim.name} at {self._noun} {claim.base:#x}+{claim.length:#x}"
            raise ConfigError(f"{where}; give one or more, which end within {self._end:#x}")
        claims = self._table[1]
        for other in claims:
            if claim.base < other.end and other.base < claim.end:
                raise ConfigError(f"{self._noun} of {claim} overlap those of {other}; choose others")
        claims = sorted([*claims, claim], key=attrgetter("base"))
        self._table = [each.base for each in claims], claims

    def remove(self, claim: Claim) -> None:
        """Give its addresses back."""
        claims = [each for each in self._table[1] if each is not claim]
        self._table = [each.base for each in claims], claims

    def find(self, address: int) -> Claim | None:
        """The claim that `address` is in."""
        bases, claims = self._table
        place = bisect_right(bases, address)
        if not place:
            return None
        claim = claims[place - 1]
        return claim if address - claim.base < claim.length else None

    def claims(self) -> list[Claim]:
        """All of them, by address."""
        return list(self._table[1])

    def devices(self) -> list[Device]:
        """The devices, by address, some more than once."""
        return [claim.device for claim in self._table[1] if claim.device is not None]


class CoalescedRing:
    """KVM's ring of writes that need no exit each: all vCPUs of `vm` share it, and `vcpu` maps it."""

    def __init__(self, vm: Vm, vcpu: Vcpu) -> None:
        self._vm = vm
        self._serves_ports = bool(vm.check_extension("KVM_CAP_COALESCED_PIO"))
        self._serves_mmio = bool(vm.check_extension("KVM_CAP_COALESCED_MMIO"))
        self.take = vcpu.take_coalesced

    def register(self, claim: Claim, *, is_port: bool) -> None:
        """Keep writes of this range in the ring; on a host without one each goes on to exit."""
        if self._serves_ports if is_port else self._serves_mmio:
            self._vm.register_coalesced(claim.base, claim.length, is_port=is_port)


class Bus:
    """Routes a guest's I/O port and MMIO accesses to devices; where there is none reads give ones, writes are ignored.

    The range that an access begins in decides, however wide the access is.  An INS or OUTS with REP is one access an
    item.  ring: for devices whose writes are coalesced; without one each write is an exit.

    Thread-safety: all methods may be called from any thread; a device may call the bus.
    """

    def __init__(self, ring: CoalescedRing | None = None) -> None:
        self._ports = AddressSpace("ports", PORTS_END)
        self._memory = AddressSpace("addresses", MEMORY_END)
        self._ring = ring
        self._taken: deque[CoalescedWrite] = deque()  # from the ring, and not handed to a device yet
        # Around each device call, and from the ring to its devices: they come in the guest's order.
        self._lock = threading.RLock()

    def add_ports(self, first: int, count: int, device: Device, *, coalesced: bool = False) -> None:
        """Let `device` have these I/O ports.

        coalesced: writes that fit within them may wait in KVM's ring until the guest accesses another device, or until
        flush(), and then reach write() without an exit of their own: for devices that only collect what they are told.
        ConfigError if another device, or the in-kernel PICs, have one of them; KvmError if the ring takes no more.
        """
        self._add(self._ports, first, count, device, is_port=True, coalesced=coalesced)

    def add_mmio(self, gpa: int, length: int, device: Device, *, coalesced: bool = False) -> None:
        """Let `device` have these guest-physical addresses; coalesced and errors as for add_ports()."""
        self._add(self._memory, gpa, length, device, is_port=False, coalesced=coalesced)

    def reserve_ports(self, first: int, count: int, name: str) -> None:
        """Refuse these ports to devices: `name` has them, and their accesses do not come here."""
        self._ports.add(Claim(whole("first", first, 0), whole("count", count), text("name", name), None))

    def reserve_mmio(self, gpa: int, length: int, name: str) -> None:
        """Refuse these addresses to devices: `name` has them, RAM for one."""
        self._memory.add(Claim(whole("gpa", gpa, 0), whole("length", length), text("name", name), None))

    @property
    def port_claims(self) -> list[Claim]:
        """Who has which I/O ports."""
        return self._ports.claims()

    @property
    def memory_claims(self) -> list[Claim]:
        """Who has which guest-physical addresses, RAM among them."""
        return self._memory.claims()

    def device_at_port(self, port: int) -> Device | None:
        """The device that has this I/O port; None if there is none, or not one of ours."""
        claim = self._ports.find(whole("port", port, 0))
        return None if claim is None else claim.device

    def device_at(self, gpa: int) -> Device | None:
        """The device that has this guest-physical address; None as for device_at_port()."""
        claim = self._memory.find(whole("gpa", gpa, 0))
        return None if claim is None else claim.device

    # Accesses

    def read_port(self, port: int, length: int) -> bytes:
        """IN of `length` bytes."""
        return self._read(self._ports.find(port), port, length)

    def write_port(self, port: int, length: int, data: bytes) -> None:
        """OUT of items of `length` bytes each."""
        claim = self._ports.find(port)
        if claim is None or claim.device is None:
            return
        with self._lock:
            self.flush()
            for at in range(0, len(data), length):
                claim.device.write(port - claim.base, data[at : at + length])

    def read_mmio(self, gpa: int, length: int) -> bytes:
        """A load of `length` bytes."""
        return self._read(self._memory.find(gpa), gpa, length)

    def write_mmio(self, gpa: int, data: bytes) -> None:
        """A store."""
        claim = self._memory.find(gpa)
        if claim is None or claim.device is None:
            return
        with self._lock:
            self.flush()
            claim.device.write(gpa - claim.base, data)

    def flush(self) -> None:
        """Hand each coalesced write up to now to its device; then raise the first error of one, if any."""
        if self._ring is None:
            return
        failures: list[Exception] = []
        with self._lock:
            self._taken.extend(self._ring.take())
            while self._taken:
                is_port, address, data = self._taken.popleft()
                claim = (self._ports if is_port else self._memory).find(address)
                if claim is not None and claim.device is not None:
                    try:
                        claim.device.write(address - claim.base, data)
                    except Exception as failure:  # noqa: BLE001  # the other writes have left the ring all the same
                        failures.append(failure)
        if failures:
            raise failures[0]

    def reset(self) -> None:
        """Reset every device, once."""
        with self._lock:
            self.flush()
            for device in {id(each): each for each in (*self._ports.devices(), *self._memory.devices())}.values():
                device.reset()

    # Inside

    def _add(
        self, space: AddressSpace, base: int, length: int, device: Device, *, is_port: bool, coalesced: bool
    ) -> None:
        wanted = "a device: an object with name, read(), write() and reset()"
        serving("device", device, "read", "write", "reset", wanted=wanted)
        name = text("device.name", getattr(device, "name", None))
        flag("coalesced", coalesced)
        first, count = ("first", "count") if is_port else ("gpa", "length")
        claim = Claim(whole(first, base, 0, U64_MASK), whole(count, length), name, device)
        with self._lock:
            space.add(claim)
            if coalesced and self._ring is not None:
                try:
                    self._ring.register(claim, is_port=is_port)
                except BaseException:
                    space.remove(claim)
                    raise

    def _read(self, claim: Claim | None, address: int, length: int) -> bytes:
        if claim is None or claim.device is None:
            return NOBODY_ANSWERS * length
        with self._lock:
            self.flush()
            answer = claim.device.read(address - claim.base, length)
        if type(answer) is not bytes or len(answer) != length:
            raise WrongType(f"what the {claim.name}'s read() returned", answer, f"bytes, {length} of them")
        return answer
