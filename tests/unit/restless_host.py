"""A simulated host whose time never stands still: from one reading to the next 1 ms passes on all its clocks.

On a host that moves only when told to, any two readings are one instant; here none are.
"""

from __future__ import annotations

from typing import Final, cast

from pvclock import Reference, SimulatedBackend
from pvclock._counter import Counter
from pvclock.host.backend import Backend
from pvclock.readings import HostStamps, Sample

STEP_NS: Final = 1_000_000


class RestlessHost:
    """`inner`, with time that passes at each reading; all else is the inner one's own."""

    def __init__(self, inner: SimulatedBackend) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    @property
    def counter(self) -> Counter:
        """A look at the counter is a reading."""
        self.inner.advance(ns=STEP_NS)
        return self.inner.counter

    def sample(self, reference: Reference) -> Sample:
        """See Backend."""
        self.inner.advance(ns=STEP_NS)
        return self.inner.sample(reference)

    def stamps(self) -> HostStamps:
        """See Backend."""
        self.inner.advance(ns=STEP_NS)
        return self.inner.stamps()


def restless(inner: SimulatedBackend) -> Backend:
    """The host around `inner`."""
    return cast("Backend", RestlessHost(inner))
