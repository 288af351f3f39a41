"""Which watch a line belongs to: a file has one, several that were appended, or one a VM of a fleet."""

from __future__ import annotations

from typing import Final

from pvclock.meter.report.fields import Fields
from pvclock.meter.report.watch_log import WatchLog

__all__ = ["WatchSessions"]

SESSIONS_MAX: Final = 1000
NO_WATCH: Final = frozenset({"metrics"})
"""Lines that tell of no VM's clock: where the metrics are served."""


class WatchSessions:
    """The watches of a file, in the order in which they began.

    The lines of a watch of one VM name none, but for the first; those of a fleet each have their `vm`, or null where
    they are about the host.
    """

    def __init__(self) -> None:
        self.logs: list[WatchLog] = []
        self._of_vm: dict[str | None, WatchLog] = {}
        self._last: WatchLog | None = None

    def take(self, record: Fields) -> None:
        """Take a line; ReportSourceError if a field is not as it must be."""
        if record.content.get("kind") in NO_WATCH:
            return
        if "error" in record:
            self._all_take(record)
        elif "result" in record:
            self._end(record)
        elif record.content.get("kind") == "found" and "vcpus" in record:
            self._begin(record).take(record)
        elif "vm" not in record.content:
            (self._last or self._begin(record)).take(record)
        elif "vm" in record:
            name = record.text("vm")
            (self._of_vm.get(name) or self._begin(record)).take(record)
        else:
            self._all_take(record)

    def _begin(self, record: Fields) -> WatchLog:
        if len(self.logs) >= SESSIONS_MAX:
            raise record.place.error(f"more than {SESSIONS_MAX} watches in one file", "less")
        nameless = self._of_vm.get(None)
        if nameless is not None and nameless.begin is None:
            log = nameless  # a newer pvclock may tell something before the first line that is known
        else:
            log = WatchLog(record.text_or_none("vm"))
            self.logs.append(log)
        self._last = self._of_vm[record.text_or_none("vm")] = log
        return log

    def _end(self, record: Fields) -> None:
        result = record.fields("result")
        if "vms" not in result:
            (self._last or self._begin(record)).end = result
        else:
            for each in result.all_fields("vms"):
                if (log := self._of_vm.get(each.text("vm"))) is not None:
                    log.end = each
        self._of_vm, self._last = {}, None

    def _all_take(self, record: Fields) -> None:
        """What is about the host, or ended the watch, is about all that are watched."""
        for log in set(self._of_vm.values()) or {self._begin(record)}:
            log.take(record)
