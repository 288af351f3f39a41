"""The version: one, whoever is asked."""

from __future__ import annotations

import pytest

import pvclock
from pvclock.commands import main


@pytest.mark.row("E13")
def test_the_command_says_the_packages_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`pvclock --version` prints pvclock.__version__."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pvclock {pvclock.__version__}\n"
