"""How long a test waits."""

from typing import Final

__all__ = ["HANG_S"]

HANG_S: Final = 120.0
"""For what comes at once unless something hangs: no claim of how fast it is, on however busy a machine."""
