"""What goes wrong on the command line is one line on stderr, or one JSON object, and status 2; never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pvclock.commands import _parser, main
from pvclock.commands.lab import _command
from pvclock.errors import ConfigError, LabError
from pvclock.lab.download import _fetch_by, download_kernel
from pvclock.lab.tools import require_tools
from tests.command_line import command, in_terminal, run_pvclock
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("E13")

INTERRUPTIBLE = """
import signal, sys
from pvclock.commands import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would we
sys.exit(main())
"""
STATE = str(Path(__file__).parents[1] / "states" / "v2-typical.json")

WRONG = [
    (["lab", "--cpus", "0", "true"], "'0' is not a whole number from 1 to 255"),
    (["lab", "--cpus", "two", "true"], "'two' is not a whole number"),
    (["lab", "--memory", "10", "true"], "'10' is not a memory size for a lab; give it 256M or more"),
    (["lab", "--memory", "3 GB", "true"], "'3 GB' is not a memory size for a lab"),
    (["lab", "--memory", "3T", "true"], "'3T' is not a memory size for a lab; give it 256M or more, in M or G"),
    (["lab", "--timeout", "0", "true"], "'0' is not a duration"),
    (["lab", "--timeout", "nan", "true"], "'nan' is not a duration"),
    (["lab", "--timeout", "soon", "true"], "'soon' is not a duration"),
    (["lab", "--writable", "/nonexistent", "true"], "'/nonexistent' is not a folder"),
    (["lab", "--"], "no COMMAND to run; try pvclock lab -- pvclock doctor"),
    *((["demo", "--vcpus", text], f"'{text}' is not a whole number from 1 to 16") for text in ("0", "99", "-1", "abc")),
    *(
        (["crosscheck", "--vcpus", text], f"'{text}' is not a whole number from 1 to 16")
        for text in ("0", "17", "-1", "1.5")
    ),
    (["demo", "--seconds", "0"], "'0' is not a duration"),
    (["demo", "--seconds", "1e12"], "'1e12' is not a duration; give seconds, more than 0 and up to 86400 (a day)"),
    (["lab", "--timeout", "86401", "true"], "'86401' is not a duration"),
    (["crosscheck", "--seconds", "inf"], "'inf' is not a duration"),
    (["crosscheck", "--seconds", "1e-9"], "1e-09 s of observation; choose 0.1 or more"),
    (["crosscheck", "--seconds", "0.09"], "0.09 s of observation; choose 0.1 or more"),
    (["scale"], "the following arguments are required: HZ"),
    (["scale", "9" * 23], f"'{'9' * 23}' is not a frequency of a TSC; it can be 1 Hz to 18446744073709551615 Hz"),
    (["scale", "0"], "'0' is not a frequency of a TSC"),
    (["scale", "fast"], "'fast' is not a frequency; write 2596132000, 2.4GHz or 100M"),
    (["state", "show", "/nonexistent"], "/nonexistent: file: found No such file or directory"),
    (["doctor", "--frobnicate"], "unrecognized arguments: --frobnicate (see pvclock doctor --help)"),
]


@pytest.mark.parametrize(("arguments", "complaint"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_a_wrong_argument_is_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the argument and what it may be, before anything is printed; with --json the same is an object."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(f"pvclock {arguments[0]}: ")
    assert complaint in line
    assert main([arguments[0], "--json", *arguments[1:]]) == 2
    output = capsys.readouterr()
    assert output.err == ""
    document = json.loads(output.out)
    assert document["schema"] == f"pvclock.{arguments[0]}/1"
    assert not document["ok"]
    assert complaint in document["error"]["message"]


LONG = "x" * 10_000
LONG_VALUES = [
    ["doctor", LONG],
    ["scale", LONG],
    ["demo", "--vcpus", LONG],
    ["demo", "--seconds", LONG],
    ["lab", "--memory", LONG, "true"],
    ["lab", "--writable", LONG, "true"],
    ["state", "show", LONG],
    [LONG],
]


@pytest.mark.parametrize("arguments", LONG_VALUES, ids=[" ".join(arguments)[:16] for arguments in LONG_VALUES])
def test_a_long_value_is_cut(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Its beginning is enough to know it by."""
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "xxx..." in line
    assert len(line) < 400


