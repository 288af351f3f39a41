"""What the bare probe makes of firmware's tables: they may be anybody's, and nothing is read but what was summed up."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.unit.c_program import FLAGS
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("E18")

PROBE: Final = Path(__file__).parents[2] / "pvclock" / "probe"
MEMORY_BYTES: Final = 4 << 20
POINTER: Final = 0xF0000
"""In the BIOS area, where a guest looks for both of them."""
TABLE: Final = 0xF1000
FAR: Final = 0x100000
RUBBISH: Final = 0xCC
"""What lies around the tables."""

# bare_acpi.c with memory of its own in place of a machine's.
PROGRAM: Final = r"""
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#define PVCLOCK_PROBE_BARE_PHYSICAL_H

static uint8_t memory[4 << 20];
static unsigned long loads;

static bool is_mapped(uint64_t address, uint64_t bytes)
{
    return address < sizeof(memory) && bytes <= sizeof(memory) - address;
}

static uint64_t load_bytes(uint64_t address, unsigned bytes)
{
    uint64_t value = 0;

    for (unsigned i = 0; i < bytes; i++, loads++)
        value |= (uint64_t)(is_mapped(address + i, 1) ? memory[address + i] : printf("beyond\n")) << 8 * i;
    return value;
}

#define load8(address) ((uint8_t)load_bytes(address, 1))
#define load16(address) ((uint16_t)load_bytes(address, 2))
#define load32(address) ((uint32_t)load_bytes(address, 4))
#define load64(address) load_bytes(address, 8)

#include "bare_acpi.c"

struct gate_result bare_gate(uint64_t operation, uint64_t first, uint64_t second, uint64_t third)
{
    return (struct gate_result){operation & first & second & third, 1};
}

