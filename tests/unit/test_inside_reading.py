"""A probe's line: found in whatever a console printed, and what is said of a damaged or hostile one."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock.errors import ProbeFailed, ProbeRecordError, PvclockError
from pvclock.meter.inside import parse_record
from tests.unit.inside_records import a_clock, a_kernel, a_record, line, simulated_pairs, still

pytestmark = pytest.mark.row("E18")

DOCUMENT = a_record([a_clock(pairs=simulated_pairs([still(0), still(0)]))], kernel=a_kernel())
LINE = line(DOCUMENT)
NOISE = "\x1b[2J\x1b[01;01HSeaBIOS (version 1.16)\r\n\x1b]0;title\x07Booting from ROM..\r\n"


def version_in(text: str) -> str:
    """Return the version of the record that is read."""
    return parse_record(text).version


def test_a_line_as_the_probe_prints_it() -> None:
    """Every key arrives: CPUs, pairs and slices, steps, the kernel's words."""
    record = parse_record(LINE)
    assert [cpu.apic_id for cpu in record.cpus] == [0, 2]
    assert record.tsc.pairs[0].slices[0].at_tsc == DOCUMENT["clocks"][0]["pairs"][0]["slices"][0][0]
    assert record.tsc.steps.reads == 1000
    assert record.kernel is not None
    assert record.kernel.available == ("kvm-clock", "tsc", "acpi_pm")
    assert (record.added_ns, record.console) == ((), None)


def test_a_slice_without_a_round() -> None:
    """It has an instant and no window."""
    document = json.loads(LINE)
    document["clocks"][0]["pairs"][0]["slices"][3] = [5]
    lone = parse_record(line(document)).tsc.pairs[0].slices[3]
    assert (lone.at_tsc, lone.low, lone.high) == (5, None, None)


def test_a_record_among_other_lines() -> None:
    """Firmware's escape sequences, carriage returns and lines before and after it do no harm."""
    assert parse_record(f"{NOISE}{LINE}\r\n{NOISE}login: ") == parse_record(LINE)


def test_a_record_with_escape_sequences_inside() -> None:
    """A firmware console that sets colours or adds returns in the middle of the line, too."""
    broken = "\x1b[0m\x1b[37m".join(LINE[at : at + 40] for at in range(0, len(LINE), 40))
    assert parse_record(broken) == parse_record(LINE)


def test_a_line_that_a_terminal_broke() -> None:
    """A terminal of 80 columns, saved as a file, has the line in pieces."""
    broken = "\r\n".join(LINE[at : at + 80] for at in range(0, len(LINE), 80))
    assert parse_record(NOISE + broken) == parse_record(LINE)


def test_the_last_record_counts() -> None:
    """Of two boots the later one."""
    second = line({**DOCUMENT, "version": "2"})
    assert version_in(f"{LINE}\n{second}\n") == "2"


def test_bytes_that_are_no_text() -> None:
    """A serial line's garbage is not what stops a reader."""
    assert parse_record(b"\xff\xfe\x00" + LINE.encode() + b"\x80") == parse_record(LINE)


def test_what_a_kernel_said_in_utf8_and_escapes() -> None:
    """The probe writes bytes; they are read as UTF-8, and what could move a cursor is shown as an escape."""
    said = "\u00fcber \x1b[31mred".encode().decode("latin-1")
    record = parse_record(line(a_record([a_clock()], kernel=a_kernel(complaints=[said]))))
    assert record.kernel is not None
    assert record.kernel.complaints == ("\u00fcber \\x1b[31mred",)


def test_an_unknown_key_is_passed_over() -> None:
    """A later probe may say more."""
    assert parse_record(line({**DOCUMENT, "weather": [1]})) == parse_record(LINE)


def test_what_the_probe_reports_instead() -> None:
    """Its error is told as such, without what it could do to a terminal."""
    with pytest.raises(ProbeFailed, match=r"could not measure: no \\x1bTSC") as caught:
        parse_record(NOISE + json.dumps({"error": "no \x1bTSC"}) + "\n")
    assert caught.value.why == r"no \x1bTSC"


