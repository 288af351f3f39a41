"""Synthetic timers whose message waits for its slot: enabled until it is posted, as a guest sees without any lock."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.slow_stimers import ENABLE, Message
from tests.unit.test_hyperv_stimers import CONFIG0, ONE_SHOT_TO_1, PAGES, World, by_message
from tests.unit.test_hyperv_synic import EOM

pytestmark = pytest.mark.row("H-42")


def test_a_timer_has_ended_when_its_message_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that finds the message of a one-shot timer finds it disabled, and until then enabled, at any moment."""
    world, found = World(), []
    post = world.synic.post

    def post_and_look(*arguments: Any, **options: Any) -> bool:  # noqa: ANN401  # Synic.post()'s
        has_posted = post(*arguments, **options)
        found.append((has_posted, world.read(CONFIG0)))
        return has_posted

    monkeypatch.setattr(world.synic, "post", post_and_look)
    for units in (5, 6):  # at 6 the slot is taken
        world.set(by_message(2) | ENABLE, units)
        world.at(units)
    is_free, is_taken = (True, by_message(2) | ENABLE), (False, by_message(2) | ENABLE)
    assert found == [is_free, (True, by_message(2)), is_taken]
    assert world.look(0, 2) == (Message(0, 5, 5), True)
    assert world.read(CONFIG0) == by_message(2) | ENABLE


def test_a_guest_that_fills_its_slot_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Just before a message is posted there: the timer stays enabled, and the message comes once the slot is free."""
    world = World()
    monkeypatch.setattr(world.synic, "is_free", lambda *_: True)  # it was
    world.clock.memory.write(PAGES[0] + 2 * 256, b"\x01")
    world.set(by_message(2) | ENABLE, 5)
    world.at(5)
    assert world.read(CONFIG0) == by_message(2) | ENABLE
    world.clock.memory.write(PAGES[0] + 2 * 256, bytes(4))
    world.write(EOM, 0)
    world.at(6)
    assert (world.look(0, 2)[0], world.read(CONFIG0)) == (Message(0, 5, 6), by_message(2))


def test_a_timer_is_enabled_until_its_message_is_posted() -> None:
    """As on KVM; stopping it meanwhile takes the message back."""
    world = World()
    world.set(ONE_SHOT_TO_1, 10, 0)
    world.set(ONE_SHOT_TO_1, 20, 1)
    world.at(20)
    assert [world.read(CONFIG0), world.read(CONFIG0 + 2)] == [ONE_SHOT_TO_1 & ~ENABLE, ONE_SHOT_TO_1]
    world.write(CONFIG0 + 2, ONE_SHOT_TO_1 & ~ENABLE)
    assert world.take(0, 1) == Message(0, 10, 20)
    assert world.serve() == []
    assert world.look(0, 1)[0] is None
