"""What the lab's tests share: a kernel, and an empty folder for its temporary files."""

from pathlib import Path

import pytest

from pvclock.lab.kernel import Kernel
from tests.lab.laboratory import usable_kernel


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """Return the kernel that the lab boots; skip where there is none to be had."""
    return usable_kernel()


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Return an empty folder for a lab's temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder
