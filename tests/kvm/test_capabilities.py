"""Which KVM is good enough: every way in which /dev/kvm can be missing or lacking is told apart, with what to do."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvclock.errors import KvmError, KvmUnavailable, MissingCapability
from pvclock.kvm import Kvm, capabilities, open_kvm
from pvclock.kvm._fd import CAPABILITY_NUMBERS
from pvclock.kvm.access import ADVICE, advice
from pvclock.kvm.capabilities import OPTIONAL, REQUIRED
from tests.kvm.leaks import open_descriptors

pytestmark = pytest.mark.kvm

NOBODY = 65534


class Lacking:
    """The host's KVM, but for one capability or another API version."""

    def __init__(self, kvm: Kvm, *, capability: str = "", api_version: int = 12) -> None:
        self.kvm = kvm
        self.lacking = capability
        self.api_version = api_version

    def get_api_version(self) -> int:
        """As told."""
        return self.api_version

    def check_extension(self, capability: str) -> int:
        """The host's answer, or 0 for what is lacking."""
        return 0 if capability == self.lacking else self.kvm.check_extension(capability)

    def close(self) -> None:
        """As the host's."""
        self.kvm.close()


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A file that may not be opened; root is nobody meanwhile."""
    path = tmp_path / "kvm"
    path.touch(mode=0)
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    yield path
    os.seteuid(before)


@pytest.mark.row("X-02")
@pytest.mark.parametrize("capability", REQUIRED, ids=lambda capability: capability.name)
def test_each_required_capability_is_required(
    capability: capabilities.Capability, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host without it is refused with its name and what it is for, and the device is closed."""
    lacking = Lacking(Kvm(), capability=capability.name)
    monkeypatch.setattr(capabilities, "Kvm", lambda _path: lacking)
    with pytest.raises(MissingCapability) as caught:
        open_kvm()
    assert caught.value.capability == capability.name
    assert capability.purpose in str(caught.value)
    assert lacking.kvm.fileno() == -1


@pytest.mark.row("X-02")
@pytest.mark.parametrize("capability", OPTIONAL, ids=lambda capability: capability.name)
def test_an_optional_capability_may_be_missing(
    capability: capabilities.Capability, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host without it is good enough to open."""
    with Kvm() as kvm:
        lacking = Lacking(kvm, capability=capability.name)
        monkeypatch.setattr(capabilities, "Kvm", lambda _path: lacking)
        assert open_kvm() is lacking  # type: ignore[comparison-overlap]


@pytest.mark.row("X-02")
def test_the_tables_name_capabilities_that_are_known_and_once() -> None:
    """Each name has a number, and nothing is both required and optional."""
    names = [capability.name for capability in (*REQUIRED, *OPTIONAL)]
    assert len(set(names)) == len(names)
    assert set(names) <= CAPABILITY_NUMBERS.keys()


@pytest.mark.row("E13")
def test_this_host_will_do() -> None:
    """open_kvm() on the real device gives one that answers."""
    with open_kvm() as kvm:
        assert kvm.get_api_version() == 12


@pytest.mark.row("E13")
def test_another_api_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions are in the message."""
    monkeypatch.setattr(capabilities, "Kvm", lambda _path: Lacking(Kvm(), api_version=11))
    with pytest.raises(KvmUnavailable, match="KVM API 11; pvclock speaks 12"):
        open_kvm()


@pytest.mark.row("E13")
def test_no_device() -> None:
    """Where there is no device, the advice is how to get one; of another path, which one it is."""
    assert "load the kvm_intel or kvm_amd module" in advice("/dev/kvm", errno.ENOENT)
    with pytest.raises(KvmUnavailable, match=r"ENOENT .*; KVM's device is /dev/kvm$") as caught:
        open_kvm("/nonexistent/kvm")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.row("E13")
def test_no_right_to_the_device(locked: Path) -> None:
    """Where not even the device's mode may be seen, the advice is what always helps."""
    with pytest.raises(KvmUnavailable, match=r"EACCES .*run as root") as caught:
        open_kvm(str(locked))
    assert caught.value.errno == errno.EACCES


@pytest.mark.row("E13")
def test_a_device_that_is_not_kvms() -> None:
    """Another character device is no KVM, and its descriptor is closed again."""
    before = open_descriptors()
    with pytest.raises(KvmUnavailable, match=r"open /dev/null: ENOTTY .*it is not KVM's device"):
        open_kvm(os.devnull)
    assert open_descriptors() == before


@pytest.mark.row("E13")
@pytest.mark.parametrize("reason", ADVICE, ids=errno.errorcode.__getitem__)
def test_every_known_reason_has_its_own_advice(reason: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errno decides what is advised: EBUSY and ENODEV, too, which no test can bring about."""

    def fail(path: str) -> Kvm:
        raise KvmError(f"open {path}", reason)

    monkeypatch.setattr(capabilities, "Kvm", fail)
    with pytest.raises(KvmUnavailable) as caught:
        open_kvm()
    assert caught.value.errno == reason
    assert str(caught.value).endswith(advice("/dev/kvm", reason))
    assert len(set(ADVICE.values())) == len(ADVICE)
