"""To be another user for a while, as far as access goes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

__all__ = ["as_another_user"]

NOBODY: Final = 65534


@contextmanager
def as_another_user() -> Iterator[None]:
    """Be nobody; skips the test where this process is not root's."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; run the tests as root")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
