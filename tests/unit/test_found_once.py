"""What is slow to find out about the loaded KVM is found once, and again for another one."""

from pathlib import Path

import pytest

from pvclock.kvm import loaded
from pvclock.kvm.loaded import FoundOnce, loaded_kvm

pytestmark = pytest.mark.row("J-05")


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return what stands for KVM's device in sysfs."""
    path = tmp_path / "kvm"
    path.touch()
    monkeypatch.setattr(loaded, "DEVICE", path)
    return path


def test_it_is_found_once(device: Path) -> None:
    """The second time it is known, and a fact that is 0 is a fact."""
    finds = iter(range(3))
    fact = FoundOnce[int]()
    assert [fact.get(lambda: next(finds)) for _ in range(3)] == [0, 0, 0]
    assert loaded_kvm() == device.stat().st_ino


def test_another_kvm_is_asked_anew(device: Path) -> None:
    """Once the module is loaded again, what was found of the one before counts no more."""
    fact = FoundOnce[str]()
    assert fact.get(lambda: "before") == "before"
    other = device.with_name("other")
    other.touch()
    other.replace(device)
    assert [fact.get(lambda: "after") for _ in range(2)] == ["after", "after"]


def test_without_sysfs_nothing_is_kept(device: Path) -> None:
    """Where the kernel does not say which KVM it has, it is asked each time."""
    device.unlink()
    finds = iter(range(3))
    fact = FoundOnce[int]()
    assert loaded_kvm() is None
    assert [fact.get(lambda: next(finds)) for _ in range(3)] == [0, 1, 2]
