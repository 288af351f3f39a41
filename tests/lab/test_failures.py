"""What goes wrong in the lab says so, and leaves neither process nor file."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pvclock.lab.kernel import MAGIC, MAGIC_AT, Kernel
from pvclock.lab.machine import MEMORY_LEAST_MIB
from tests.lab.laboratory import assert_nothing_left, lab_command, processes_naming, run_lab
from tests.waiting import HANG_S

pytestmark = [pytest.mark.lab, pytest.mark.row("style"), pytest.mark.usefixtures("kernel")]

PAYLOAD_AT = 1 << 20
"""In a bzImage: beyond the set-up code, within the compressed kernel."""


def test_a_command_that_is_not_there(scratch: Path) -> None:
    """A command that is not found is 127, as in a shell."""
    done = run_lab("--timeout", "120", "--", "no-such-command", scratch=scratch)
    assert done.status == 127
    assert "no-such-command" in done.stderr


@pytest.mark.parametrize("content", [b"", b"no kernel" * 1000], ids=["empty", "text"])
def test_a_kernel_that_is_none(scratch: Path, tmp_path: Path, content: bytes) -> None:
    """A file that is not a kernel is refused before anything starts."""
    image = tmp_path / "vmlinuz"
    image.write_bytes(content)
    done = run_lab("--kernel", image, "--", "true", scratch=scratch)
    assert done.status == 2
    assert f"{image} is not a kernel" in done.stderr


def test_a_kernel_that_is_not_there(scratch: Path) -> None:
    """A path that does not exist is named."""
    done = run_lab("--kernel", "/no/such/vmlinuz", "--", "true", scratch=scratch)
    assert done.status == 2
    assert "/no/such/vmlinuz: No such file" in done.stderr


def test_a_kernel_without_its_modules(kernel: Kernel, scratch: Path, tmp_path: Path) -> None:
    """A kernel of an unknown release is refused, with the place where its modules should be."""
    image = tmp_path / "vmlinuz"
    data = bytearray(kernel.image.read_bytes())
    at = data.index(kernel.release.encode())
    data[at : at + 3] = b"0.0"
    image.write_bytes(data)
    done = run_lab("--kernel", image, "--", "true", scratch=scratch)
    assert done.status == 2
    assert "no modules for 0.0" in done.stderr


def test_a_kernel_that_never_boots(kernel: Kernel, scratch: Path, tmp_path: Path) -> None:
    """A kernel whose compressed part is damaged ends by the time limit, and the console says why it stopped."""
    (tmp_path / "lib").symlink_to(kernel.image.parents[1] / "lib")
    image = tmp_path / kernel.image.name
    data = bytearray(kernel.image.read_bytes())
    assert data[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC
    data[PAYLOAD_AT : PAYLOAD_AT + 4096] = bytes(4096)
    image.write_bytes(data)
    done = run_lab("--kernel", image, "--timeout", "30", "--", "true", scratch=scratch)
    assert done.status == 2
    assert "the lab did not boot within 30 s" in done.stderr
    assert "System halted" in done.stderr


def test_a_command_that_never_ends(scratch: Path) -> None:
    """A hang ends by the time limit, after what the command had printed."""
    done = run_lab("--timeout", "60", "--", "sh", "-c", "echo here; sleep 600", scratch=scratch)
    assert done.status == 2
    assert done.stdout == "here\n"
    assert "the command did not end within 60 s" in done.stderr


def test_memory_that_is_too_small(scratch: Path) -> None:
    """Memory that no lab boots in is refused before anything starts; the least that is taken is enough."""
    done = run_lab("--memory", f"{MEMORY_LEAST_MIB - 1}M", "--", "true", scratch=scratch)
    assert (done.status, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert f"give it {MEMORY_LEAST_MIB}M or more" in done.stderr
    assert run_lab("--memory", f"{MEMORY_LEAST_MIB}M", "--timeout", "120", "true", scratch=scratch).status == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_an_end_by_signal(scratch: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C and SIGTERM take the lab and its files along, SIGKILL at least the lab."""
    monkeypatch.setenv("TMPDIR", str(scratch))
    arguments = lab_command("--timeout", "60", "--", "sleep", "600")
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: any(" -initrd " in line for line in processes_naming(scratch)))
        process.send_signal(number)
        status = process.wait(HANG_S)
    if number == signal.SIGKILL:
        wait_for(lambda: not processes_naming(scratch))
        shutil.rmtree(next(scratch.iterdir()))
    else:
        assert status == 128 + number
    assert_nothing_left(scratch)


def wait_for(condition: Callable[[], bool], limit_s: float = HANG_S) -> None:
    """Wait until `condition()` holds; fail when it does not in time."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_missing_programs_are_named(scratch: Path) -> None:
    """Without QEMU and the others the command that gets them is printed."""
    done = run_lab("--", "true", scratch=scratch, PATH="")
    assert done.status == 2
    assert "apt-get install -y busybox-static file kmod qemu-system-x86" in done.stderr
