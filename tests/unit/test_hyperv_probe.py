"""hvprobe's memory as its reader has it: the layout of the payload's source, and blocks that are not its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pvclock.payloads
from pvclock._memory import GuestMemory
from pvclock.payloads import hyperv_probe, probe
from pvclock.payloads.hyperv_probe import EXPIRIES_MAX, HvRecord

pytestmark = pytest.mark.row("E4")

FOLDER = Path(pvclock.payloads.__file__).parent
BLOCK = 0x200000
RECORDS = 0x202000
RECORD_BYTES = 512
LOGS = 0x240000
LOG_BYTES = 0x8000
NAMES_APART = {
    "page_above_counter": "page_above",
    "counter_above_page": "counter_above",
}
"""Where the source has a shorter name for a field."""


@pytest.fixture
def memory() -> GuestMemory:
    """Guest memory without a guest."""
    return GuestMemory(bytearray(4 << 20))


def source_offsets() -> dict[str, int]:
    """The offsets of a record's fields in the payload's source, by name in lower case."""
    source = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("probe_layout.s", "hvprobe.s"))
    return {name.lower(): int(offset) for name, offset in re.findall(r"\.equ REC_(\w+), +(\d+)", source)}


def test_a_record_is_laid_out_as_in_the_source() -> None:
    """Every field of HvRecord lies where the payload's source has the field of that name."""
    offsets = source_offsets()
    assert {NAMES_APART.get(name, name): 8 * at for at, name in enumerate(HvRecord._fields)} == offsets


def test_a_record_is_read_from_its_vcpus_place(memory: GuestMemory) -> None:
    """The fields of vCPU 3's record come from its 512 bytes, in order, and the offset is signed."""
    for at in range(len(HvRecord._fields)):
        memory.write(RECORDS + 3 * RECORD_BYTES + 8 * at, (-at % 2**64).to_bytes(8, "little"))
    record = hyperv_probe.read_record(memory, 3)
    signed = HvRecord._fields.index("offset")
    assert list(record) == [-at if at == signed else -at % 2**64 for at in range(len(record))]


def test_no_more_expiries_than_the_log_holds(memory: GuestMemory) -> None:
    """A guest that claims more interrupts than there is room for gives those that there are."""
    expiries_at = 8 * HvRecord._fields.index("expiries")
    memory.write(RECORDS + RECORD_BYTES + expiries_at, (2**64 - 1).to_bytes(8, "little"))
    memory.write(LOGS + LOG_BYTES, (7).to_bytes(8, "little"))
    expiries = hyperv_probe.read_expiries(memory, 1)
    assert len(expiries) == EXPIRIES_MAX
    assert [expiry.expiration for expiry in expiries[:2]] == [7, 0]


def test_a_block_that_is_not_hvprobes(memory: GuestMemory) -> None:
    """Without the magic there is no block; clockprobe's and another version's are not taken for one."""
    assert hyperv_probe.read_block(memory) is None
    memory.write(BLOCK, b"PVCPROBE" + hyperv_probe.ABI_VERSION.to_bytes(4, "little"))
    assert hyperv_probe.read_block(memory) is None
    memory.write(BLOCK, b"HPVPROBE" + (hyperv_probe.ABI_VERSION + 1).to_bytes(4, "little"))
    with pytest.raises(ValueError, match=f"hvprobe ABI {hyperv_probe.ABI_VERSION + 1}"):
        hyperv_probe.read_block(memory)


@pytest.mark.parametrize("vcpu", [-1, probe.MAX_CPUS])
def test_a_vcpu_that_no_probe_has(memory: GuestMemory, vcpu: int) -> None:
    """There are records and message pages for 16 vCPUs."""
    for read in (hyperv_probe.read_record, hyperv_probe.read_expiries):
        with pytest.raises(ValueError, match="16"):
            read(memory, vcpu)
    with pytest.raises(ValueError, match="16"):
        hyperv_probe.message_page_address(vcpu)
