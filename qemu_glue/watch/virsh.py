"""The monitor of a libvirt domain's QEMU, through virsh: libvirt keeps QEMU's QMP socket to itself.

libvirt marks the domain as tainted ("custom-monitor") at the first command, which changes nothing else of it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from qemu_glue.errors import VirshFailed
from qemu_glue.peer.launch import find_program
from qemu_glue.peer.monitor import ANSWER_LIMIT_S, QmpEvent
from qemu_glue.watch.virsh_events import VirshEvents

__all__ = ["Virsh"]

PROGRAM: Final = ("virsh", "libvirt-clients")
"""And the Debian package that has it."""

THIS_HOST: Final = {None, "localhost"}
"""Hosts in a libvirt URI that are this one."""


class Virsh:
    """A session with the QEMU of `domain` (name, id or UUID), which runs on this host.

    LIBVIRT_DEFAULT_URI chooses the libvirt, as for virsh itself.  QemuMissing without virsh; VirshFailed if there is no
    such domain, if it does not run, or not here.
    """

    def __init__(self, domain: str) -> None:
        self._domain = domain
        self._program = find_program(*PROGRAM)
        self._uri = _run(self._program, "uri").strip()
        if urlsplit(self._uri).hostname not in THIS_HOST:
            raise VirshFailed("uri", f"{self._uri} is another host, which has another TSC; run this command there")
        self._uuid = self.execute("query-uuid")["UUID"]
        self._events = VirshEvents(self._program, domain)

    @property
    def why_no_events(self) -> str | None:
        """Why take_events() has none; None if it has."""
        return self._events.why_none

    def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None) -> Any:  # noqa: ANN401  # JSON
        """QEMU's answer to a QMP command; VirshFailed.  fd: a descriptor that goes with it, which needs libvirt 8.2."""
        question = json.dumps({"execute": command, "arguments": dict(arguments or {})})
        try:
            words = ("qemu-monitor-command", "--domain", self._domain, "--cmd", question)
            answer = json.loads(_run(self._program, *words, fd=fd))
        except VirshFailed as failure:
            where = f"(libvirt: {self._uri}; LIBVIRT_DEFAULT_URI chooses another)"
            raise VirshFailed(command, f"{failure.why} {where}") from None
        if "error" in answer:
            raise VirshFailed(command, f"refused: {answer['error']['desc']}")
        return answer["return"]

    def pid(self) -> int | None:
        """QEMU's process, known by the UUID that libvirt puts on its command line; None if it is not to be seen."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # one that has just ended
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if ("-uuid", self._uuid) in pairwise(words):
                    return int(process.name)
        return None

    def take_events(self) -> list[QmpEvent]:
        """What QEMU told since the last call, oldest first; VirshFailed once virsh does not listen any more."""
        return self._events.take()

    def close(self) -> None:
        """Listen no more; domain and libvirt run on."""
        self._events.close()


def _run(program: str, *words: str, fd: int | None = None) -> str:
    """What virsh prints; VirshFailed with its complaint."""
    passed = () if fd is None else (fd,)
    command = [program, *words, *(f"--pass-fds={fd}" for fd in passed)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            pass_fds=passed,
            timeout=ANSWER_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise VirshFailed(words[0], f"no answer within {ANSWER_LIMIT_S:g} s") from None
    if done.returncode:
        raise VirshFailed(words[0], _one_line(done.stderr) or f"exit status {done.returncode}")
    return done.stdout


def _one_line(complaint: str) -> str:
    return "; ".join(line.removeprefix("error: ") for line in complaint.splitlines() if line.strip())
