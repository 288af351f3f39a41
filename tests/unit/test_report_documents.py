"""What a report makes of crosscheck's, doctor's and a probe's documents, as they really were on a host."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pvclock.errors import ReportSourceError
from pvclock.meter.report.model import Intervals, Section, Standing, Table
from tests.unit.probe_lines import CLEAN, FAULTY
from tests.unit.report_lines import of_kind, rows, section_of

pytestmark = pytest.mark.row("E10")

REPORTS = Path(__file__).parents[1] / "reports"


def document(name: str) -> dict[str, Any]:
    """What a command printed."""
    content: dict[str, Any] = json.loads((REPORTS / f"{name}.json").read_bytes())
    return content


def told(path: Path, content: dict[str, Any]) -> Section:
    """The section of a document."""
    return section_of(path / "x", [content])


# Crosscheck


def test_each_row_stands_with_its_rule(tmp_path: Path) -> None:
    """The texts of all three clocks; the rules follow, each with its row's name."""
    content = document("crosscheck")
    shown = rows(told(tmp_path, content), "The same guest on each")
    for row, check in zip(shown, content["result"]["checks"], strict=True):
        texts = [check[clock]["text"] for clock in ("engine", "kernel", "qemu")]
        assert row == (check["name"], *texts)
    every = content["result"]["checks"] + content["result"]["reference_time"]
    assert rows(told(tmp_path, content), "Rules") == tuple((check["name"], check["why"]) for check in every)
    assert len(rows(told(tmp_path, content), "Hyper-V's reference time")) == len(content["result"]["reference_time"])


def test_a_row_that_disagrees_is_said_first(tmp_path: Path) -> None:
    """By its name in the verdict, with its rule in a sentence, and as bad in the table."""
    content = document("crosscheck")
    content["result"]["checks"][3]["ok"] = False
    section = told(tmp_path, content)
    count = len(content["result"]["checks"]) + len(content["result"]["reference_time"])
    assert section.verdict == f"1 of {count} rows disagrees: flags."
    assert section.standing is Standing.BAD
    assert section.sentences[1] == f"flags: {content['result']['checks'][3]['why']}"
    table = of_kind(section, Table, "The same guest on each")
    assert table.standings[3] is Standing.BAD
    assert set(table.standings[:3]) == {Standing.GOOD}


def test_rates_are_intervals(tmp_path: Path) -> None:
    """Those that the cells have, by the clock that they are measured by; with a bound where a cell has one."""
    content = document("crosscheck")
    (row,) = (each for each in content["result"]["checks"] if each["name"] == "rate by the TSC")
    row["kernel"]["values"]["bound_ppb"] = 2.0
    found = {each.name: each for each in of_kind(told(tmp_path, content), Intervals, "Rates").rows}
    kernel_ppb = row["kernel"]["values"]["rate_ppb"]
    kernel = found["kernel, by its TSC"]
    assert (kernel.low, kernel.value, kernel.high) == (kernel_ppb - 2, kernel_ppb, kernel_ppb + 2)
    assert found["engine, by its TSC"].low == found["engine, by its TSC"].high
    assert {"engine, by raw, nominal", "engine, by raw, steered"} < set(found)


def test_a_life_cycle_has_a_table_an_operation(tmp_path: Path) -> None:
    """In their order, with the steps and the guest time meanwhile of each clock as intervals."""
    content = document("lifecycle")
    operations = list(dict.fromkeys(row["operation"] for row in content["result"]["lifecycle"]))
    section = told(tmp_path, content)
    assert [part.title for part in section.parts if isinstance(part, Table)] == [
        *(f"{operation[:1].upper()}{operation[1:]}" for operation in operations),
        "Rules",
    ]
    rules = {(name, why): those for name, those, why in rows(section, "Rules")}
    assert all(row["operation"] in rules[row["name"], row["why"]] for row in content["result"]["lifecycle"])
    (step, *_), (meanwhile, *_) = (
        of_kind(section, Intervals, title).rows for title in ("Steps against the TSC", "Guest time while no vCPU ran")
    )
    first, second = content["result"]["lifecycle"][:2]
    assert (step.low, step.high) == (
        min(first["engine"]["values"]["steps_ns"]),
        max(first["engine"]["values"]["steps_ns"]),
    )
    assert step.name == f"{operations[0]}: engine"
    values = second["engine"]["values"]
    assert (meanwhile.low, meanwhile.high) == (values["went_on_least_ns"], values["went_on_most_ns"])


def test_a_crosscheck_without_rows_is_not_decided(tmp_path: Path) -> None:
    """Nothing was compared."""
    content = document("crosscheck")
    content["result"] |= {"checks": [], "reference_time": []}
    assert told(tmp_path, content).standing is Standing.OPEN


# The host


def test_a_host_that_lacks_what_guests_need_is_bad(tmp_path: Path) -> None:
    """By name, with what to do; what is not needed is not decided."""
    content = document("doctor")
    findings = content["result"]["findings"]
    kvm = next(finding for finding in findings if finding["name"] == "/dev/kvm")
    kvm |= {"ok": False, "advice": "load the module"}
    section = told(tmp_path, content)
    assert section.verdict == "Guests need what is missing here: /dev/kvm."
    assert section.standing is Standing.BAD
    assert "/dev/kvm: load the module" in section.sentences
    table = of_kind(section, Table, "This host")
    assert len(table.rows) == len(findings)
    assert table.standings[findings.index(kvm)] is Standing.BAD
    assert told(tmp_path, document("doctor")).standing is Standing.GOOD


