"""TSC offsets of another process's vCPUs: found by KVM's numbers in a made-up debugfs; and why there are none."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvclock.host import kvm_debugfs
from pvclock.host.kvm_debugfs import TscOffsetFiles
from pvclock.host.process import Process
from pvclock.host.vmm_process import VmmProcess
from tests.unit.known_process import as_nobody, needs_root

pytestmark = pytest.mark.row("E3")

VM_FD = 14
APIC_IDS = (0, 2, 10, 11)


@pytest.fixture
def vmm() -> Iterator[VmmProcess]:
    """Return this process as one with a VM of four vCPUs."""
    with VmmProcess(Process(os.getpid()), VM_FD, APIC_IDS) as found:
        yield found


def make(root: Path, folder: str, offsets: dict[int, str]) -> None:
    """Make a VM's folder in a debugfs, with vcpuN/tsc-offset."""
    for number, offset in offsets.items():
        vcpu = root / "kvm" / folder / f"vcpu{number}"
        vcpu.mkdir(parents=True)
        (vcpu / "tsc-offset").write_text(offset, encoding="utf-8")


def test_offsets_are_by_number_and_of_now(vmm: VmmProcess, tmp_path: Path) -> None:
    """Signed, the vCPU with the second smallest number being the second; each reading is a new one."""
    make(tmp_path, f"{os.getpid()}-{VM_FD + 1}", {0: "77\n"})
    make(tmp_path, f"{os.getpid()}-{VM_FD}", {10: "-3\n", 0: "0\n", 11: "9\n", 2: f"{-(2**63)}\n"})
    files = TscOffsetFiles(vmm, tmp_path)
    assert files.why is None
    assert files.read() == (0, -(2**63), -3, 9)
    (tmp_path / "kvm" / f"{os.getpid()}-{VM_FD}" / "vcpu10" / "tsc-offset").write_text("5\n", encoding="utf-8")
    assert files.read() == (0, -(2**63), 5, 9)


def test_a_vm_that_another_thread_made(vmm: VmmProcess, tmp_path: Path) -> None:
    """KVM names the folder by that thread."""
    released = threading.Event()
    thread = threading.Thread(target=released.wait)
    thread.start()
    make(tmp_path, f"{thread.native_id}-{VM_FD}", {number: str(number) for number in APIC_IDS})
    assert TscOffsetFiles(vmm, tmp_path).read() == APIC_IDS
    released.set()
    thread.join()


def test_a_vcpu_without_a_file_has_no_offset(vmm: VmmProcess, tmp_path: Path) -> None:
    """Nor one whose file has gone since."""
    make(tmp_path, f"{os.getpid()}-{VM_FD}", {0: "1", 2: "2"})
    files = TscOffsetFiles(vmm, tmp_path)
    assert files.read() == (1, 2, None, None)
    (tmp_path / "kvm" / f"{os.getpid()}-{VM_FD}" / "vcpu0" / "tsc-offset").unlink()
    assert files.read() == (None, 2, None, None)


@pytest.mark.parametrize(
    ("there", "why"),
    [
        ([], "debugfs is not mounted; as root: mount -t debugfs none {root}"),
        (["tracing"], "debugfs of this kernel shows nothing of KVM: there is no {root}/kvm"),
        (
            ["kvm/1-2"],
            "{root}/kvm has no {pid}-14: its VM was made by a thread that has ended, or in another PID names",
        ),
        (["kvm/{pid}-14/exits"], "this kernel's KVM shows no vCPUs in {root}/kvm/{pid}-14"),
        (["kvm/{pid}-14/vcpu0"], "{root}/kvm/{pid}-14/vcpu0/tsc-offset: No such file or directory"),
    ],
)
def test_why_there_are_none(vmm: VmmProcess, tmp_path: Path, there: list[str], why: str) -> None:
    """What is missing, by its path, and what helps; there are no offsets then."""
    for name in there:
        (tmp_path / name.format(pid=os.getpid())).mkdir(parents=True)
    files = TscOffsetFiles(vmm, tmp_path)
    assert str(files.why).startswith(why.format(root=tmp_path, pid=os.getpid()))
    assert files.read() == (None,) * len(APIC_IDS)


@needs_root
def test_other_users_are_told_that_root_may(vmm: VmmProcess, tmp_path: Path) -> None:
    """debugfs is root's own."""
    make(tmp_path, f"{os.getpid()}-{VM_FD}", {0: "1"})
    tmp_path.chmod(0o700)
    why = as_nobody(lambda: TscOffsetFiles(vmm, tmp_path).why)
    assert str(why).endswith("kvm may be read by root only")


def test_lockdown_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel in lockdown says EPERM, to root too."""
    error = PermissionError(errno.EPERM, "Operation not permitted", "/d/kvm/1-2/vcpu0/tsc-offset")
    monkeypatch.setattr(kvm_debugfs, "LOCKDOWN", tmp_path / "lockdown")
    assert "tsc-offset may not be read: Operation not permitted" in kvm_debugfs._why_not(error, tmp_path)
    (tmp_path / "lockdown").write_text("[none] integrity confidentiality\n", encoding="utf-8")
    assert "tsc-offset may not be read: Operation not permitted" in kvm_debugfs._why_not(error, tmp_path)
    (tmp_path / "lockdown").write_text("none [integrity] confidentiality\n", encoding="utf-8")
    assert "the kernel is locked down (integrity, " in kvm_debugfs._why_not(error, tmp_path)
