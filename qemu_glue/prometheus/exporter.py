"""The metrics of a watch as Prometheus scrapes them: names, types, units and help texts.  docs/prometheus.md has them.

Only this module imports prometheus_client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

import pvclock
from pvclock.meter.watch.rate import PageRate
from qemu_glue.prometheus.address import Address
from qemu_glue.prometheus.http_server import HttpServer, Page
from qemu_glue.prometheus.series import Series, VcpuSeries, VmSeries

__all__ = ["FAMILIES", "page_maker", "serve"]

OPEN_METRICS: Final = "application/openmetrics-text"
NS_PER_S: Final = 1e9
PPB_PER_ONE: Final = 1e9
"""To divide by: 1e-9 is no double, and what is multiplied by it ends in ...0001."""
GAUGE: Final = GaugeMetricFamily
COUNTER: Final = CounterMetricFamily
Kind: TypeAlias = type[CounterMetricFamily] | type[GaugeMetricFamily]
VM: Final = ("vm",)
VCPU: Final = ("vm", "vcpu")


def serve(address: Address, series: Series) -> HttpServer:
    """Serve `series` at `address`.  ConfigError."""
    return HttpServer(address, page_maker(series))


def page_maker(series: Series) -> Callable[[str], Page]:
    """What makes the page, in the format that an Accept header asks for: these metrics alone, of no process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(series))

    def page(accepted: str) -> Page:
        encode, kind = choose_encoder(OPEN_METRICS if _takes_open_metrics(accepted) else "")
        return Page(kind, encode(registry))

    return page


def _takes_open_metrics(accepted: str) -> bool:
    """Does an Accept header take OpenMetrics 1.0.0?  What else it says is not parsed, for it may be anything."""
    for each in accepted.split(","):
        kind, *rest = (part.strip() for part in each.split(";"))
        if kind == OPEN_METRICS and {part for part in rest if part.startswith("version=")} <= {"version=1.0.0"}:
            return True
    return False


class _Collector:
    """prometheus_client's: it is asked at each scrape."""

    def __init__(self, series: Series) -> None:
        self._series = series

    def collect(self) -> Iterator[Metric]:
        """The metrics as they stand."""
        for family in FAMILIES:
            made = family.kind(family.name, family.help, labels=family.labels)
            for labels, value in family.samples(self._series):
                if value is not None:
                    made.add_metric([_utf8(label) for label in labels], value)
            yield made


def _utf8(label: str) -> str:
    """A label's value: of a file's name, what is not UTF-8 is spelled out with backslashes."""
    return label.encode(errors="backslashreplace").decode()


# The table of metrics, and what its lines are made of.  Each value is read once: a watch may change it at any time.


class _Sample(NamedTuple):
    """labels: their values.  value: None while it is unknown."""

    labels: tuple[str, ...]
    value: float | None


class _Family(NamedTuple):
    """One metric of all that have it.  name: a counter's without _total.  samples: as they stand at a scrape."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    samples: Callable[[Series], Iterable[_Sample]]
    help: str


def _of_vm(name: str, kind: Kind, value: Callable[[VmSeries], float | None], meaning: str) -> _Family:
    return _Family(name, kind, VM, lambda series: (_Sample((vm.vm,), value(vm)) for vm in series.vms), meaning)


def _of_vcpu(name: str, kind: Kind, value: Callable[[VcpuSeries], float], meaning: str) -> _Family:
    def samples(series: Series) -> Iterator[_Sample]:
        return (_Sample(labels, value(vcpu)) for labels, vcpu in _vcpus(series.vms))

    return _Family(name, kind, VCPU, samples, meaning)


def _of_rate(name: str, ppb: Callable[[PageRate], float | None], meaning: str) -> _Family:
    """Of a VM that is seen."""

    def samples(series: Series) -> Iterator[_Sample]:
        for labels, vcpu in _vcpus(vm for vm in series.vms if vm.is_up):
            known = None if vcpu.rate is None else ppb(vcpu.rate)
            yield _Sample(labels, None if known is None else known / PPB_PER_ONE)

    return _Family(name, GAUGE, VCPU, samples, meaning)


def _steps(series: Series) -> Iterator[_Sample]:
    for labels, vcpu in _vcpus(series.vms):
        for cause, count in vcpu.steps.items():
            yield _Sample((*labels, cause), count)


def _troubles(series: Series) -> Iterator[_Sample]:
    return (_Sample((kind,), count) for kind, count in series.host.troubles.items())


def _vcpus(vms: Iterable[VmSeries]) -> Iterator[tuple[tuple[str, str], VcpuSeries]]:
    """Each vCPU with its labels."""
    for vm in vms:
        for number, vcpu in enumerate(vm.vcpus):
            yield (vm.vm, str(number)), vcpu


FAMILIES: Final = (
    _Family(
        "pvclock_build_info",
        GAUGE,
        ("version",),
        lambda _series: [_Sample((pvclock.__version__,), 1)],
        "1, with the version of pvclock that watches",
    ),
    _Family(
        "pvclock_host_clocksource_is_tsc",
        GAUGE,
        (),
        lambda series: [_Sample((), series.host.is_on_tsc)],
        "1 while the host's clocksource is tsc, 0 once its kernel has left it",
    ),
    _Family("pvclock_host_troubles", COUNTER, ("kind",), _troubles, "troubles of the host's clocks"),
    _of_vm("pvclock_watch_up", GAUGE, lambda vm: vm.is_up, "1 while the VM's clock is seen, 0 while it cannot be"),
    _of_vm("pvclock_watch_polls", COUNTER, lambda vm: vm.polls, "looks at the VM's clock"),
    _of_vm("pvclock_watch_interval_seconds", GAUGE, lambda vm: vm.interval_s, "time from one look to the next"),
    _of_vm("pvclock_guest_paused", GAUGE, lambda vm: vm.is_paused, "1 while the VMM has stopped the guest, else 0"),
    _Family(
        "pvclock_steps",
        COUNTER,
        (*VCPU, "cause"),
        _steps,
        "steps of the vCPU's clock against the TSC, surely longer than their bound: "
        "at a pause that the VMM told, at none (other), or where it tells nothing (unknown)",
    ),
    _of_vcpu("pvclock_unknown_steps", COUNTER, lambda vcpu: vcpu.unknown_steps, "steps of unknown length"),
    _of_vcpu(
        "pvclock_last_step_seconds",
        GAUGE,
        lambda vcpu: vcpu.last_step_ns / NS_PER_S,
        "how far the vCPU's clock went at the last step that was counted; negative if back",
    ),
    _of_vcpu(
        "pvclock_disagreements",
        COUNTER,
        lambda vcpu: vcpu.disagreements,
        "how often the page of the vCPU's clock began to give another time than another vCPU's",
    ),
    _of_vcpu(
        "pvclock_pages_disagree_seconds",
        GAUGE,
        lambda vcpu: vcpu.disagree_ns / NS_PER_S,
        "by how much the page of the vCPU's clock disagrees with another vCPU's, or last did",
    ),
    _of_rate(
        "pvclock_frequency_offset_ratio",
        lambda rate: rate.ppb,
        "how much faster the vCPU's clock runs than the host's reference; 1e-6 is 1 ppm",
    ),
    _of_rate(
        "pvclock_frequency_offset_bound_ratio",
        lambda rate: rate.bound_ppb,
        "how far pvclock_frequency_offset_ratio is known",
    ),
)
