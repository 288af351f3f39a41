"""A libvirt of its own for one test: daemon, configuration and users are seen by it alone, and end with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pvclock.payloads import clockprobe
from tests.waiting import HANG_S

__all__ = ["real_domain", "virsh"]

NAME = "clockprobe"

DOMAIN = """\
<domain type='kvm'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <vcpu>2</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><kernel>{image}</kernel><cmdline>cpus=2</cmdline></os>
  <cpu mode='host-passthrough'><feature policy='disable' name='arch-capabilities'/></cpu>
  <devices><emulator>{emulator}</emulator></devices>
</domain>
"""
QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""
LIBVIRTD_CONF = """\
unix_sock_dir = "{sockets}"
auth_unix_rw = "none"
auth_unix_ro = "none"
"""
START = """\
set -e
mount --bind {place}/passwd /etc/passwd
mount --bind {place}/group /etc/group
mkdir -p /etc/libvirt /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt
for folder in /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt; do mount -t tmpfs none $folder; done
mount --bind {place}/etc /etc/libvirt
exec libvirtd -f {place}/libvirtd.conf -p {place}/pid
"""
"""Run with mounts and processes of its own: when libvirtd ends, so do its QEMUs."""


@contextmanager
def real_domain(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a domain that runs clockprobe; LIBVIRT_DEFAULT_URI leads to it.  Skips the test without libvirt."""
    missing = [program for program in ("virsh", "libvirtd", "unshare") if not shutil.which(program)]
    if missing or os.geteuid() != 0:
        packages = "libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu"
        pytest.skip(f"needs root, and {', '.join(missing) or 'no more'}; to get it: apt-get install {packages}")
    _write_files(place)
    sockets = place / "s"
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", f"qemu+unix:///system?socket={sockets}/libvirt-sock")
    isolated = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    with (place / "log").open("w") as log:
        daemon = subprocess.Popen([*isolated, "sh", "-c", START.format(place=place)], stdout=log, stderr=log)
    try:
        _await_daemon(daemon, sockets / "libvirt-sock", place / "log")
        virsh("create", str(place / "domain.xml"))
        yield NAME
    finally:
        daemon.kill()
        daemon.wait()


def virsh(*words: str) -> None:
    """Have virsh do it."""
    done = subprocess.run(["virsh", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _write_files(place: Path) -> None:
    user = "libvirt-qemu:x:64055:64055::/:/bin/false\n"
    emulator = shutil.which("qemu-system-x86_64")
    for name, text in {
        "etc/qemu.conf": QEMU_CONF,
        "libvirtd.conf": LIBVIRTD_CONF.format(sockets=place / "s"),
        "passwd": Path("/etc/passwd").read_text() + user,
        "group": Path("/etc/group").read_text() + "libvirt-qemu:x:64055:\nkvm:x:64056:\n",
        "domain.xml": DOMAIN.format(name=NAME, image=place / "image", emulator=emulator),
        "s/empty": "",
    }.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    (place / "image").write_bytes(clockprobe())


def _await_daemon(daemon: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    deadline = time.monotonic() + HANG_S
    while not path.exists():
        assert daemon.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
