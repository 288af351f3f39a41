"""Debian's Prometheus scrapes a watch of two guests and takes our rules; an injected step fires its alert.

It scrapes that watch as if it were two hosts', which have VMs of the same names.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from pvclock import Gpa, GuestNs
from pvclock.meter.findings import TIME_INFO, time_info
from pvclock.payloads import probe
from qemu_glue.peer.qmp_socket import connect
from qemu_glue.watch.mtree import host_address
from tests.command_line import ROOT
from tests.qemu.fleet_of_qemus import FleetOfQemus
from tests.qemu.running_qemu import RunningQemu
from tests.waiting import HANG_S

pytestmark = [pytest.mark.row("E10"), pytest.mark.web]

T = TypeVar("T")

SHIPPED: Final = ROOT / "qemu_glue" / "prometheus"
SCRAPE: Final = "500ms"
"""And how long one may take."""
HOSTS: Final = ("host1:9911", "host2:9911")
NAMES: Final = ("db", "web")
WINDOW: Final = "10s"
"""What Grafana puts for its own variables."""
GRAFANA: Final = {'=~"$vm"': '=~".*"', '=~"$instance"': '=~".*"', "$__rate_interval": WINDOW, "$__range": WINDOW}
STEP_NS: Final = 5_000_000
LISTENS: Final = "0A"
"""TCP_LISTEN in /proc/net/tcp."""


@pytest.fixture(scope="module", autouse=True)
def programs() -> None:
    """Skip where there is no Prometheus."""
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        pytest.skip("no prometheus or promtool on the PATH; to get both: apt-get install prometheus")


def promtool(*words: str | Path, told: str = "") -> subprocess.CompletedProcess[str]:
    """Run it, with this on its standard input."""
    return subprocess.run(["promtool", *words], input=told, capture_output=True, text=True, timeout=HANG_S, check=False)


def test_rules_and_configuration_are_accepted() -> None:
    """As they are shipped, beside each other."""
    for words in (("check", "rules", SHIPPED / "alerts.yml"), ("check", "config", SHIPPED / "prometheus.yml")):
        done = promtool(*words)
        assert done.returncode == 0, done.stderr


def test_each_alert_fires_when_it_is_to() -> None:
    """promtool's own tests of the rules, over made-up series."""
    done = promtool("test", "rules", ROOT / "tests" / "web" / "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


class Watched(NamedTuple):
    """Two guests, the URL of their watch's metrics, and Prometheus's own."""

    qemus: dict[str, RunningQemu]
    metrics: str
    prometheus: str

    def query(self, expression: str) -> list[Any]:
        """The instant vector that Prometheus answers."""
        answer = self.ask("query", query=expression)
        return list(answer["result"])

    def ask(self, what: str, **words: str) -> Any:  # noqa: ANN401  # JSON
        """Ask Prometheus's API."""
        try:
            with urlopen(f"{self.prometheus}/api/v1/{what}?{urlencode(words)}", timeout=HANG_S) as answer:  # noqa: S310
                said = json.load(answer)
        except HTTPError as error:  # it holds its connection, and pytest holds it
            with error:
                said = json.load(error)
        assert said["status"] == "success", said
        return said["data"]

    def firing(self) -> set[tuple[str, ...]]:
        """What fires: the alert's name, the host, the VM and the vCPU."""
        alerts = [alert["labels"] for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"]
        return {tuple(it.get(name, "") for name in ("alertname", "instance", "vm", "vcpu")) for it in alerts}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """All of it running, and scraped at least twice, for all tests."""
    place = tmp_path_factory.mktemp("watched")
    with ExitStack() as resources:
        fleet = FleetOfQemus(place, resources)
        for name in NAMES:
            fleet.add(name)
        url = resources.enter_context(metrics_of(fleet.pattern, place / "watch.jsonl"))
        prometheus = resources.enter_context(scraping(url, place))
        made = Watched(fleet.qemus, url, prometheus)
        awaited(lambda: [each["value"][1] for each in made.query("pvclock_watch_up")] == ["1"] * len(HOSTS) * 2)
        awaited(lambda: len(made.query(f"increase(pvclock_steps_total[{WINDOW}])")) == len(HOSTS) * 2 * 2 * 3)
        yield made


@contextmanager
def metrics_of(pattern: str, output: Path) -> Iterator[str]:
    """Run the watch, as a user does; where its metrics are."""
    command = [sys.executable, "-m", "pvclock", "watch", "--json", "--qmp", pattern, "--prometheus", "127.0.0.1:0"]
    # A file takes whatever it tells; a pipe that nobody reads would hold it up after some minutes.
    with output.open("w") as told, killed_at_last(subprocess.Popen(command, cwd=ROOT, stdout=told)) as process:
        first = json.loads(awaited(lambda: first_line(output), process))
        assert first["kind"] == "metrics"
        yield first["url"]
        process.terminate()
        assert process.wait(HANG_S) == 0
        report = json.loads(output.read_text().splitlines()[-1])
        assert {each["vm"] for each in report["result"]["vms"]} == {*NAMES}


@contextmanager
def scraping(url: str, place: Path) -> Iterator[str]:
    """Run Prometheus with the rules as they are shipped; where it answers."""
    target = url.split("/")[2]
    configuration = {
        "global": {"scrape_interval": SCRAPE, "scrape_timeout": SCRAPE, "evaluation_interval": SCRAPE},
        "rule_files": [str(SHIPPED / "alerts.yml")],
        "scrape_configs": [
            {
                "job_name": "pvclock",
                "static_configs": [{"targets": [target], "labels": {"instance": host}} for host in HOSTS],
            }
        ],
    }
    file = place / "prometheus.json"
    file.write_text(json.dumps(configuration))  # which is YAML, too
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={place / 'tsdb'}"]
    log = place / "prometheus.log"
    with (
        log.open("w") as aside,
        killed_at_last(
            subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stdout=aside, stderr=aside)
        ) as process,
    ):
        port = awaited(lambda: port_of(process), process, lambda: log.read_text()[-2000:])
        url = f"http://127.0.0.1:{port}"
        awaited(lambda: is_ready(url), process, lambda: log.read_text()[-2000:])
        yield url


@contextmanager
def killed_at_last(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """It leaves nothing that anybody wants, however the tests end."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def is_ready(url: str) -> bool:
    """Does Prometheus answer?  It listens before it does."""
    try:
        with urlopen(f"{url}/-/ready", timeout=HANG_S) as answer:  # noqa: S310  # our own
            return bool(answer.status == HTTPStatus.OK)
    except HTTPError as error:
        error.close()
        return False
    except OSError:  # it hangs up
        return False


def first_line(output: Path) -> str:
    """Of a file that is written; nothing before there is one."""
    line, end, _ = output.read_text().partition("\n")
    return line if end else ""


def port_of(process: subprocess.Popen[bytes]) -> int | None:
    """The port that a process listens at, once it does."""
    sockets = set()
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            sockets.add(str(entry.readlink()))
    for line in Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *rest = line.split()
        if state == LISTENS and f"socket:[{rest[5]}]" in sockets:
            return int(local.rpartition(":")[2], 16)
    return None


def awaited(get: Callable[[], T], process: subprocess.Popen[bytes] | None = None, why: Callable[[], str] = str) -> T:
    """Wait until it is true, and return it; no longer than `process` lives."""
    deadline = time.monotonic() + HANG_S
    while not (got := get()):
        assert process is None or process.poll() is None, why()
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)
    return got


class Asked(NamedTuple):
    """What a panel of the dashboard asks for.  legend: of its lines, such as "{{vm}}"; "" of a number."""

    expression: str
    legend: str

    def lines(self, watched: Watched) -> list[str]:
        """The legends of its lines, as Grafana writes them."""
        form = self.legend.replace("{{", "{").replace("}}", "}")
        return [form.format_map(it["metric"]) for it in watched.query(self.expression)]


def dashboard() -> list[Asked]:
    """All panels', as Grafana sends them for all hosts and VMs."""
    shipped = (SHIPPED / "dashboard.json").read_text()
    asked = []
    for target in (target for panel in json.loads(shipped)["panels"] for target in panel["targets"]):
        expression = target["expr"]
        for theirs, ours in GRAFANA.items():
            expression = expression.replace(theirs, ours)
        assert "$" not in expression
        asked.append(Asked(expression, target["legendFormat"]))
    return asked


@pytest.mark.kvm
@pytest.mark.qemu
def test_two_guests_are_scraped(watched: Watched) -> None:
    """Each vCPU of each is there, promtool finds nothing to mend, and every panel has data, a line for each."""
    with urlopen(watched.metrics, timeout=HANG_S) as page:  # noqa: S310  # our own
        linted = promtool("check", "metrics", told=page.read().decode())
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, "", "")
    seen = {(it["metric"]["vm"], it["metric"]["vcpu"]) for it in watched.query("pvclock_last_step_seconds")}
    assert seen == {(vm, vcpu) for vm in ("db", "web") for vcpu in "01"}
    awaited(lambda: len(watched.query("pvclock_frequency_offset_ratio")) == len(HOSTS) * 4)
    panels = dashboard()
    assert len(panels) > 12
    for asked in panels:  # on a busy host a scrape may be too late, and the next one is not
        awaited(lambda asked=asked: asked.lines(watched), why=lambda asked=asked: asked.expression)  # type: ignore[misc]
        lines = asked.lines(watched)
        assert len(lines) == len({*lines}), asked


def step(running: RunningQemu, vcpu: int, step_ns: int) -> None:
    """Have a vCPU's page say so much more, as if KVM had written it, through QEMU's memory."""
    with ExitStack() as resources:
        monitor, _ = connect(str(running.qmp))
        resources.callback(monitor.close)
        at = host_address(monitor, Gpa(probe.time_page_address(vcpu)))
    memory = os.open(f"/proc/{running.qemu.pid}/mem", os.O_RDWR)
    try:
        page = time_info(os.pread(memory, TIME_INFO.size, at))
        os.pwrite(memory, struct.pack("<I", page.version + 1), at)
        stepped = page._replace(version=page.version + 2, system_time=GuestNs(page.system_time + step_ns))
        os.pwrite(memory, TIME_INFO.pack(*stepped), at)
    finally:
        os.close(memory)


@pytest.mark.kvm
@pytest.mark.qemu
def test_an_injected_step_fires_its_alert(watched: Watched) -> None:
    """Of that vCPU of that VM alone, with how long it was; the pages of the VM's two vCPUs disagree from then on."""
    assert watched.firing() == set()
    step(watched.qemus["web"], 1, STEP_NS)
    of_vcpus = {("GuestClockStepped", "1"), ("GuestClockPagesDisagree", "0"), ("GuestClockPagesDisagree", "1")}
    expected = {(alert, host, "web", vcpu) for alert, vcpu in of_vcpus for host in HOSTS}
    awaited(lambda: watched.firing() >= expected, why=lambda: str(watched.firing()))
    assert watched.firing() == expected
    for last in watched.query('pvclock_last_step_seconds{vm="web",vcpu="1"}'):
        assert float(last["value"][1]) == STEP_NS / 1e9
    told = {alert["labels"]["alertname"]: alert["annotations"] for alert in watched.ask("alerts")["alerts"]}
    assert "jumped by 5ms at once" in told["GuestClockStepped"]["description"]
