"""QMP's commands for a machine's memory: what it is made of, and its content into a file of the server's host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from pvclock import GuestAddressError
from pvclock.kvm import Vcpu
from pvclock.machine import Machine
from qemu_glue.errors import QmpRefusal
from qemu_glue.face.answers import MemdevInfo
from qemu_glue.face.dispatch import Command, command_of
from qemu_glue.face.machine_tree import RAM, ram_bytes

__all__ = ["MemoryCommands"]

CHUNK_BYTES: Final = 1 << 20
PAGE_BYTES: Final = 4096
LINEAR_END: Final = 1 << 64


class MemoryCommands:
    """The commands for the memory of `machine`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def table(self) -> dict[str, Command]:
        """Each command by its name."""
        functions: dict[str, Callable[..., object]] = {
            "query-memdev": self._query_memdev,
            "pmemsave": self._pmemsave,
            "memsave": self._memsave,
        }
        return {name: command_of(function) for name, function in functions.items()}

    def _query_memdev(self) -> list[MemdevInfo]:
        return [
            {
                "id": RAM,
                "size": ram_bytes(self._machine),
                "merge": False,
                "dump": True,
                "prealloc": False,
                "share": True,
                "reserve": True,
                "host-nodes": [],
                "policy": "default",
            }
        ]

    def _pmemsave(self, val: int, size: int, filename: str) -> None:
        memory = self._machine.memory
        if size < 0 or not memory.contains(val, size):
            raise QmpRefusal(f"Invalid addr {val:#x}/size {size} specified")
        chunks = (memory.read(val + at, min(CHUNK_BYTES, size - at)) for at in range(0, size, CHUNK_BYTES))
        _write(filename, chunks)

    def _memsave(self, val: int, size: int, filename: str, cpu_index: int = 0) -> None:
        """By the page tables of a vCPU, all of which stand still; no more than there is RAM."""
        machine = self._machine
        if not 0 <= cpu_index < len(machine.vcpus):
            raise QmpRefusal("Parameter 'cpu-index' expects a CPU number")
        is_refused = val < 0 or not 0 <= size <= ram_bytes(machine) or val + size > LINEAR_END
        with machine.runner.quiesce():
            parts = None if is_refused else _physical(machine.vcpus[cpu_index], val, size)
            if parts is None:
                raise QmpRefusal(f"Invalid addr 0x{val % LINEAR_END:016x}/size {size} specified")
            try:
                _write(filename, (machine.memory.read(gpa, length) for gpa, length in parts))
            except GuestAddressError:
                raise QmpRefusal(f"Invalid addr 0x{val:016x}/size {size} specified") from None


def _physical(vcpu: Vcpu, linear: int, size: int) -> list[tuple[int, int]] | None:
    """Where these linear addresses are, by pages, as gpa and length; None if one of them is nowhere."""
    found = []
    for at, length in _pages(linear, size):
        gpa = vcpu.translate(at)
        if gpa is None:
            return None
        found.append((gpa, length))
    return found


def _pages(first: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a range that lie in one page each."""
    at, end = first, first + size
    while at < end:
        length = min(end - at, PAGE_BYTES - at % PAGE_BYTES)
        yield at, length
        at += length


def _write(filename: str, chunks: Iterable[bytes]) -> None:
    try:
        with Path(filename).open("wb") as file:
            file.writelines(chunks)
    except OSError as error:
        raise QmpRefusal(f"Could not open '{filename}': {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise QmpRefusal(f"Could not open '{filename}': {error}") from None
