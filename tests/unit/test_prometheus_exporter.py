"""What Prometheus is told of given findings, as its own parser reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain_text

from pvclock import __version__
from pvclock.host.watch import TroubleKind
from pvclock.meter.watch.changes import Disagreement, Stall, Step, TscBasis
from pvclock.meter.watch.loop import Finding, HostTrouble, VmEnded
from pvclock.meter.watch.rate import PageRate
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.meter.watch.watcher import Watcher
from pvclock.quantities import Gpa, GuestNs, GuestTsc, HostTsc
from pvclock.readings import TimeInfo
from qemu_glue.prometheus.exporter import FAMILIES, page_maker
from qemu_glue.prometheus.series import SILENT_S, HostSeries, Series, VmSeries
from tests.command_line import ROOT
from tests.unit.test_watch_loop import ARRAY, RESET, HandMadeVm, loop_of

pytestmark = pytest.mark.row("E10")

PAGE = TimeInfo(2, GuestTsc(1), GuestNs(2), 1 << 31, -1, 1)
AT = HostTsc(9)
PAUSE = (VmEvent(VmEventKind.STOP, 1), VmEvent(VmEventKind.RESUME, 2))
DOCUMENTED = re.compile(r"^\| `(pvclock_\w+)` \| (gauge|counter)(?:; ([\w, ]+))? \| .+ \|$", re.MULTILINE)
"""A line of the table in docs/prometheus.md: a metric, its type and its labels."""


def step(vcpu: int, step_ns: int | None, bound_ns: int = 2, events: tuple[VmEvent, ...] = ()) -> Step:
    """A step, of which the TSC is known or not."""
    basis = TscBasis.CHANGED if step_ns is None else TscBasis.OFFSETS
    known_ns = None if step_ns is None else bound_ns
    return Step(AT, HostTsc(8), vcpu, PAGE, PAGE, 1, basis, step_ns, known_ns, None, None, events)


def apart(ahead: int, behind: int, by_ns: int, *, is_stale: bool = False) -> Disagreement:
    """Two pages that disagree."""
    return Disagreement(AT, ahead, behind, by_ns, 2, 31, (), TscBasis.OFFSETS, is_stale)


class HandMadeWatch:
    """A watch whose looks bring what a test says, of a VM whose state it makes."""

    def __init__(self, name: str = "web", vcpus: int = 2) -> None:
        self.now_s = 100.0
        self.host = HostSeries(lambda: "tsc")
        self.series = Series(self.host, lambda: self.now_s)
        self.name = name
        self.vm = HandMadeVm(vcpus)
        self.rates = {0: PageRate(-51.0, 7.0), 1: PageRate(None, None, "not sampled twice")}
        self.begin()

    def begin(self) -> None:
        """Watch the VM, for the first time or anew."""
        pages = [Gpa(ARRAY + 64 * vcpu) for vcpu in range(self.vm.vcpus)]
        for page in pages:
            self.vm.put(page)
        self.loop, self._looks = loop_of(self.vm, pages)

    def look(self, *findings: Finding, open_now: Sequence[Disagreement] = ()) -> None:
        """One look, a while after the last."""
        self.now_s += 1
        seen = next(self._looks)._replace(findings=findings)
        with pytest.MonkeyPatch.context() as by_hand:
            by_hand.setattr(Watcher, "open_disagreements", [*open_now])
            by_hand.setattr(self.loop, "rates", lambda: self.rates)
            self.series.of(self.name).take(seen, self.loop)

    def families(self) -> dict[str, Metric]:
        """What a scrape reads, by the metrics' names."""
        text = page_maker(self.series)("").content.decode()
        return {family.name: family for family in plain_text(text)}

    def value(self, sample: str, **labels: str) -> float | None:
        """One sample's value; None if there is none."""
        found = [
            each.value
            for family in self.families().values()
            for each in family.samples
            if each.name == sample and each.labels.items() >= labels.items()
        ]
        assert len(found) <= 1
        return found[0] if found else None


