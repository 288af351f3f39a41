"""Root file systems for guests: cpio reads what we write."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pvclock.boot.initramfs import archive, with_shell

pytestmark = pytest.mark.row("E22")


def entries(content: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content by name, read by the format's description: numbers in hexadecimal, all padded to 4 bytes."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert content[at : at + 6] == b"070701"
        fields = [int(content[at + 6 + 8 * number : at + 14 + 8 * number], 16) for number in range(13)]
        mode, length, name_length = fields[1], fields[6], fields[11]
        name = content[at + 110 : at + 110 + name_length - 1].decode()
        assert content[at + 110 + name_length - 1] == 0
        begin = at + (110 + name_length + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert begin == len(content)
            return found
        found[name] = (mode, content[begin : begin + length])
        at = begin + (length + 3) // 4 * 4


def test_an_archive() -> None:
    """Files of any length are executable, and what is empty is a folder."""
    files = {"dev": b"", "a": b"1", "ab": b"12", "abc": b"123", "abcd": b"1234", "dev/x": b"\0" * 4097}
    found = entries(archive(files))
    assert list(found) == list(files)
    assert {name: content for name, (_, content) in found.items()} == files
    assert {name: oct(mode) for name, (mode, _) in found.items() if name in ("dev", "a")} == {
        "dev": "0o40755",
        "a": "0o100755",
    }


def test_a_shell() -> None:
    """Busybox, what is wanted beside it, an init that busybox runs, and the folders that it mounts over, first."""
    found = entries(with_shell(b"busybox", {"probe": b"a probe"}))
    assert found["bin/busybox"][1] == b"busybox"
    assert found["bin/probe"][1] == b"a probe"
    assert found["init"][1].startswith(b"#!/bin/busybox sh\n")
    lines = found["init"][1].decode().splitlines()
    mounted = {line.rpartition(" /")[2] for line in lines if line.startswith("mount")}
    assert mounted == {"dev", "proc", "sys"}
    assert list(found).index("bin") < list(found).index("bin/busybox")
    assert mounted <= set(found)


def test_cpio_reads_it(tmp_path: Path) -> None:
    """Busybox's, another reader of the format, unpacks the same."""
    if shutil.which("busybox") is None:
        pytest.skip("no cpio to read the archive with: apt-get install busybox-static")
    files = {"bin": b"", "bin/x": b"content", "init": b"#!"}
    subprocess.run(["busybox", "cpio", "-i"], cwd=tmp_path, input=archive(files), capture_output=True, check=True)
    assert (tmp_path / "bin/x").read_bytes() == b"content"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
