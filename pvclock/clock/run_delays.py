"""The run delay of each vCPU (runnable, waiting for a host CPU) that its guest has not been told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pvclock._transaction import commit
from pvclock.clock.timekeeper import Timekeeper

__all__ = ["RunDelays"]


class RunDelays:
    """Run delay since construction, in ns; if a vCPU gets a new thread, its count restarts at 0."""

    def __init__(self, keeper: Timekeeper) -> None:
        self._keeper = keeper
        self._told_ns = [keeper.backend.run_delay_ns(vcpu) or 0 for vcpu in range(keeper.vcpus)]

    def tell(self, addition: Callable[[int, int], Callable[[], object]]) -> None:
        """Add each vCPU's untold delay to its steal time, one step per vCPU; call inside `with changing`.

        addition: (vcpu, ns) -> a compiled callable that does so, which no signal handler can interrupt.
        """
        delays = [self._keeper.backend.run_delay_ns(vcpu) for vcpu in range(self._keeper.vcpus)]
        for vcpu, delay_ns in enumerate(delays):
            told_ns = self._told_ns[vcpu]
            if delay_ns is not None and delay_ns != told_ns:
                add = addition(vcpu, delay_ns - told_ns if delay_ns > told_ns else delay_ns)
                commit(add, partial(_told_delay, delay_ns), partial(self._take, vcpu), self._keeper.events)

    def _take(self, vcpu: int, delay_ns: int) -> None:
        self._told_ns[vcpu] = delay_ns


def _told_delay(delay_ns: int, _: object) -> tuple[int, tuple[()]]:
    """For commit(): the delay now told, and no event."""
    return delay_ns, ()