@pytest.fixture
def watch() -> HandMadeWatch:
    """A watch that has looked once."""
    made = HandMadeWatch()
    made.look()
    return made


def test_names_types_labels_and_units(watch: HandMadeWatch) -> None:
    """All metrics that docs/prometheus.md tells of are there, with that type and those labels, and no others.

    Each has a help that is a phrase, and a base unit or none.
    """
    documented = DOCUMENTED.findall((ROOT / "docs" / "prometheus.md").read_text())
    told = {name.removesuffix("_total"): (kind, re.findall(r"\w+", labels)) for name, kind, labels in documented}
    families = watch.families()
    assert families.keys() == told.keys()
    assert len(documented) == len(FAMILIES)
    for name, family in families.items():
        kind, labels = told[name]
        assert family.type == kind, name
        assert {frozenset(sample.labels) for sample in family.samples} == {frozenset(labels)}, name
        assert not family.documentation.endswith("."), name
        assert not name.endswith(("_ns", "_ms", "_us", "_ppb", "_ppm", "_percent"))
    assert {name for name, kind, _ in documented if name.endswith("_total")} == {
        name for name, kind, _ in documented if kind == "counter"
    }
    assert watch.value("pvclock_build_info", version=__version__) == 1


def test_both_formats_are_read(watch: HandMadeWatch) -> None:
    """Prometheus asks for OpenMetrics, curl for nothing; either reads what it gets, of the same samples."""
    page = page_maker(watch.series)("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3")
    assert page.kind.startswith("application/openmetrics-text; version=1.0.0")
    families = open_metrics(page.content.decode())  # type: ignore[no-untyped-call]
    samples = [sample for family in families for sample in family.samples]
    plain = [sample for family in watch.families().values() for sample in family.samples]
    assert [(each.name, each.labels, each.value) for each in samples] == [
        (each.name, each.labels, each.value) for each in plain
    ]


@pytest.mark.parametrize("version", ["bogus", "", "9", "1.0.0.0", "0.0.1", "1_0", "\xb9", "1.0.0;version=2"])
def test_what_cannot_be_parsed_gets_plain_text(watch: HandMadeWatch, version: str) -> None:
    """So does a version that there is not: a client may ask for anything."""
    page = page_maker(watch.series)(f"application/openmetrics-text;version={version}")
    assert page.kind.startswith("text/plain; version=0.0.4")
    assert b"pvclock_watch_up{" in page.content


def test_a_series_is_there_before_its_first_event(watch: HandMadeWatch) -> None:
    """It is 0 from the first look on: increase() sees the first step only then."""
    for cause in ("pause", "other", "unknown"):
        assert watch.value("pvclock_steps_total", vm="web", vcpu="1", cause=cause) == 0
    assert watch.value("pvclock_disagreements_total", vcpu="1") == 0
    assert watch.value("pvclock_host_troubles_total", kind="clocksource") == 0


def test_steps_by_their_cause(watch: HandMadeWatch) -> None:
    """A pause that was told is one cause, none the other; where nothing can be told the cause is unknown."""
    watch.look(step(0, -1_000_000_000, events=PAUSE), step(1, 5_000_000))
    watch.look(step(1, -3_000))
    watch.vm.why_no_events = "only QEMU's monitor tells of events"
    watch.look(step(0, 7_000))
    assert watch.value("pvclock_steps_total", vcpu="0", cause="pause") == 1
    assert watch.value("pvclock_steps_total", vcpu="0", cause="other") == 0
    assert watch.value("pvclock_steps_total", vcpu="0", cause="unknown") == 1
    assert watch.value("pvclock_steps_total", vcpu="1", cause="other") == 2
    assert watch.value("pvclock_last_step_seconds", vcpu="1") == pytest.approx(-3e-6)


