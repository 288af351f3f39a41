"""The lines of JSON that a watch prints: each is written here, and so each has its instant."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pvclock.commands.outcome import line_json
from pvclock.commands.screen import write
from qemu_glue.watch.instants import Instants, utc_text

__all__ = ["JsonLines"]


class JsonLines:
    """Writes lines of `pvclock watch --json`; vm: the name of the VM of a fleet that they are of."""

    def __init__(self, instants: Instants, vm: str | None = None) -> None:
        self.instants = instants
        self._of_vm = {} if vm is None else {"vm": vm}

    def write(self, record: Mapping[str, object], utc_ns: int | None = None) -> None:
        """Write a record, which has its `kind`, as of an instant; None: of now.  OSError."""
        at_ns = time.time_ns() if utc_ns is None else utc_ns
        when = {"at_s": self.instants.since_begin_s(at_ns), "utc": utc_text(at_ns)}
        write(line_json("watch", {"kind": record["kind"], **when, **record, **self._of_vm}) + "\n")