def test_what_no_guest_needs_is_named_in_one_sentence(tmp_path: Path) -> None:
    """As missing: what to do for each stands in the table."""
    content = document("doctor")
    missing = [each for each in content["result"]["findings"] if not each["ok"]]
    names = [each["name"] for each in missing]
    assert len(names) > 1
    assert not any(each["needed"] for each in missing)
    section = told(tmp_path, content)
    said = f"Missing, and no guest needs it: {', '.join(names)}; what to do is in the table."
    assert section.sentences[-1] == said
    assert not [sentence for sentence in section.sentences if sentence.startswith("KVM_CAP")]


# A guest, from inside


def test_offsets_between_cpus_are_intervals(tmp_path: Path) -> None:
    """Of each clock, with the bounds that doctor itself tells, from the record."""
    content = document("guest")
    section = told(tmp_path, content)
    for clock in content["result"]["clocks"][:2]:
        (row,) = of_kind(section, Intervals, f"Offsets between CPUs: {clock['name']}").rows
        assert row.name == "CPU 1 less CPU 0"
        assert (row.low, row.high) == (clock["apart_low_ns"], clock["apart_high_ns"])
        assert row.standing is Standing.GOOD
    rates = {row.name: row for row in of_kind(section, Intervals, "Rates against the TSC").rows}
    monotonic = content["result"]["clocks"][1]
    assert rates["monotonic"].low == pytest.approx(monotonic["rate_low_ppb"])
    assert rates["monotonic"].high == pytest.approx(monotonic["rate_high_ppb"])


def test_without_the_record_the_clocks_numbers_are_taken(tmp_path: Path) -> None:
    """As `probe --judge --json` has them: of each clock the two CPUs that are furthest apart."""
    content = document("guest")
    del content["result"]["record"]
    content["schema"] = "pvclock.probe/1"
    content["result"]["clocks"][0] |= {"apart_low_ns": 5.0, "apart_high_ns": 45.0}
    tsc, monotonic = of_kind(told(tmp_path, content), Intervals, "Offsets between CPUs").rows
    assert (tsc.name, tsc.low, tsc.high, tsc.standing) == ("tsc: CPU 1 less CPU 0", 5.0, 45.0, Standing.BAD)
    assert (monotonic.low, monotonic.high, monotonic.standing) == (-51.0, 45.0, Standing.GOOD)


def test_a_probes_line_is_judged(tmp_path: Path) -> None:
    """As `pvclock probe --judge` does: a fault has its headline, what software sees, and what to change."""
    section = told(tmp_path, json.loads(FAULTY))
    assert section.standing is Standing.BAD
    assert section.verdict.startswith("The clock is wrong: ")
    findings = of_kind(section, Table, "What was found")
    assert findings.standings[0] is Standing.BAD
    assert findings.rows[0][0] in section.verdict
    assert all(cell for row in findings.rows for cell in row)
    promised = {row[0]: row[1:] for row in rows(section, "Promised and seen")}
    assert promised["STABLE: vCPUs' clocks agree"] == ("offered", "NOT kept")
    clean = told(tmp_path, json.loads(CLEAN))
    assert clean.standing is Standing.GOOD
    assert not [part for part in clean.parts if part.title == "What was found"]


def test_floors_say_what_may_go_unseen(tmp_path: Path) -> None:
    """Of offsets and of steps, in doctor's words."""
    content = document("guest")
    shown = rows(told(tmp_path, content), "What may go unseen")
    wanted = content["result"]["floors"] + content["result"]["step_floors"]
    assert [row[1] for row in shown] == [each["what"] for each in wanted]


@pytest.mark.parametrize(
    ("change", "verdict", "standing"),
    [
        ({"status": "broken", "broken": ["too far apart"]}, "A budget is broken: too far apart", Standing.BAD),
        (
            {"status": "undecided", "open": [{"reason": "one-cpu", "what": "one CPU alone", "seconds": None}]},
            "Undecided whether the clock is right: one CPU alone",
            Standing.OPEN,
        ),
        (
            {"is_added": True},
            "With the fault that --add put in: Nothing is wrong with the clock, as far as can be told from inside.",
            Standing.GOOD,
        ),
    ],
)
def test_the_verdict_is_doctors_own(change: dict[str, Any], verdict: str, standing: Standing, tmp_path: Path) -> None:
    """Passed, broken or undecided, with the first reason."""
    content = document("guest")
    content["result"] |= change
    section = told(tmp_path, content)
    assert (section.verdict, section.standing) == (verdict, standing)


# What is wrong in a document


@pytest.mark.parametrize(
    ("name", "damage", "found"),
    [
        ("crosscheck", lambda it: it["checks"][0].pop("ok"), "checks[0].ok: nothing"),
        ("crosscheck", lambda it: it["checks"][0]["engine"].update(text=1), "checks[0].engine.text: 1"),
        ("lifecycle", lambda it: it["lifecycle"][0]["engine"]["values"].update(steps_ns=["x"]), "lifecycle[0]"),
        ("doctor", lambda it: it["findings"][0].update(found=None), "findings[0].found: null"),
        ("guest", lambda it: it["floors"][0].update(what=[]), "floors[0].what: a list of 0"),
        ("guest", lambda it: it["record"].update(tsc_hz=0), "record: tsc_hz: 0"),
        ("guest", lambda it: it.update(record=7), "record: file"),
    ],
)
def test_a_damaged_document_is_refused(
    name: str, damage: Callable[[dict[str, Any]], object], found: str, tmp_path: Path
) -> None:
    """By the path of the field."""
    content = document(name)
    damage(content["result"])
    with pytest.raises(ReportSourceError) as caught:
        told(tmp_path, content)
    assert caught.value.found.removeprefix("result.").startswith(found)