def test_an_unknown_option_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The help that it names is pvclock's own."""
    assert main(["--frobnicate"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "pvclock: unrecognized arguments: --frobnicate (see pvclock --help)"


@pytest.mark.parametrize("release", ["9.9.9", None])
def test_a_kernel_that_apt_does_not_have(release: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line, which says what apt said last and what to do; its command line is no part of it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("apt-get", "apt-cache", "dpkg-deb", "tar"):
        (folder / program).write_text("#!/bin/sh\necho Reading package lists...\necho E: there is none; exit 100\n")
        (folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    with pytest.raises(LabError) as caught:
        download_kernel(release, tmp_path / "kernels", lambda _: None)
    assert str(caught.value) == "apt-get failed (100): E: there is none"
    if release:
        with pytest.raises(LabError) as caught:
            _fetch_by((), release, tmp_path, lambda _: None)
        assert str(caught.value) == (
            "cannot download linux-image-9.9.9: apt-get failed (100): E: there is none; "
            "name a kernel with its modules: --kernel PATH"
        )


def test_an_unknown_command_is_one_line() -> None:
    """It is refused with the commands that there are, also with --json, for there is no schema of its name."""
    done = run_pvclock("frobnicate", "--json")
    assert (done.status, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("pvclock: ")
    assert "'doctor'" in line


PRINTING = [
    ["--help"],
    ["--version"],
    ["scale", "--help"],
    ["scale", "2.4GHz"],
    ["scale", "2.4GHz", "--json"],
    ["state", "show", STATE],
    ["state", "check", STATE],
    ["scale", "fast", "--json"],
]


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_full_stdout(arguments: list[str]) -> None:
    """`> /dev/full` is one line that names standard output, and status 2."""
    done = run_pvclock(*arguments, redirect=">/dev/full")
    assert done.status == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith("standard output: No space left on device")


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_closed_stdout(arguments: list[str]) -> None:
    """`>&-` is one line, and status 2."""
    done = run_pvclock(*arguments, redirect=">&-")
    assert done.status == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("pvclock: standard output is closed")


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_that_is_gone(arguments: list[str]) -> None:
    """`| head` that has seen enough ends it without a word, with the status of a program that SIGPIPE ends."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(*arguments), stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=HANG_S
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.stress
@pytest.mark.parametrize("interrupted", [True, False], ids=["interrupted", "unread"])
def test_a_demonstration_that_is_ended(interrupted: bool) -> None:
    """Ctrl-C, or a reader that has seen enough, ends it in the middle without a word, by the usual status."""
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "demo", "--seconds", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        if interrupted:
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
        assert process.wait(HANG_S) == (130 if interrupted else 141)
        assert process.stderr.read() == ""


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_a_stderr_that_takes_nothing(redirect: str) -> None:
    """The status says that it failed; a complaint goes nowhere else, and what is well is printed as ever."""
    failed = run_pvclock("scale", "fast", redirect=redirect)
    assert failed == (2, "", "")
    assert run_pvclock("scale", "1", redirect=redirect) == run_pvclock("scale", "1")


def test_all_streams_closed() -> None:
    """Nobody can be told, but by the status."""
    assert run_pvclock("doctor", redirect="<&- >&- 2>&-") == (2, "", "")


def test_a_stdout_in_ascii(tmp_path: Path) -> None:
    """What the output's encoding lacks is written as an escape."""
    done = run_pvclock("state", "check", str(tmp_path / "Zürich"), PYTHONIOENCODING="ascii")
    assert done.status == 1
    assert "Z\\xfcrich: NOT VALID: file: found No such file" in done.stdout
    table = in_terminal("scale", "1", PYTHONIOENCODING="ascii")
    assert table.startswith("+---")


@pytest.mark.parametrize(
    ("home", "nobody"),
    [(None, True), ("/nonexistent", True), ("locked", True), ("/dev/null", True), ("/dev/null", False)],
)
def test_a_cache_that_cannot_be_written(home: str | None, nobody: bool, tmp_path: Path) -> None:
    """Where the lab can keep no kernel, one line says which folder, and what helps."""
    try:
        require_tools()
    except LabError as error:
        pytest.skip(str(error))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)
    done = run_pvclock(
        *("lab", "--kernel", "0.0.0-none", "true"),
        nobody=nobody,
        HOME=str(locked) if home == "locked" else home,
        XDG_CACHE_HOME=None,
    )
    assert (done.status, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("pvclock lab: cannot keep a kernel in ")
    assert "set XDG_CACHE_HOME to a folder that can be written" in line


@pytest.mark.kvm
def test_nobody_and_the_device() -> None:
    """A user without the right to /dev/kvm is told what helps with this device, in every command that wants it."""
    document = json.loads(run_pvclock("doctor", "--json", nobody=True).stdout)
    (device,) = [row for row in document["result"]["findings"] if row["name"] == "/dev/kvm"]
    found = Path("/dev/kvm").stat()
    if found.st_mode & 0o006 == 0o006:
        assert device["ok"]
        return
    told = device["found"]["text"]
    assert "EACCES" in told
    assert f"mode {found.st_mode & 0o7777:04o}" in told
    assert ("sudo chgrp kvm /dev/kvm" in told) == (found.st_gid == 0 or found.st_mode & 0o060 != 0o060)
    assert not document["result"]["works"]["kvm_guests"]
    refused = run_pvclock("crosscheck", "--json", nobody=True)
    error = json.loads(refused.stdout)["error"]
    assert (refused.status, error["kind"], error["errno"]) == (2, "KvmUnavailable", 13)
    assert error["message"] == told


@pytest.mark.parametrize(
    ("arguments", "as_json", "expected"),
    [
        (["--", "python", "-m", "x", "--json"], False, ["python", "-m", "x", "--json"]),
        (["python", "-m", "x", "--json", "--cpus", "9"], False, ["python", "-m", "x", "--json", "--cpus", "9"]),
        (["--json", "--cpus", "2", "--", "x", "--json"], True, ["x", "--json"]),
        (["--cpus", "2", "--json", "x", "--", "--help"], True, ["x", "--", "--help"]),
    ],
)
def test_what_follows_the_labs_command_is_its_own(arguments: list[str], as_json: bool, expected: list[str]) -> None:
    """Options after COMMAND are COMMAND's, with and without -- before it."""
    parsed = _parser().parse_args(["lab", *arguments])
    assert parsed.json == as_json
    assert _command(parsed.argv) == expected


def test_a_lab_without_a_command() -> None:
    """It is refused with what to type."""
    with pytest.raises(ConfigError, match="try pvclock lab -- pvclock doctor"):
        _command(["--"])
