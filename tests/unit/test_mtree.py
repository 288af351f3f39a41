"""Where a QEMU guest's RAM is, read from what `info mtree -f` prints in any version."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvclock import Gpa
from qemu_glue.watch.mtree import MtreeRange, ram_ranges

pytestmark = pytest.mark.row("E3")

PC = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 AS "piix3-ide", root: bus master container
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): pc.ram KVM
  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000 KVM
  00000000000e0000-00000000000effff (prio 1, romd): isa-bios @0000000000020000
  00000000000f0000-00000000000fffff (prio 0, ram): pc.ram @00000000000f0000 KVM
  0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000 KVM
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios KVM
  0000000100000000-000000013fffffff (prio 0, ram): pc.ram @00000000c0000000 KVM

FlatView #2
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): smram

FlatView #3
 AS "ich9-ahci", root: bus master container
 Root memory region: (none)
  No rendered FlatView

"""


def test_a_pc_of_qemu_7_2() -> None:
    """RAM is what lies in the system's view as RAM: no ROM, flash or device, and no other view's."""
    assert ram_ranges(PC.replace("\n", "\r\n")) == [
        MtreeRange(Gpa(0), 0xC0000, "pc.ram", 0),
        MtreeRange(Gpa(0xF0000), 0x10000, "pc.ram", 0xF0000),
        MtreeRange(Gpa(0x100000), 0xBFF00000, "pc.ram", 0x100000),
        MtreeRange(Gpa(0x100000000), 0x40000000, "pc.ram", 0xC0000000),
    ]


@pytest.mark.parametrize("text", ["", "unknown command: 'info mtree -f'", PC.partition("FlatView #1")[0], "FlatView #"])
def test_no_system_view(text: str) -> None:
    """Where QEMU shows no view of the system there are no ranges, and nothing breaks."""
    assert ram_ranges(text) == []


numbers = st.integers(0, 1 << 20)
words = st.text("az09_./@-", min_size=1, max_size=12)
names = st.tuples(words, st.sampled_from(["", " A0", " KVM1"])).map("".join)
kinds = st.sampled_from(["ram", "nv-ram", "rom", "nv-rom", "romd", "ramd", "i/o", "container"])
priorities = st.sampled_from(["", "prio 0, ", "prio -1000, ", "prio 4096, "])
accelerators = st.sampled_from(["", " KVM", " KVM KVM", " kvm"])


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(numbers, numbers, names, kinds, priorities, numbers, accelerators),
        max_size=8,
    )
)
def test_every_format(pieces: list[tuple[int, int, str, str, str, int, str]]) -> None:
    """Priority, "nv-", offset and accelerators are each there or not; names may have spaces and an @."""
    lines, expected, begin = ['FlatView #0\n AS "memory", root: system\n Root memory region: system'], [], 0
    for pages, gap, name, kind, priority, offset, accelerator in pieces:
        first, length = begin + gap, (pages + 1) << 12
        begin = first + length
        at = f" @{offset:016x}" if offset else ""
        lines.append(f"  {first:016x}-{begin - 1:016x} ({priority}{kind}): {name}{at}{accelerator}")
        if kind in {"ram", "nv-ram"}:
            expected.append(MtreeRange(Gpa(first), length, name, offset))
    assert ram_ranges("\n".join(lines) + "\n\n") == expected
