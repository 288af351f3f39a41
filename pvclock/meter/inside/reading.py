"""A probe's line, found in whatever its console printed, and checked."""

from __future__ import annotations

from pvclock.meter.inside.record import ProbeRecord

__all__ = ["parse_record"]


def parse_record(text: str | bytes) -> ProbeRecord:
    """The last whole record in a console's output, amid other lines, escape sequences and carriage returns.

    ProbeRecordError says what is wrong with a damaged one and where; ProbeFailed tells what a probe reported instead.
    """
    raise NotImplementedError
