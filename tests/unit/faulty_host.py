"""A simulated host, a VMM and a source of samples of which any call can fail: the n-th of one kind, or the n-th at all.

On entry, or ("..., done") when it has done what it does: then it is done, and raises all the same.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, cast

from pvclock import SimulatedBackend
from pvclock.host.backend import Backend
from pvclock.quantities import HostTsc
from pvclock.readings import Sample

POINTS: Final = (
    "on_dirty",
    "source",
    "stamps",
    "sample",
    "tsc_readings",
    "tsc_offset",
    "set_tsc_offset",
    "set_tsc_offset, done",
    "run_until",
    "run_until, done",
    "run_delay_ns",
    "vcpus_are_out",
    "quiesce",
    "quiesce, done",
)
"""Where a callback of the VMM's can fail."""


class Faults:
    """Lets the n-th call (from 1 on) at one of POINTS raise `error`."""

    def __init__(self) -> None:
        self.calls: Tally[str] = Tally()
        self.error: BaseException | None = None
        self._point, self._left = "", 0

    def arm(self, point: str, nth: int, error: BaseException) -> None:
        """Fail at the nth call from now on, once."""
        self._point, self._left, self.error = point, nth, error

    def disarm(self) -> bool:
        """Fail no more; returns if it has failed."""
        has_failed, self._point = self._point == "" and self.error is not None, ""
        self.error = None
        return has_failed

    def call(self, point: str) -> None:
        """There is a call at that point."""
        self.calls[point] += 1
        if point != self._point:
            return
        self._left -= 1
        if not self._left:
            self._point = ""
            assert self.error is not None
            raise self.error


class FaultyHost:
    """`inner`, with calls that fail as `faults` says."""

    def __init__(self, inner: SimulatedBackend, faults: Faults) -> None:
        self.inner, self._faults = inner, faults

    def __getattr__(self, name: str) -> object:
        value = getattr(self.inner, name)
        return self._failing(name, value) if name in POINTS else value

    def _failing(self, name: str, method: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            self._faults.call(name)
            result = method(*arguments)
            if f"{name}, done" in POINTS:
                self._faults.call(f"{name}, done")
            return result

        return call

    @contextmanager
    def quiesce(self, vcpu: int | None) -> Iterator[None]:
        """See Backend."""
        self._faults.call("quiesce")
        with self.inner.quiesce(vcpu):
            yield
        self._faults.call("quiesce, done")


def faulty(inner: SimulatedBackend, faults: Faults) -> Backend:
    """The host around `inner`."""
    return cast("Backend", FaultyHost(inner, faults))


def failing_source(inner: SimulatedBackend, faults: Faults, ahead_ns: Callable[[], int]) -> Callable[[], Sample]:
    """Samples of `inner`'s reference clock, which is ahead_ns() more."""

    def sample() -> Sample:
        faults.call("source")
        return Sample(HostTsc(inner.tsc), inner.ref_ns + ahead_ns(), 50.0)

    return sample
