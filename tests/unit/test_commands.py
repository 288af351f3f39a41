"""The command line: what each command prints, as a table and as JSON, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest

from pvclock import ConfigError, RangeError
from pvclock.commands import main
from pvclock.commands.scale import parse_hz
from pvclock.kvm import open_kvm
from pvclock.meter.in_process_guest import InProcessGuest
from pvclock.meter.stress import THREAD_BURSTS, PublishStress, stress_publishing
from qemu_glue import cpu_property


@pytest.mark.row("E13")
def test_scale_prints_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    """`pvclock scale` gives mul, shift and the rate error of each frequency, also as JSON."""
    assert main(["scale", "2596132000", "2.4GHz"]) == 0
    table = capsys.readouterr().out
    assert "0xc5376add" in table
    assert "0xd5555555" in table
    assert main(["scale", "--json", "2596132000"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["result"]["scales"]
    assert (row["tsc_hz"], row["mul"], row["shift"]) == (2_596_132_000, 0xC5376ADD, -1)
    assert row["rate_error_ppb"] == pytest.approx(-0.003336, abs=1e-6)


@pytest.mark.row("E13")
@pytest.mark.parametrize(
    ("text", "hz"),
    [
        ("1", 1),
        ("2596132000", 2_596_132_000),
        ("2.4GHz", 2_400_000_000),
        ("100M", 10**8),
        ("2596132kHz", 2_596_132_000),
    ],
)
def test_frequencies_may_have_units(text: str, hz: int) -> None:
    """A frequency is in Hz, or has k, M or G, with or without Hz behind it."""
    assert parse_hz(text) == hz


@pytest.mark.row("E13")
@pytest.mark.parametrize("text", ["", "GHz", "-1", "1e9", "0x10", "2.4", "1.0000000001GHz", "٣"])
def test_what_is_no_frequency_is_said_so(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Anything else is an error that names it, and exit status 2."""
    with pytest.raises(RangeError):
        parse_hz(text)
    assert main(["scale", "--", text]) == 2
    assert "pvclock scale:" in capsys.readouterr().err


@pytest.mark.row("E13")
def test_a_scale_of_zero_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """0 Hz is refused with what to give instead."""
    assert main(["scale", "0"]) == 2
    assert "it can be 1 Hz to" in capsys.readouterr().err


@pytest.mark.row("E13")
def test_doctor_looks_at_this_host(capsys: pytest.CaptureFixture[str]) -> None:
    """`pvclock doctor` has a row for processor, clocksource and /dev/kvm; what is missing comes with what to do."""
    status = main(["doctor", "--json"])
    findings = {row["name"]: row for row in json.loads(capsys.readouterr().out)["result"]["findings"]}
    assert {"processor", "host clocksource", "TSC frequency", "/dev/kvm", "QEMU", "lab"} <= set(findings)
    assert findings["TSC frequency"]["found"]["values"]["tsc_hz"] > 10**6
    assert status == int(any(row["needed"] and not row["ok"] for row in findings.values()))
    assert all(row["ok"] or row["advice"] for row in findings.values())


@pytest.mark.row("E9", "E13")
@pytest.mark.stress
def test_the_story_without_kvm() -> None:
    """In this process, too, readers of pages that change all the time see nothing go back."""
    heard: list[PublishStress] = []
    with InProcessGuest() as guest:
        result = stress_publishing(guest, 1.0, bursts=THREAD_BURSTS, progress=heard.append)
    assert result.reads > 10_000
    assert result.publishing.publishes > 10_000
    assert not any(result.failures.values())
    assert heard


@pytest.mark.row("E13")
def test_help_names_the_commands() -> None:
    """`python -m pvclock --help` lists what there is; an unknown command is refused."""
    shown = subprocess.run([sys.executable, "-m", "pvclock", "--help"], capture_output=True, text=True, check=True)
    for command in ("demo", "doctor", "scale"):
        assert command in shown.stdout
    assert (
        subprocess.run([sys.executable, "-m", "pvclock", "frobnicate"], capture_output=True, check=False).returncode
        == 2
    )


@pytest.mark.row("K-33", "K-34")
def test_qemus_cpu_argument() -> None:
    """-cpu names every KVM feature, on or off, and hides the invariant TSC; a bit without a name is refused."""
    names = (
        *("kvm-nopiodelay 1", "kvm-asyncpf 4", "kvm-steal-time 5", "kvm-pv-eoi 6", "kvm-pv-unhalt 7"),
        *("kvm-pv-tlb-flush 9", "kvm-asyncpf-vmexit 10", "kvm-pv-ipi 11", "kvm-poll-control 12"),
        *("kvm-pv-sched-yield 13", "kvm-asyncpf-int 14", "kvm-msi-ext-dest-id 15", "kvmclock-stable-bit 24"),
    )
    for offered in (0, *(1 << int(name.split()[1]) for name in names)):
        flags = (f"{'+' if offered >> int(bit) & 1 else '-'}{name}" for name, bit in map(str.split, names))
        assert cpu_property(9 | offered) == ",".join(("host,+kvmclock", *flags, "-invtsc"))
    with pytest.raises(ConfigError, match="0x100"):
        cpu_property(1 << 8)
    with pytest.raises(ConfigError, match="together"):
        cpu_property(1 << 3)


@pytest.mark.row("E13", "E9")
@pytest.mark.stress
def test_demo_without_kvm_says_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where /dev/kvm cannot be opened, the demo runs in this process, says why, and what it leaves out."""
    open_none = partial(open_kvm, "/nonexistent/kvm")
    monkeypatch.setattr("pvclock.commands.demo.open_kvm", open_none)
    assert main(["demo", "--seconds", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "ENOENT" in shown
    assert "Left out" in shown
    assert main(["demo", "--seconds", "0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["result"]["comparison"] == []
    assert not report["result"]["kvm_guests"]
    assert report["result"]["stress"]["reads"] > 1000
