"""What a stream's cpu sections hold of the vCPUs' clocks: TSC, its frequency and offset, and the paravirtual MSRs.

Their fields are of many lengths, so they are read by the description only.
Source: QEMU target/i386/machine.c (vmstate_x86_cpu and its subsections, which are left out if a value is the default).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pvclock import StateFileError
from qemu_glue.migration.sections import Section, Sections
from qemu_glue.migration.stream_file import StreamFile

__all__ = ["MEANINGS", "VcpuRegisters", "read_vcpus"]

NAME: Final = "cpu"
VCPUS_MAX: Final = 4096


class VcpuRegisters(NamedTuple):
    """One vCPU.  tsc_khz: None if the stream does not say it.  vcpu: its index."""

    vcpu: int
    tsc: int
    tsc_khz: int | None
    tsc_adjust: int
    tsc_aux: int
    system_time_msr: int
    wall_clock_msr: int
    steal_time_msr: int
    pv_eoi_msr: int
    async_pf_msr: int


FIELDS: Final = {
    "tsc": "env.tsc",
    "tsc_khz": "cpu/tsc_khz:env.tsc_khz",
    "tsc_adjust": "cpu/msr_tsc_adjust:env.tsc_adjust",
    "tsc_aux": "env.tsc_aux",
    "system_time_msr": "env.system_time_msr",
    "wall_clock_msr": "env.wall_clock_msr",
    "steal_time_msr": "cpu/steal_time_msr:env.steal_time_msr",
    "pv_eoi_msr": "cpu/async_pv_eoi_msr:env.pv_eoi_en_msr",
    "async_pf_msr": "cpu/async_pf_msr:env.async_pf_en_msr",
}
"""Where each one stands, as Layout.places has it."""

MEANINGS: Final = {
    "tsc": "Its TSC when the VM was stopped; QEMU reads one vCPU after the other.",
    "tsc_khz": "Its TSC's frequency in kHz; not there if KVM did not say it, and for machine types up to 2.5.",
    "tsc_adjust": "IA32_TSC_ADJUST as the guest reads it; 0 where the stream has none.",
    "tsc_aux": "IA32_TSC_AUX, which RDTSCP returns.",
    "system_time_msr": "Its time page's address, and in bit 0 whether KVM writes that page.",
    "wall_clock_msr": "The address of the wall-clock page; to load it makes KVM write that page anew.",
    "steal_time_msr": "Its steal-time record's address, and in bit 0 whether KVM writes it.",
    "pv_eoi_msr": "Its EOI byte's address, and in bit 0 whether KVM uses it.",
    "async_pf_msr": "Its address for asynchronous page faults, and switches.",
}


def read_vcpus(stream: StreamFile, sections: Sections) -> tuple[VcpuRegisters, ...]:
    """The vCPUs by their index; none if their sections are not found.  StateFileError if they lack what all have."""
    found = sorted(instance for name, instance in sections.found if name == NAME)
    if len(found) > VCPUS_MAX:
        raise StateFileError(NAME, f"{len(found)} vCPUs", f"up to {VCPUS_MAX}")
    return tuple(_read(stream, sections.found[NAME, index]) for index in found)


def _read(stream: StreamFile, section: Section) -> VcpuRegisters:
    index = section.layout.instance
    missing = FIELDS.keys() - {name for name, field in FIELDS.items() if field in section.layout.places}
    always = {name for name, field in FIELDS.items() if ":" not in field}
    if missing & always:
        raise StateFileError(f"cpu[{index}]", f"no {', '.join(sorted(missing & always))}", "an x86 vCPU of QEMU's")
    values: dict[str, int] = {
        name: section.read(stream, field) for name, field in FIELDS.items() if name not in missing
    }
    tsc_khz = values.pop("tsc_khz", None)
    return VcpuRegisters(vcpu=index, tsc_khz=tsc_khz, **{**dict.fromkeys(missing - {"tsc_khz"}, 0), **values})
