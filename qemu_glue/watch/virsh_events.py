"""The events of a libvirt domain's QEMU, which `virsh qemu-monitor-event --loop` prints as they come."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress
from typing import Final

from qemu_glue.errors import VirshFailed
from qemu_glue.peer.launch import LAUNCHER, find_program
from qemu_glue.peer.monitor import QmpEvent

__all__ = ["VirshEvents"]

EVENT: Final = re.compile(r"event (?P<name>\S+) at (?P<s>\d+)\.(?P<us>\d{6}) for domain")
END_LIMIT_S: Final = 2.0
READ_BYTES: Final = 1 << 16


class VirshEvents:
    """Listens by a virsh of its own, which needs about 0.1 s until it hears; it ends with the thread that began it."""

    def __init__(self, program: str, domain: str) -> None:
        self._ear, mouth = os.pipe()
        os.set_blocking(self._ear, False)
        self._unfinished_line = ""
        self._complaints: list[str] = []
        self._events: list[QmpEvent] = []
        try:
            self._virsh = subprocess.Popen(
                [
                    *(find_program(*LAUNCHER), "--pdeathsig", "TERM", "--"),
                    *(program, "qemu-monitor-event", "--domain", domain, "--loop"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=mouth,
                stderr=mouth,
                process_group=0,  # Ctrl-C reaches this process alone, which ends virsh in order
            )
        except BaseException:
            os.close(self._ear)
            raise
        finally:
            os.close(mouth)

    @property
    def why_none(self) -> str | None:
        """Why there are none any more; None if virsh listens."""
        if self._virsh.poll() is None:
            return None
        self._listen()
        return f"virsh qemu-monitor-event has ended: {'; '.join(self._complaints) or self._virsh.returncode}"

    def take(self) -> list[QmpEvent]:
        """Those since the last call, oldest first; VirshFailed once virsh has ended and none are left."""
        why_none = self.why_none
        self._listen()
        events, self._events = self._events, []
        if why_none and not events:
            raise VirshFailed("qemu-monitor-event", why_none)
        return events

    def close(self) -> None:
        """Listen no more."""
        self._virsh.terminate()
        try:
            self._virsh.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._virsh.kill()
            self._virsh.wait()
        os.close(self._ear)

    def _listen(self) -> None:
        *lines, self._unfinished_line = (self._unfinished_line + self._heard()).split("\n")
        for line in lines:
            if match := EVENT.match(line):
                self._events.append(QmpEvent(match["name"], (int(match["s"]) * 10**6 + int(match["us"])) * 1000))
            elif line:
                self._complaints.append(line.removeprefix("error: "))

    def _heard(self) -> str:
        heard = b""
        with suppress(BlockingIOError):
            while more := os.read(self._ear, READ_BYTES):
                heard += more
        return heard.decode(errors="replace")
