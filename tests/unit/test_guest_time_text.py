"""Guest times as people write them: 90s, 1.5h, 30d."""

from __future__ import annotations

import argparse

import pytest

from pvclock.commands.arguments import guest_time_ns
from pvclock.errors import ConfigError
from pvclock.meter.quantity_text import parse_guest_time_ns, parse_step_ns

pytestmark = pytest.mark.row("E17")

DAY_NS = 86_400 * 10**9


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0s", 0),
        ("250ns", 250),
        ("1.5us", 1500),
        ("90 s", 90 * 10**9),
        ("10min", 600 * 10**9),
        ("1.5h", 5400 * 10**9),
        ("30d", 30 * DAY_NS),
        ("213503d", 213503 * DAY_NS),
    ],
)
def test_what_is_one(text: str, ns: int) -> None:
    """With each unit; a fraction is exact."""
    assert parse_guest_time_ns(text) == guest_time_ns(text) == ns


@pytest.mark.parametrize("text", ["", "30", "-1s", "1e3s", "1w", "1m", "1s 2s", "213504d", "9" * 13 + "s"])
def test_what_is_none(text: str) -> None:
    """It says what one is, or how long a guest's clock is."""
    with pytest.raises(ConfigError, match=r"such as 90s, 1\.5h or 30d|2\^64 ns"):
        parse_guest_time_ns(text)
    with pytest.raises(argparse.ArgumentTypeError):
        guest_time_ns(text)


def test_steps_have_no_days() -> None:
    """A budget of a day is a mistake."""
    with pytest.raises(ConfigError, match="units are ns, us, ms, s"):
        parse_step_ns("1d")
