"""What the bare probe makes of firmware's tables: they may be anybody's, and nothing is read but what was summed up."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.firmware_tables import LAPIC, POINTER, PROCESSOR, acpi_table, madt, mp_tables, root_pointer, rsdt
from tests.unit.c_program import FLAGS
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("E18")

PROBE: Final = Path(__file__).parents[2] / "pvclock" / "probe"
MEMORY_BYTES: Final = 4 << 20
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


def mp(listed: int, entries: bytes, *, length: int | None = None) -> dict[int, bytes]:
    """A pointer, and an MP table whose header says that it lists so many, and how long it is."""
    pointer, table = mp_tables(TABLE, listed, entries, length=length)
    return {POINTER: pointer, TABLE: table}


def acpi(root: bytes, table: bytes, *, root_at: int = TABLE) -> dict[int, bytes]:
    """A pointer, a root and one other table."""
    return {POINTER: root_pointer(root_at), root_at: root, FAR: table}


DISABLED: Final = struct.pack("<BBBB16s", 0, 0, 0, 0, b"")
BUS: Final = struct.pack("<BB6s", 1, 0, b"ISA   ")


@pytest.mark.parametrize(
    ("tables", "cpus"),
    [
        pytest.param(mp(3, PROCESSOR + DISABLED + PROCESSOR), 2, id="whole"),
        pytest.param(mp(4, PROCESSOR * 2 + BUS + PROCESSOR), 2, id="processors come first"),
        pytest.param(mp(1, PROCESSOR * 2), 1, id="fewer are listed"),
        pytest.param(mp(0xFFFF, PROCESSOR * 9, length=44 + 2 * 20), 2, id="more are listed than it has"),
        pytest.param(mp(9, PROCESSOR * 9, length=44 + 2 * 20 + 19), 2, id="the last is cut"),
        pytest.param(mp(1, PROCESSOR, length=43), 0, id="no whole header"),
        pytest.param(mp(1, PROCESSOR, length=0), 0, id="empty"),
    ],
)
def test_an_mp_table_says_how_many_cpus_there_are_at_least(program: Path, tables: dict[int, bytes], cpus: int) -> None:
    """Its enabled processors within its length."""
    assert found(program, tables)[0] == f"0 CPUs, at least {cpus}"


X2APIC: Final = struct.pack("<BBHIII", 9, 16, 0, 0, 1, 0)
NMI: Final = struct.pack("<BBBHB", 4, 6, 0, 0, 0)


@pytest.mark.parametrize(
    ("entries", "cpus"),
    [(LAPIC + NMI + X2APIC, 2), (LAPIC * 2 + b"\0\0" + LAPIC, 2), (LAPIC + LAPIC[:7], 1), (LAPIC + b"\0", 1)],
    ids=["whole", "entry of 0 bytes", "entry cut off", "half a header"],
)
def test_a_madt_says_how_many_cpus_there_are(program: Path, entries: bytes, cpus: int) -> None:
    """Its enabled ones within its length, whatever lies behind its end."""
    tables = acpi(rsdt(FAR), madt(entries) + LAPIC * 9)
    assert found(program, tables)[0] == f"{cpus} CPUs, at least 0"


@pytest.mark.parametrize(
    "tables",
    [
        pytest.param(acpi(rsdt(*[FAR] * 512), madt(bytes((1 << 20) - 44))), id="large tables"),
        pytest.param(acpi(rsdt(*[FAR] * 512), acpi_table(b"JUNK", bytes(1 << 15))), id="of other names"),
        pytest.param(acpi(rsdt(*[FAR] * 0x3FFF0), madt(LAPIC), root_at=2 * FAR), id="a large root"),
    ],
)
def test_tables_that_would_take_for_ever_to_sum_up(program: Path, tables: dict[int, bytes]) -> None:
    """They are passed over: no more is read than a look for pointers takes, which is 8192 places."""
    facts, loads = found(program, tables)
    assert facts == "0 CPUs, at least 0"
    assert loads < 1 << 17
