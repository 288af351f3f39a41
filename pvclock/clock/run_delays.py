"""How long the host kept each vCPU waiting for a CPU, as far as its guest was not told yet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pvclock._transaction import commit
from pvclock.clock.timekeeper import Timekeeper

__all__ = ["RunDelays"]


class RunDelays:
    """What has come up since this was made; a vCPU's thread that is made anew begins at 0."""

    def __init__(self, keeper: Timekeeper) -> None:
        self._keeper = keeper
        self._told_ns = [keeper.backend.run_delay_ns(vcpu) or 0 for vcpu in range(keeper.vcpus)]

    def tell(self, addition: Callable[[int, int], Callable[[], object]]) -> None:
        """Tell guests what was not told, each vCPU's in one step; within `with changing`.

        addition: (vcpu, ns) -> what adds that to its steal time, in compiled code that no interrupt takes apart.
        """
        delays = [self._keeper.backend.run_delay_ns(vcpu) for vcpu in range(self._keeper.vcpus)]
        for vcpu, delay_ns in enumerate(delays):
            told_ns = self._told_ns[vcpu]
            if delay_ns is not None and delay_ns != told_ns:
                add = addition(vcpu, delay_ns - told_ns if delay_ns > told_ns else delay_ns)
                commit(add, partial(_with, delay_ns), partial(self._take, vcpu), self._keeper.events)

    def _take(self, vcpu: int, delay_ns: int) -> None:
        self._told_ns[vcpu] = delay_ns


def _with(delay_ns: int, _: object) -> tuple[int, tuple[()]]:
    """What is known now, and no event."""
    return delay_ns, ()
