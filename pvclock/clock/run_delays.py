"""How long the host kept each vCPU waiting for a CPU, as far as its guest was not told yet."""

from __future__ import annotations

from pvclock.backend import Backend

__all__ = ["RunDelays"]


class RunDelays:
    """What has come up since this was made; a vCPU's thread that is made anew begins at 0."""

    def __init__(self, backend: Backend, vcpus: int) -> None:
        self._backend = backend
        self._told_ns = [backend.run_delay_ns(vcpu) or 0 for vcpu in range(vcpus)]

    def take_ns(self, vcpu: int) -> int:
        """What was not taken before; 0 where nobody says."""
        delay_ns = self._backend.run_delay_ns(vcpu)
        if delay_ns is None:
            return 0
        told_ns, self._told_ns[vcpu] = self._told_ns[vcpu], delay_ns
        return delay_ns - told_ns if delay_ns >= told_ns else delay_ns
