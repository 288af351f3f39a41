"""The metrics of a watch as Prometheus scrapes them: names, types, units and help texts.  docs/prometheus.md has them.

Only this module imports prometheus_client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

import pvclock
from qemu_glue.prometheus.address import Address
from qemu_glue.prometheus.http_server import HttpServer, Page
from qemu_glue.prometheus.series import HostSeries, Series, VcpuSeries, VmSeries

__all__ = ["page_maker", "serve"]

PPB: Final = 1e-9
NS: Final = 1e-9


def serve(address: Address, series: Series) -> HttpServer:
    """Serve `series` at `address`.  ConfigError."""
    return HttpServer(address, page_maker(series))


def page_maker(series: Series) -> Callable[[str], Page]:
    """What makes the page, in the format that an Accept header asks for: these metrics alone, of no process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(series))

    def page(accepted: str) -> Page:
        encode, kind = choose_encoder(accepted)
        return Page(kind, encode(registry))

    return page


class _Collector:
    """prometheus_client's: it is asked at each scrape."""

    def __init__(self, series: Series) -> None:
        self._series = series

    def collect(self) -> Iterator[Metric]:
        """The metrics as they stand."""
        vms = self._series.vms
        build = GaugeMetricFamily(
            "pvclock_build_info",
            "It is always 1, and its label is the version of pvclock that watches.",
            labels=["version"],
        )
        build.add_metric([pvclock.__version__], 1)
        yield build
        yield from _of_host(self._series.host)
        yield from _of_watches(vms)
        yield from _of_steps(vms)
        yield from _of_disagreements(vms)
        yield from _of_rates(vms)


def _of_host(host: HostSeries) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "pvclock_host_clocksource_is_tsc",
        "It is 1 while the host's clocksource is tsc, and 0 once its kernel has left it.",
        value=int(host.is_on_tsc),
    )
    troubles = CounterMetricFamily(
        "pvclock_host_troubles",
        "It counts troubles of the host's clocks since the watch began, by their kind.",
        labels=["kind"],
    )
    for kind, count in host.troubles.items():
        troubles.add_metric([kind.value], count)
    yield troubles


def _of_watches(vms: Iterable[VmSeries]) -> Iterator[Metric]:
    up = GaugeMetricFamily(
        "pvclock_watch_up",
        "It is 1 while the VM's clock is watched, and 0 while its socket is there and its clock cannot be watched.",
        labels=["vm"],
    )
    polls = CounterMetricFamily(
        "pvclock_watch_polls", "It counts how often the pages of the VM's clock were looked at.", labels=["vm"]
    )
    interval = GaugeMetricFamily(
        "pvclock_watch_interval_seconds",
        "It is the time from one look at the pages of the VM's clock to the next.",
        labels=["vm"],
    )
    paused = GaugeMetricFamily(
        "pvclock_guest_paused",
        "It is 1 while the VMM has stopped the guest, and 0 while the guest runs.",
        labels=["vm"],
    )
    for vm in vms:
        up.add_metric([vm.vm], int(vm.is_up))
        polls.add_metric([vm.vm], vm.polls)
        if vm.interval_s is not None:
            interval.add_metric([vm.vm], vm.interval_s)
        if vm.is_paused is not None:
            paused.add_metric([vm.vm], int(vm.is_paused))
    yield from (up, polls, interval, paused)


def _of_steps(vms: Iterable[VmSeries]) -> Iterator[Metric]:
    steps = CounterMetricFamily(
        "pvclock_steps",
        "It counts steps of the vCPU's clock against the TSC that are surely longer than their bound, by cause: "
        "a pause that the VMM told, none (other), or unknown where the VMM tells nothing.",
        labels=["vm", "vcpu", "cause"],
    )
    unknown = CounterMetricFamily(
        "pvclock_unknown_steps",
        "It counts steps of the vCPU's clock that are of unknown length, for the guest's TSC may have been changed.",
        labels=["vm", "vcpu"],
    )
    last = GaugeMetricFamily(
        "pvclock_last_step_seconds",
        "It is the last step that was counted: the vCPU's clock went forward by it, or back if it is negative.",
        labels=["vm", "vcpu"],
    )
    for labels, vcpu in _vcpus(vms):
        for cause, count in vcpu.steps.items():
            steps.add_metric([*labels, cause.value], count)
        unknown.add_metric(labels, vcpu.unknown_steps)
        last.add_metric(labels, vcpu.last_step_ns * NS)
    yield from (steps, unknown, last)


def _of_disagreements(vms: Iterable[VmSeries]) -> Iterator[Metric]:
    apart = GaugeMetricFamily(
        "pvclock_pages_disagree_seconds",
        "It is by how much the page of the vCPU's clock disagrees with another vCPU's, or last did.",
        labels=["vm", "vcpu"],
    )
    count = CounterMetricFamily(
        "pvclock_disagreements",
        "It counts how often the page of the vCPU's clock began to disagree with another vCPU's.",
        labels=["vm", "vcpu"],
    )
    for labels, vcpu in _vcpus(vms):
        apart.add_metric(labels, vcpu.disagree_ns * NS)
        count.add_metric(labels, vcpu.disagreements)
    yield from (apart, count)


def _of_rates(vms: Iterable[VmSeries]) -> Iterator[Metric]:
    offset = GaugeMetricFamily(
        "pvclock_frequency_offset_ratio",
        "It is how much faster the vCPU's clock runs than the host's reference clock; a ratio of 1e-6 is 1 ppm.",
        labels=["vm", "vcpu"],
    )
    bound = GaugeMetricFamily(
        "pvclock_frequency_offset_bound_ratio",
        "It is the error bound of pvclock_frequency_offset_ratio, and shrinks as the watch grows longer.",
        labels=["vm", "vcpu"],
    )
    for labels, vcpu in _vcpus(vm for vm in vms if vm.is_up):
        rate = vcpu.rate
        if rate is not None and rate.ppb is not None and rate.bound_ppb is not None:
            offset.add_metric(labels, rate.ppb * PPB)
            bound.add_metric(labels, rate.bound_ppb * PPB)
    yield from (offset, bound)


def _vcpus(vms: Iterable[VmSeries]) -> Iterator[tuple[list[str], VcpuSeries]]:
    """Each vCPU with its labels."""
    for vm in vms:
        for number, vcpu in enumerate(vm.vcpus):
            yield [vm.vm, str(number)], vcpu