def test_a_decimal_stays_as_short_as_it_is(watch: HandMadeWatch) -> None:
    """Nanoseconds are seconds without ...0001 at the end, and ppb a ratio."""
    watch.look(step(0, -503_758_074), apart(0, 1, 115_703_511))
    page = page_maker(watch.series)("").content.decode()
    assert 'pvclock_last_step_seconds{vcpu="0",vm="web"} -0.503758074\n' in page
    assert 'pvclock_pages_disagree_seconds{vcpu="0",vm="web"} 0.115703511\n' in page
    assert 'pvclock_frequency_offset_ratio{vcpu="0",vm="web"} -5.1e-08\n' in page


def test_a_watch_may_end_at_any_moment_of_a_scrape(watch: HandMadeWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scrape is answered, whichever of the VM's values it had read by then."""
    reads = ends_at = 0

    def read(vm: VmSeries, name: str) -> object:
        nonlocal reads
        reads += 1
        if reads == ends_at:
            vm.end()
        return object.__getattribute__(vm, name)

    monkeypatch.setattr(VmSeries, "__getattribute__", read)
    while reads >= ends_at:
        watch.look()
        reads, ends_at = 0, ends_at + 1
        assert watch.families().keys() == {family.name for family in FAMILIES}
    assert ends_at > len(FAMILIES)


def test_what_may_be_no_step_is_not_counted(watch: HandMadeWatch) -> None:
    """A step is one if it is longer than its bound; one of unknown length is counted for itself."""
    watch.look(step(0, 0), step(0, 1), step(0, -2, bound_ns=2), step(1, None))
    assert watch.value("pvclock_steps_total", vcpu="0", cause="other") == 0
    assert watch.value("pvclock_last_step_seconds", vcpu="0") == 0
    assert watch.value("pvclock_unknown_steps_total", vcpu="1") == 1
    watch.look(step(0, -3, bound_ns=2))
    assert watch.value("pvclock_steps_total", vcpu="0", cause="other") == 1


def test_a_disagreement_counts_once_from_its_beginning(watch: HandMadeWatch) -> None:
    """For both vCPUs, as it goes on and when it ends; whom of several alike it names in between is no new one."""
    watch.look(open_now=[apart(1, 0, 100)])
    watch.look(open_now=[apart(1, 0, 115_700_000)])
    watch.look(apart(1, 0, 115_700_000))
    watch.look()
    for vcpu in "01":
        assert watch.value("pvclock_disagreements_total", vcpu=vcpu) == 1
        assert watch.value("pvclock_pages_disagree_seconds", vcpu=vcpu) == pytest.approx(0.1157)
    watch.look(open_now=[apart(0, 1, 50)])
    assert watch.value("pvclock_disagreements_total", vcpu="0") == 2
    assert watch.value("pvclock_pages_disagree_seconds", vcpu="0") == pytest.approx(5e-8)


def test_alike_vcpus_take_turns_without_new_disagreements() -> None:
    """A watch names the one that is furthest off, and that may be another at each look."""
    watch = HandMadeWatch(vcpus=3)
    for ahead in (1, 2, 1, 2, 1):
        watch.look(open_now=[apart(ahead, 0, 100)])
    assert [watch.value("pvclock_disagreements_total", vcpu=vcpu) for vcpu in "012"] == [1, 1, 1]


def test_what_nobody_reads_is_no_disagreement(watch: HandMadeWatch) -> None:
    """A stale page is of a vCPU that does not run."""
    watch.look(apart(0, 1, 100, is_stale=True), open_now=[apart(0, 1, 100, is_stale=True)])
    assert watch.value("pvclock_disagreements_total", vcpu="1") == 0


def test_rates_are_ratios_and_absent_while_unknown(watch: HandMadeWatch) -> None:
    """ppb as a ratio with its bound; a vCPU whose rate is unknown has no sample, nor has one whose VM is not seen."""
    assert watch.value("pvclock_frequency_offset_ratio", vm="web", vcpu="0") == pytest.approx(-51e-9)
    assert watch.value("pvclock_frequency_offset_bound_ratio", vm="web", vcpu="0") == pytest.approx(7e-9)
    assert watch.value("pvclock_frequency_offset_ratio", vm="web", vcpu="1") is None
    watch.vm.events = [RESET]
    watch.look()
    assert watch.loop.finder.is_searching
    assert watch.value("pvclock_watch_up", vm="web") == 0
    assert watch.value("pvclock_frequency_offset_ratio", vcpu="0") is None


def test_a_watch_is_up_while_it_looks(watch: HandMadeWatch) -> None:
    """One that has not looked for long, for its VMM does not answer, is down; so is one that ended."""
    assert watch.value("pvclock_watch_up", vm="web") == 1
    assert watch.value("pvclock_watch_interval_seconds", vm="web") == pytest.approx(0.01)
    assert watch.value("pvclock_guest_paused", vm="web") == 0
    watch.now_s += SILENT_S + 1
    assert watch.value("pvclock_watch_up", vm="web") == 0
    watch.look(VmEnded("it is gone"))
    assert watch.value("pvclock_watch_up", vm="web") == 0


def test_rare_looks_are_no_silence(watch: HandMadeWatch) -> None:
    """Where the interval is long, so is the time until a watch counts as down."""
    watch.loop.interval_s = 60.0
    watch.look()
    watch.now_s += 100
    assert watch.value("pvclock_watch_up") == 1


def test_counters_never_go_back(watch: HandMadeWatch) -> None:
    """A watch that failed and began anew counts on, with another loop that begins at 0."""
    watch.look(step(0, 5_000), open_now=[apart(0, 1, 9)])
    polls = watch.value("pvclock_watch_polls_total")
    watch.series.of("web").end()
    assert watch.value("pvclock_watch_up") == 0
    assert watch.value("pvclock_guest_paused") is None
    watch.begin()
    watch.look(step(0, 6_000), open_now=[apart(0, 1, 9)])
    assert watch.value("pvclock_steps_total", vcpu="0", cause="other") == 2
    assert watch.value("pvclock_disagreements_total", vcpu="0") == 2
    assert polls
    assert watch.value("pvclock_watch_polls_total") == polls + watch.loop.watcher.summary.polls


def test_a_vm_that_is_gone_has_no_series(watch: HandMadeWatch) -> None:
    """Nothing is left of it, and the others stay."""
    watch.series.of("db")
    watch.series.forget("web")
    assert watch.value("pvclock_watch_up", vm="db") == 0
    assert watch.value("pvclock_watch_up", vm="web") is None
    assert "web" not in page_maker(watch.series)("").content.decode()


def test_the_host_leaves_the_tsc() -> None:
    """Its clocksource is read at each scrape, and each trouble counted by its kind."""
    watch = HandMadeWatch()
    names: Iterator[str] = iter(["tsc", "hpet"])
    watch.series.host = HostSeries(lambda: next(names))
    assert watch.value("pvclock_host_clocksource_is_tsc") == 1
    assert watch.value("pvclock_host_clocksource_is_tsc") == 0
    watch.series.host = HostSeries(lambda: "hpet")
    watch.series.host.take([HostTrouble(TroubleKind.CLOCKSOURCE, True, "it was tsc and is hpet")])
    assert watch.value("pvclock_host_troubles_total", kind="clocksource") == 1
    assert watch.value("pvclock_host_troubles_total", kind="suspend") == 0


def test_hostile_names_are_escaped() -> None:
    """A socket's name is a label's value, whatever is in it."""
    name = 'a"b\\c\nd} 1\n# HELP'
    watch = HandMadeWatch(name)
    watch.look(Stall(AT, 5))
    assert watch.value("pvclock_watch_up", vm=name) == 1


def test_names_that_are_not_utf8() -> None:
    """A socket's name may be any bytes; its label spells out those that are no text."""
    watch = HandMadeWatch(b"w\xff\xc3\xa9".decode(errors="surrogateescape"))
    watch.look()
    assert watch.value("pvclock_watch_up", vm=r"w\udcffé") == 1
