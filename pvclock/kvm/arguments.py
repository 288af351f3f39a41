"""Checks of what a VMM passes to KVM's ioctls: lists of vCPUs, and the dicts that stand for KVM's structs.

The checks of plain types are in pvclock.arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pvclock.arguments import sequence, serving, whole
from pvclock.errors import ConfigError, WrongType
from pvclock.quantities import U64_MASK

if TYPE_CHECKING:
    from pvclock.kvm._vcpu import Vcpu

__all__ = ["members", "vcpu_of", "vcpus_of"]


def vcpus_of(values: Sequence[Vcpu]) -> list[Vcpu]:
    """A VM's vCPUs, by number; ConfigError for none at all."""
    vcpus = list(sequence("vcpus", values, "a list of the VM's vCPUs, each a Vcpu, as Vm.create_vcpu() makes it"))
    for number, vcpu in enumerate(vcpus):
        vcpu_of(f"vcpus[{number}]", vcpu)
    if not vcpus:
        raise ConfigError("vcpus is empty; a VM has one vCPU or more, as Vm.create_vcpu() makes them")
    return vcpus


def vcpu_of(parameter: str, value: Vcpu) -> Vcpu:
    """One of a VM's vCPUs."""
    return serving(parameter, value, "run", "request_exit", "get_tsc_khz", wanted="a Vcpu")


def members(parameter: str, given: object, pattern: Mapping[str, object]) -> dict[str, object]:
    """A dict with exactly the members of the struct that `pattern` stands for: numbers, and dicts and lists of them.

    ConfigError names what is unknown, and what is missing.
    """
    if not isinstance(given, dict):
        raise WrongType(parameter, given, f"a dict with {', '.join(pattern)}")
    if unknown := [repr(name) for name in given if name not in pattern]:
        raise ConfigError(f"{parameter} has {', '.join(unknown)}, which is unknown; it can be {', '.join(pattern)}")
    if missing := [repr(name) for name in pattern if name not in given]:
        raise ConfigError(f"{parameter} lacks {', '.join(missing)}; change what KVM gives, and give all of it back")
    for name, member in pattern.items():
        _check_member(f"{parameter}[{name!r}]", given[name], member)
    return given


def _check_member(parameter: str, given: object, pattern: object) -> None:
    if isinstance(pattern, Mapping):
        members(parameter, given, pattern)
    elif isinstance(pattern, list):
        values = sequence(parameter, given, f"a list of {len(pattern)} whole numbers")
        if len(values) != len(pattern):
            raise ConfigError(f"{parameter} has {len(values)} numbers; it has {len(pattern)}")
        for place, value in enumerate(values):
            whole(f"{parameter}[{place}]", value, 0, U64_MASK)
    else:
        whole(parameter, given, 0, U64_MASK)
