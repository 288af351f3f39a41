"""Puts a saved state into a clock that was just made for it."""

from __future__ import annotations

from pvclock.clock import capture
from pvclock.clock.capture import ClockParts
from pvclock.clock.guest_side import GuestSide
from pvclock.readings import Reference
from pvclock.state.clock_state import ClockState
from pvclock.timekeeping.catchup import Policy
from pvclock.timekeeping.events import EventKind
from pvclock.timekeeping.sampling import SampleSource

__all__ = ["load"]


def load(
    parts: ClockParts,
    guest: GuestSide,
    state: ClockState,
    policy: Policy,
    reference: Reference | str | SampleSource | None,
    *,
    any_tsc_hz: bool,
) -> None:
    """Load the paused clock saved as `state`, which is checked, into new `parts`.

    policy, reference, any_tsc_hz: GuestClock.restore()'s.
    """
    keeper = parts.keeper
    with keeper.changing:
        guest.load(state.provider)
        warning = ""
        if guest.is_told_tsc_hz:
            any_tsc_hz = any_tsc_hz or not guest.lives_by_tsc
            warning = capture.check_tsc_hz(state, keeper.backend.tsc_hz, any_tsc_hz=any_tsc_hz)
        capture.restore(parts, state, policy, guest.own_page)
        if warning:
            keeper.tell(EventKind.TSC_RATE, warning)
        if reference is None:
            capture.restore_reference(parts, state)
        else:
            parts.host.require("follow")
            parts.follower.follow(reference)
