"""Files that commands write: whole or not at all, with errors that have their names."""

from __future__ import annotations

import os
from pathlib import Path

from pvclock.errors import ConfigError

__all__ = ["named_error", "why_not_writable", "write"]


def write(name: str, content: bytes, mode: int | None = None) -> None:
    """Write a file with those access rights, by default its owner's alone.  OSError or ConfigError."""
    from pvclock.state import atomic_file  # each command is loaded by every start of pvclock

    try:
        atomic_file.replace(name, [content], mode)
    except OSError as error:
        raise named_error(name, error) from None


def named_error(name: str, error: OSError) -> Exception:
    """The error with the file's name, which atomic_file's refusals lack, and else is that of a file beside it."""
    return OSError(error.errno, error.strerror, name) if error.errno else ConfigError(f"{name}: {error}")


def why_not_writable(path: Path) -> str | None:
    """Why write() would fail, as far as that can be tried before there is anything to write; None if it would not."""
    from tempfile import TemporaryFile

    try:
        target = Path(os.path.realpath(path))
        if os.path.lexists(target) and not target.is_file():
            return "it is there, and is no file"
        with TemporaryFile(dir=target.parent):
            return None
    except OSError as error:
        return f"in its folder: {error.strerror}"