/* Memory is standard input. */
int main(void)
{
    struct acpi_facts facts;

    if (fread(memory, 1, sizeof(memory), stdin) != sizeof(memory))
        return 1;
    acpi_find(0, &facts);
    printf("%u CPUs, at least %u\n", facts.cpus, facts.cpus_at_least);
    printf("%lu\n", loads);
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled."""
    binary = tmp_path_factory.mktemp("acpi") / "it"
    source = binary.with_suffix(".c")
    source.write_text(PROGRAM, encoding="utf-8")
    subprocess.run(["cc", *FLAGS, "-O1", f"-I{PROBE}", source, "-o", binary], check=True)
    return binary


def found(program: Path, tables: dict[int, bytes]) -> tuple[str, int]:
    """What it finds in a memory of rubbish that has tables at these addresses, and how many bytes it looks at."""
    memory = bytearray([RUBBISH]) * MEMORY_BYTES
    for at, table in tables.items():
        memory[at : at + len(table)] = table
    done = subprocess.run([program], input=memory, capture_output=True, check=True, timeout=HANG_S)
    (facts, loads) = done.stdout.decode().splitlines()
    return facts, int(loads)


def with_checksum(table: bytes, at: int) -> bytes:
    """A table whose bytes sum to 0."""
    return table[:at] + bytes([-sum(table[:at] + table[at + 1 :]) & 0xFF]) + table[at + 1 :]


def mp_tables(listed: int, entries: bytes, *, length: int | None = None) -> dict[int, bytes]:
    """A pointer, and an MP table whose header says that it lists so many, and how long it is."""
    length = 44 + len(entries) if length is None else length
    header = struct.pack("<4sHBB20sIHHIHBB", b"PCMP", length, 4, 0, b"", 0, 0, listed, 0, 0, 0, 0)
    pointer = with_checksum(struct.pack("<4sIBBB5s", b"_MP_", TABLE, 1, 4, 0, b""), 10)
    table = header + entries
    return {POINTER: pointer, TABLE: with_checksum(table[:length], 7) + table[length:]}


def acpi_table(signature: bytes, body: bytes) -> bytes:
    """An ACPI table with its header."""
    header = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), 1, 0, b"", b"", 0, b"", 0)
    return with_checksum(header + body, 9)


def acpi_tables(root: bytes, tables: dict[int, bytes]) -> dict[int, bytes]:
    """A pointer, an RSDT and the others."""
    return {POINTER: with_checksum(struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"", 0, TABLE), 8), TABLE: root, **tables}


PROCESSOR: Final = struct.pack("<BBBB16s", 0, 0, 0, 1, b"")
DISABLED: Final = struct.pack("<BBBB16s", 0, 0, 0, 0, b"")
BUS: Final = struct.pack("<BB6s", 1, 0, b"ISA   ")


@pytest.mark.parametrize(
    ("tables", "cpus"),
    [
        pytest.param(mp_tables(3, PROCESSOR + DISABLED + PROCESSOR), 2, id="whole"),
        pytest.param(mp_tables(4, PROCESSOR * 2 + BUS + PROCESSOR), 2, id="processors come first"),
        pytest.param(mp_tables(1, PROCESSOR * 2), 1, id="fewer are listed"),
        pytest.param(mp_tables(0xFFFF, PROCESSOR * 9, length=44 + 2 * 20), 2, id="more are listed than it has"),
        pytest.param(mp_tables(9, PROCESSOR * 9, length=44 + 2 * 20 + 19), 2, id="the last is cut"),
        pytest.param(mp_tables(1, PROCESSOR, length=43), 0, id="no whole header"),
        pytest.param(mp_tables(1, PROCESSOR, length=0), 0, id="empty"),
    ],
)
def test_an_mp_table_says_how_many_cpus_there_are_at_least(program: Path, tables: dict[int, bytes], cpus: int) -> None:
    """Its enabled processors within its length."""
    assert found(program, tables)[0] == f"0 CPUs, at least {cpus}"


LAPIC: Final = struct.pack("<BBBBI", 0, 8, 0, 0, 1)
X2APIC: Final = struct.pack("<BBHIII", 9, 16, 0, 0, 1, 0)
NMI: Final = struct.pack("<BBBHB", 4, 6, 0, 0, 0)


@pytest.mark.parametrize(
    ("entries", "cpus"),
    [(LAPIC + NMI + X2APIC, 2), (LAPIC * 2 + b"\0\0" + LAPIC, 2), (LAPIC + LAPIC[:7], 1), (LAPIC + b"\0", 1)],
    ids=["whole", "entry of 0 bytes", "entry cut off", "half a header"],
)
def test_a_madt_says_how_many_cpus_there_are(program: Path, entries: bytes, cpus: int) -> None:
    """Whatever an MP table says, and what lies behind its end."""
    root = acpi_table(b"RSDT", struct.pack("<I", FAR))
    tables = acpi_tables(root, {FAR: acpi_table(b"APIC", bytes(8) + entries) + LAPIC * 9})
    mp = {POINTER + 0x100: mp_tables(0, b"")[POINTER], TABLE + 0x800: b""}
    assert found(program, {**tables, **mp})[0] == f"{cpus} CPUs, at least 0"


LARGE: Final = acpi_table(b"APIC", bytes((1 << 20) - 36))
BROKEN: Final = acpi_table(b"APIC", bytes((1 << 16) - 36))[:-1] + b"\xff"


@pytest.mark.parametrize(
    "tables",
    [
        acpi_tables(acpi_table(b"RSDT", struct.pack("<I", FAR) * 512), {FAR: LARGE}),
        acpi_tables(acpi_table(b"RSDT", struct.pack("<I", FAR) * 512), {FAR: acpi_table(b"JUNK", LARGE)}),
        acpi_tables(b"", {FAR: LARGE, 0x200000: acpi_table(b"RSDT", struct.pack("<I", FAR) * 0x3FFF0)}),
    ],
    ids=["large tables", "of other names", "a large root"],
)
def test_tables_that_would_take_for_ever_to_sum_up(program: Path, tables: dict[int, bytes]) -> None:
    """They are passed over: no more is read than a look for pointers takes, which is 8192 places."""
    if not tables[TABLE]:
        pointer = struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"", 0, 0x200000)
        tables = {**tables, POINTER: with_checksum(pointer, 8)}
    facts, loads = found(program, tables)
    assert facts == "0 CPUs, at least 0"
    assert loads < 1 << 17