def test_an_image_that_could_not_measure() -> None:
    """Its line has the schema and an error; what an earlier boot measured does not stand in for it."""
    failed = line(
        {"schema": "pvclock.probe-record/1", "version": "1", "form": "bare", "error": "nothing tells the frequency"}
    )
    with pytest.raises(ProbeFailed, match="nothing tells the frequency"):
        parse_record(f"{LINE}\n{NOISE}{failed}\n")


def test_another_programs_error_beside_a_record() -> None:
    """It does not count: a whole record does."""
    assert parse_record(f'{LINE}\n{{"error":"disk full"}}') == parse_record(LINE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "found no output"),
        ("login:\n", 'found 2 lines without one, the last: "login:"; supported: a line that begins with'),
        (
            "a\n" + LINE[:200],
            "the output's end in the record that begins at line 2 of the output, after 200 characters",
        ),
        (
            LINE.replace('"cpus"', '"cpus"!', 1),
            r'in the record that begins at line 1 of the output, \d+ characters on, at "!',
        ),
        ('{"schema":"pvclock.probe-record/1","x":' + "[" * 100_000, "nested too deeply"),
        (
            LINE.replace("probe-record/1", "probe-record/2"),
            r'schema: found "pvclock.probe-record/2"; supported: "pvclock.probe-record/1"',
        ),
        (LINE.replace('"tsc_hz":2900000000', '"tsc_hz":0'), "tsc_hz: found 0; supported: whole numbers from 1"),
        (LINE.replace('"tsc_hz":2900000000', '"tsc_hz":' + "9" * 9000), "tsc_hz: found a number of 9000 digits"),
        (LINE.replace('"cell_reads":1000000', '"cell_reads":1.5'), r"clocks\[0\].cell_reads: found 1.5"),
        (LINE.replace('"cell_reads":1000000', '"cell_reads":-1'), r"clocks\[0\].cell_reads: found -1"),
        (
            LINE.replace('"cpus":[0,1]', '"cpus":[0,2]'),
            r"clocks\[0\].pairs\[0\].cpus: found \[0, 2\]; supported: two diff",
        ),
        (LINE.replace('"cpus":[0,1]', '"cpus":[1,1]'), r"clocks\[0\].pairs\[0\].cpus: found \[1, 1\]"),
        (LINE.replace('"name":"tsc"', '"name":"pit"'), r'clocks\[0\].name: found "pit"'),
        (LINE.replace('"form":"linux",', ""), "form: found nothing"),
        (LINE.replace('"form":"linux",', '"form":"linux","form":"bare",'), "form: found it more than once"),
        (LINE.replace('"backward":null', '"backward":[-5,5,0]'), r"clocks\[0\].steps.backward: found -5 and 5"),
        (LINE.replace('"reads":1000', '"reads":true'), r"clocks\[0\].steps.reads: found true"),
        (LINE.replace('"version":"0.9"', '"version":"' + "9" * 9000 + '"'), "version: found 9000 characters"),
    ],
)
def test_what_is_wrong_and_where(text: str, says: str) -> None:
    """A damaged record's error names the place and what was there."""
    with pytest.raises(ProbeRecordError, match=says):
        parse_record(text)


def test_more_than_a_console_prints() -> None:
    """Its size is bounded before anything is done with it."""
    with pytest.raises(ProbeRecordError, match="up to 67108864 bytes"):
        parse_record(bytes((64 << 20) + 1))


def test_thousands_of_beginnings() -> None:
    """Only so many are tried, so a hostile output is refused in no time."""
    with pytest.raises(ProbeRecordError, match="begins at line 20000"):
        parse_record('{"schema":"pvclock.probe-record/1",\n' * 20_000)


@given(st.integers(0, 2**32), st.sampled_from(["cut", "byte", "digits", "swap"]))
def test_damage_never_crashes(seed: int, kind: str) -> None:
    """Whatever happens to a line, it is read, or refused with one of pvclock's own errors."""
    chance = random.Random(seed)  # noqa: S311  # no secret
    at, to = sorted(chance.randrange(len(LINE)) for _ in range(2))
    damaged = {
        "cut": LINE[:at] + LINE[to:],
        "byte": LINE[:at] + chr(chance.randrange(256)) + LINE[at + 1 :],
        "digits": LINE[:at] + "99999999999999999999" + LINE[at:],
        "swap": LINE[:at] + LINE[to:] + LINE[at:to],
    }[kind]
    try:
        parse_record(damaged)
    except PvclockError:
        return
