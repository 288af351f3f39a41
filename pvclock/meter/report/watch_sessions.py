"""Which watch a line belongs to: a file has one, several that were appended, or one a VM of a fleet."""

from __future__ import annotations

from typing import Final

from pvclock.meter.report.fields import Fields
from pvclock.meter.report.watch_log import WatchLog

__all__ = ["WatchSessions"]

LOGS_MAX: Final = 1000
SHARED_MAX: Final = 1000
NO_WATCH: Final = frozenset({"metrics"})
"""Lines that tell of no VM's clock: where the metrics are served."""


class WatchSessions:
    """The watches of a file, in the order in which they began.

    The lines of a watch of one VM name none, but for the first; those of a fleet each have their `vm`, or null where
    they are about the host, and so about all VMs.
    """

    def __init__(self) -> None:
        self._logs: list[WatchLog] = []
        self._of_vm: dict[str | None, list[WatchLog]] = {}
        """The logs of this session by the VM's name, a log each time that it was watched; None: of the only VM."""
        self._shared: list[Fields] = []
        """The lines of this session that are about all VMs."""

    def take(self, record: Fields) -> None:
        """Take a line; ReportSourceError if a field is not as it must be."""
        kind = record.text_or_none("kind")
        if kind in NO_WATCH:
            return
        if "error" in record:
            self._all_take(record)
            self._end_session()
        elif "result" in record:
            self._take_result(record.fields("result"))
            self._end_session()
        elif kind == "found" and "vcpus" in record:
            self._found(record)
        elif "vm" in record:
            self._log_of(record.text("vm"), record).take(record)
        elif "vm" not in record.content and None in self._of_vm:
            self._log_of(None, record).take(record)
        else:
            self._all_take(record)

    def close(self) -> list[WatchLog]:
        """All watches of the file, which has ended."""
        self._end_session()
        return self._logs

    # Inside

    def _found(self, record: Fields) -> None:
        """A watch begins; and with it a session, if it is of one VM, or the first of a fleet after such a one."""
        vm = record.text_or_none("vm")  # a fleet's name of it; the watch of one VM says what it is, twice
        is_of_fleet = record.text_or_none("description") not in {None, vm}
        if (None in self._of_vm) if is_of_fleet else self._of_vm:
            self._end_session()
        name = vm if is_of_fleet else None
        log = self._log_of(name, record)
        if log.begin is not None or log.ended is not None:
            log = self._begin(name, record)
        log.take(record)

    def _log_of(self, name: str | None, record: Fields) -> WatchLog:
        """The last watch of that VM."""
        logs = self._of_vm.get(name)
        return logs[-1] if logs else self._begin(name, record)

    def _begin(self, name: str | None, record: Fields) -> WatchLog:
        if len(self._logs) >= LOGS_MAX:
            raise record.place.error(f"more than {LOGS_MAX} watches in one file", "less")
        log = WatchLog(name)
        self._logs.append(log)
        self._of_vm.setdefault(name, []).append(log)
        for each in self._shared:
            log.take(each)
        return log

    def _take_result(self, result: Fields) -> None:
        """A fleet's has an entry each time that a VM was watched, those of a name in order; the first ones may lack."""
        if "vms" not in result:
            self._log_of(None, result).end = result
            return
        ends: dict[str, list[Fields]] = {}
        for each in result.all_fields("vms"):
            ends.setdefault(each.text("vm"), []).append(each)
        for name, of_name in ends.items():
            watched = [log for log in self._of_vm.get(name, ()) if log.begin is not None]
            for log, end in zip(reversed(watched), reversed(of_name), strict=False):
                log.end = end
        for each in result.all_fields("not_watched"):
            if (name := each.text("vm")) not in self._of_vm:
                self._begin(name, each).ended = each.text("why")
        if not self._of_vm:
            self._begin(None, result).ended = "there was no VM"

    def _all_take(self, record: Fields) -> None:
        """What is about the host, or ended the watch, is about all that are watched, and will be."""
        last = [logs[-1] for logs in self._of_vm.values()]
        for log in [log for log in last if log.ended is None] or last:
            log.take(record)
        if len(self._shared) < SHARED_MAX:
            self._shared.append(record)

    def _end_session(self) -> None:
        if self._shared and not self._of_vm:
            self._begin(None, self._shared[-1])
        self._of_vm, self._shared = {}, []
