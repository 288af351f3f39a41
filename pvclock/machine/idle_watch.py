"""Does a machine's guest seem idle?  Asked without disturbing it, by what KVM counts of its vCPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Final

from pvclock.errors import KvmError
from pvclock.kvm import Vcpu
from pvclock.kvm._stats import VcpuStats
from pvclock.threads import WakeUp

__all__ = ["IdleWatch"]

EAGER_S: Final = 0.002
"""For so long it asks again and again: a guest that has just been woken mostly has little to do."""

FIRST_REST_S: Final = 50e-6
LONGEST_REST_S: Final = 0.005
BLIND_REST_S: Final = 0.001
BLIND_CHANGE_S: Final = 0.1

COUNTED: Final = frozenset(("blocking", "exits"))
"""The statistics that are needed; the first of them is younger than statistics are."""

UNMOVED_S: Final = 0.005
"""After which vCPUs are looked at that have not executed: their timer may have been set from outside."""


class IdleWatch:
    """Watches `vcpus`, more of which may come, until all of them block in the kernel; wake_up: ends a rest early.

    On a host whose KVM does not count that, before Linux 5.17, it only rests, so that the guest is looked at by being
    stopped, which costs it a little time.
    """

    def __init__(self, vcpus: Sequence[Vcpu], wake_up: WakeUp) -> None:
        self._vcpus, self._wake_up = vcpus, wake_up
        self._stats: list[VcpuStats] = []
        self._has_stats = True
        self._exits: list[int] = []

    def note(self) -> bool:
        """Take all vCPUs, which are out of the guest now, as they are; has none executed since the last time?

        Where KVM does not tell, none may have.
        """
        has_rested = not self._has_stats or not self.has_moved()
        try:
            for vcpu in self._vcpus[len(self._stats) :]:
                self._stats.append(VcpuStats(vcpu))
                self._has_stats = self._has_stats and set(self._stats[-1].names) >= COUNTED
        except KvmError:
            self._has_stats = False
        self._exits = self._read_exits()
        return has_rested

    def has_moved(self) -> bool:
        """Has a vCPU executed since note()?  Where KVM does not tell one may have."""
        return not self._has_stats or len(self._stats) < len(self._vcpus) or self._read_exits() != self._exits

    def is_idle(self) -> bool:
        """Do all vCPUs block, as far as can be told?"""
        if not self._has_stats or len(self._stats) < len(self._vcpus):
            return True
        return all(stats.read("blocking") for stats in self._stats)

    def wait(self, limit_s: float) -> bool:
        """Wait until they seem idle, for `limit_s` at most; do they?

        One that was woken just now blocks for another moment, and would be stopped in vain: so it is to have executed.
        """
        if not self._has_stats:
            self._wake_up.wait(BLIND_REST_S)
        began_s = time.monotonic()
        rest_s = FIRST_REST_S
        while not self.is_idle() or not self.has_moved():
            waited_s = time.monotonic() - began_s
            if waited_s > (UNMOVED_S if self.is_idle() else limit_s):
                return self.is_idle()
            if waited_s < EAGER_S:
                os.sched_yield()
            else:
                self._wake_up.wait(rest_s)
                rest_s = min(2 * rest_s, LONGEST_REST_S)
        return True

    def wait_for_change(self) -> None:
        """Wait until a vCPU has executed, or may have where KVM does not count, or `wake_up` is called."""
        rest_s = FIRST_REST_S if self._has_stats else BLIND_CHANGE_S
        while not self._wake_up.wait(rest_s) and not self.has_moved():
            rest_s = min(2 * rest_s, LONGEST_REST_S)

    def close(self) -> None:
        """Give the descriptors back."""
        for stats in self._stats:
            stats.close()

    def _read_exits(self) -> list[int]:
        return [stats.read("exits") for stats in self._stats] if self._has_stats else []
