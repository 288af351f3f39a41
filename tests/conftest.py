"""What holds for every test: it names the rows it proves, and it is skipped only with a reason that helps."""

import gc
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from pvclock.errors import KvmUnavailable, LabError, MissingCapability
from pvclock.host.linux import cpu_flags
from pvclock.kvm import open_kvm
from pvclock.lab.kernel import Kernel, find_kernel

# No deadline: a slow moment of a shared machine is no failure.  In continuous integration the same examples each time,
# so that a failure is the change's; elsewhere others each time, so that more is found.
settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

ROOT = Path(__file__).parents[1]
ROWS_TSV = ROOT / "docs" / "rows.tsv"
DEBUGFS = Path("/sys/kernel/debug")


@cache
def row_ids() -> frozenset[str]:
    """Return the ids of docs/rows.tsv, and "style" for tests of the tree itself."""
    lines = ROWS_TSV.read_text(encoding="utf-8").splitlines()[1:]
    return frozenset(line.partition("\t")[0] for line in lines) | {"style"}


def row_complaint(item: pytest.Item) -> str | None:
    """Return what is wrong with a test's rows, or None."""
    rows = [row for mark in item.iter_markers("row") for row in mark.args]
    if not rows:
        return 'no @pytest.mark.row(...): name the rows it proves, or "style"'
    unknown = sorted(set(rows) - row_ids())
    return f"rows that docs/rows.tsv does not have: {', '.join(unknown)}" if unknown else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse the whole run when a test's rows are missing or unknown; put first what should begin first."""
    complaints = {item.nodeid.partition("[")[0]: complaint for item in items if (complaint := row_complaint(item))}
    if complaints:
        raise pytest.UsageError("\n".join(f"{test}: {complaint}" for test, complaint in complaints.items()))
    items.sort(key=begins_at)


def pytest_collection_finish() -> None:
    """Leave the thousands of tests and all modules out of each garbage collection: they took a seventh of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def debugfs() -> Iterator[None]:
    """TSC offsets can be read; mounted for these tests only where it was not; skip where that is not permitted."""
    if os.geteuid():
        pytest.skip("only root reads TSC offsets; run this as root")
    if (DEBUGFS / "kvm").exists():
        yield
        return
    mount = ["mount", "-t", "debugfs", "debugfs", str(DEBUGFS)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"TSC offsets are in debugfs, which cannot be mounted here: {mounted.stderr.strip()}")
    yield
    subprocess.run(["umount", DEBUGFS], check=True)


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """The lab's kernel, as Debian built it; skip where KVM cannot run it."""
    if cpu_flags().isdisjoint(("vmx", "svm")):  # kvm-pvm has KVM's API without them
        pytest.skip("KVM here does not run a stock Linux: the CPU has neither vmx nor svm; `make test-lab` does it")
    try:
        return find_kernel(None, lambda _text: None)
    except LabError as error:
        pytest.skip(f"no kernel for the guest: {error}")


REAL_MACHINES = "real machines"
EXCLUSIVE = ("tests/kvm/", "tests/qemu/", "tests/stress/")
"""Tests that want the machine for themselves, as far as other workers leave it."""

TAKE_LONG = ("tests/lab/", "tests/test_packaging.py", "tests/model/")
"""Of whose tests some take most of a minute, or a fixture does: begun last they would be waited for."""


def scope_of(nodeid: str) -> str:
    """Return what runs one after the other: a file's tests, and all that want the machine; a model's run anywhere."""
    file = nodeid.partition("::")[0]
    if file.startswith(EXCLUSIVE) and not file.endswith("_mutations.py"):
        return REAL_MACHINES
    return nodeid if file.startswith("tests/model/") else file


def begins_at(item: pytest.Item) -> int:
    """Return how early a test should begin: the longest row first, then those that take long."""
    if scope_of(item.nodeid) == REAL_MACHINES:
        return 0
    return 1 if item.nodeid.startswith(TAKE_LONG) else 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Let pytest -n distribute tests by scope_of()."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # it has no types

    config.option.loadscopereorder = False  # else what takes long, and is one test, comes last
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = scope_of
    return scheduler


@cache
def kvm_obstacle() -> str | None:
    """Return why /dev/kvm cannot be opened and what helps, or None when it can, whatever it lacks."""
    try:
        open_kvm().close()
    except KvmUnavailable as why:
        return str(why)
    except MissingCapability:
        return None  # tests of real vCPUs fail then, and say what is missing
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `kvm` where there is no usable KVM."""
    if item.get_closest_marker("kvm") and (obstacle := kvm_obstacle()):
        pytest.skip(obstacle)
