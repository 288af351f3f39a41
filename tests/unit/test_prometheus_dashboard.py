"""The dashboard tells hosts apart: VMs of one name on two of them are two."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from qemu_glue.prometheus.exporter import FAMILIES
from tests.command_line import ROOT

pytestmark = pytest.mark.row("E10")

DASHBOARD = json.loads((ROOT / "qemu_glue" / "prometheus" / "dashboard.json").read_text())
SELECTOR = re.compile(r"(pvclock_\w+)(\{[^}]*\})?")
GROUPING = re.compile(r"\bby \(([^)]*)\)")


def targets() -> Iterator[Any]:
    """What the panels ask for."""
    for panel in DASHBOARD["panels"]:
        yield from panel["targets"]


def test_hosts_and_vms_are_chosen() -> None:
    """By variables that every selector takes, of metrics that there are."""
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables.keys() == {"datasource", "instance", "vm"}
    assert 'instance=~"$instance"' in variables["vm"]["definition"]
    labels = {family.name: family.labels for family in FAMILIES}
    for target in targets():
        selectors = SELECTOR.findall(target["expr"])
        assert selectors
        for metric, chosen in selectors:
            wanted = {"instance"} | {"vm"} & {*labels[metric.removesuffix("_total")]}
            assert all(f'{label}=~"${label}"' in chosen for label in wanted), target["expr"]


def test_each_line_names_its_host() -> None:
    """Its legend does, and no sum is over hosts, but for those that are one number."""
    assert len([*targets()]) > len(DASHBOARD["panels"]) > 0
    for target in targets():
        groupings = [each.split(", ") for each in GROUPING.findall(target["expr"])]
        is_a_number = target["expr"].startswith("sum(") and not groupings
        assert is_a_number == (target["legendFormat"] == "")
        if not is_a_number:
            named = re.findall(r"{{(\w+)}}", target["legendFormat"])
            assert "instance" in named
            assert all(grouping == named for grouping in groupings), target["expr"]
            assert not re.match(r"(sum|min|max|avg|count)\(", target["expr"])
