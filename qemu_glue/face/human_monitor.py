"""QEMU's monitor for people (HMP), by QMP's human-monitor-command: the commands that tools parse the answers of.

A mistake is told in the text, as QEMU does; no line is an error of QMP's.  Source: QEMU's monitor/hmp.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

import pvclock
from pvclock.machine import Machine, RunState
from qemu_glue.errors import QmpRefusal
from qemu_glue.face.dispatch import Command, command_of
from qemu_glue.face.hmp_expression import evaluate
from qemu_glue.face.machine_tree import RAM
from qemu_glue.face.memory_dump import DumpFormat, dump, parse_format
from qemu_glue.face.memory_map import flat_views
from qemu_glue.face.register_dump import registers

__all__ = ["HumanMonitor"]

NAME: Final = re.compile(r"\s*([^\s/]*)\s*")
FORMAT: Final = re.compile(r"/(\S*)\s*")


class Line(NamedTuple):
    """A command: how it is called, what it takes, what it is for, and what does it, with the rest of its line."""

    name: str
    arguments: str
    help: str
    run: Callable[[str], Iterable[str]]

    @property
    def usage(self) -> str:
        """As `help` prints it."""
        return f"{self.name} {self.arguments} -- {self.help}"


class HumanMonitor:
    """The lines for `machine`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._format = DumpFormat()
        self._cpu = 0  # the vCPU that the command is for
        lines = (
            Line(
                "gpa2hva", "addr", "print the host virtual address corresponding to a guest physical address", self._hva
            ),
            Line("help|?", "[cmd]", "show the help", self._help),
            Line("info", "[subcommand]", "show various information about the system state", self._info),
            Line("xp", "/fmt addr", "physical memory dump starting at 'addr'", self._dump),
        )
        subjects = (
            Line("info mtree", "-f", "show the memory map", self._mtree),
            Line("info registers", "[-a|vcpu]", "show the cpu registers", self._registers),
            Line("info status", "", "show the current VM status (running|paused)", self._status),
            Line("info version", "", "show the version of pvclock", self._version),
        )
        self._lines = {name: line for line in lines for name in line.name.split("|")}
        self._subjects = {line.name.removeprefix("info "): line for line in subjects}

    def table(self) -> dict[str, Command]:
        """human-monitor-command."""
        return {"human-monitor-command": command_of(self._command)}

    def _command(self, command_line: str, cpu_index: int | None = None) -> str:
        if cpu_index is not None:
            self._check_cpu(cpu_index)
        self._cpu = cpu_index or 0
        return "".join(f"{line}\r\n" for line in self._answer(command_line))

    def _answer(self, text: str) -> list[str]:
        name, rest = _first(text)
        line = self._lines.get(name)
        if line is not None and line.name == "info" and rest:
            subject, rest = _first(rest)
            name, line = f"info {subject}", self._subjects.get(subject)
        if line is None:
            return [f"unknown command: '{name}'"] if name else []
        try:
            return list(line.run(rest))
        except QmpRefusal as refusal:
            return [refusal.desc, f'Try "help {line.name}" for more information']

    # Commands

    def _help(self, rest: str) -> Iterator[str]:
        if not rest:
            yield from (line.usage for line in self._lines.values())
            return
        name, behind = _first(rest)
        found = self._subjects.get(behind) if name == "info" and behind else self._lines.get(name)
        yield f"unknown command: '{rest}'" if found is None else found.usage

    def _info(self, _rest: str) -> Iterator[str]:
        return (line.usage for line in self._subjects.values())

    def _status(self, rest: str) -> Iterator[str]:
        _check_end("status", rest)
        state = self._machine.run_state.current
        shown = f" ({state})" if state not in (RunState.RUNNING, RunState.PAUSED) else ""
        yield f"VM status: {'running' if state is RunState.RUNNING else 'paused'}{shown}"

    def _version(self, rest: str) -> Iterator[str]:
        _check_end("version", rest)
        yield f"{pvclock.__version__}pvclock {pvclock.__version__}"

    def _mtree(self, rest: str) -> Iterator[str]:
        if rest.startswith("-") and not rest.startswith("-f"):
            raise QmpRefusal(f"mtree: unsupported option {rest[:2]}")
        _check_end("mtree", rest.removeprefix("-f").lstrip())
        if not rest:
            raise QmpRefusal("mtree: the flat view alone is here: info mtree -f")
        return flat_views(self._machine, RAM)

    def _registers(self, rest: str) -> Iterator[str]:
        chosen = [self._cpu]
        if rest.startswith("-a"):
            chosen, rest = list(range(len(self._machine.vcpus))), rest.removeprefix("-a").lstrip()
        elif rest:
            number, rest = evaluate(rest)
            chosen = [number]
        _check_end("registers", rest)
        if chosen[0] >= len(self._machine.vcpus):
            yield f"CPU#{chosen[0]} not available"
            return
        with self._machine.runner.quiesce():
            lines = [line for number in chosen for line in registers(self._machine.vcpus[number])]
        yield from lines

    def _dump(self, rest: str) -> Iterator[str]:
        found = FORMAT.match(rest)
        chosen = self._format._replace(items=1) if found is None else parse_format(found[1], self._format)
        address, rest = evaluate(rest if found is None else rest[found.end() :])
        _check_end("xp", rest)
        self._format = chosen
        return dump(chosen, address, self._read)

    def _hva(self, rest: str) -> Iterator[str]:
        address, rest = evaluate(rest)
        _check_end("gpa2hva", rest)
        memory = self._machine.memory
        if memory.contains(address, 1):
            yield f"Host virtual address for {address:#x} ({RAM}) is {memory.host_address(address):#x}"
        elif any(claim.base <= address < claim.end for claim in self._machine.bus.memory_claims):
            yield f"Memory at address {address:#x} is not RAM"
        else:
            yield f"No memory is mapped at address {address:#x}"

    # Inside

    def _read(self, address: int, length: int) -> bytes | None:
        memory = self._machine.memory
        return memory.read(address, length) if memory.contains(address, length) else None

    def _check_cpu(self, number: int) -> None:
        if not 0 <= number < len(self._machine.vcpus):
            raise QmpRefusal("Parameter 'cpu-index' expects a CPU number")


def _first(text: str) -> tuple[str, str]:
    """The command's name, which ends at a blank or a slash, and what is behind it."""
    found = NAME.match(text)
    assert found is not None  # noqa: S101  # it may be empty
    return found[1], text[found.end() :].rstrip()


def _check_end(name: str, rest: str) -> None:
    if rest:
        raise QmpRefusal(f"{name}: extraneous characters at the end of line")
