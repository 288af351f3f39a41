"""docs/c.md is what examples/vmm.c does: its code is the example's own, or is built on it and run."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.waiting import HANG_S

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "c.md"
EXAMPLE = tuple((ROOT / "examples" / name).read_text(encoding="utf-8") for name in ("vmm.c", "tiny_vm.h"))
BLOCKS = re.findall(r"^```c\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
OWN = [block for block in BLOCKS if not any(block in text for text in EXAMPLE)]
COMPILE = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'pvclock' / 'include'}")

# The guide's own functions and the example's, on one page, with host time by hand.
PROGRAM = """
#define main vmm_main
#include "{root}/examples/vmm.c"
#undef main
{blocks}
static _Alignas(4096) uint8_t memory[RAM_BYTES];
static uint64_t now;
static uint64_t read_now(void *context) {{ (void)context; return now; }}
static void begin(void)
{{
	ram = memory;
	tsc_hz = 3000000000;
	counter.read = read_now;
	line = (struct pvclock_line){{ .num = PVCLOCK_NS_PER_SEC, .den = tsc_hz }};
	params = params_of(line.num, line.den);
	register_page(&vcpus[0], 1);
	now += tsc_hz;
	change_rate(1, 3);
}}
int main(int argc, char **argv)
{{
	begin();
	{body}
}}
"""

PAUSE = """
	struct pvclock_reading reading;

	(void)argv;
	pause_clock();
	now += 10 * tsc_hz;
	resume_clock(argc > 1);
	now += tsc_hz;
	if (pvclock_read(memory, 0, &counter, 1, &reading) != 0)
		return 1;
	printf("%lu %lu %u", (unsigned long)reading.ns, (unsigned long)pvclock_line_at(line, now).ns, reading.flags);
	return 0;
"""

RECORDS = """
	uint64_t outside = argc > 1 ? strtoull(argv[1], NULL, 0) : 0;
	struct pvclock_wall_clock record;

	(void)resume_clock, (void)pause_clock;
	write_wall_clock(4095);
	memcpy(&record, memory + 4095, sizeof record);
	write_wall_clock(outside);
	register_page(&vcpus[0], outside | 1);
	printf("%u %u %u %d", record.version, record.sec, record.nsec, vcpus[0].page != NULL);
	return 0;
"""


def build(scratch: Path, source: Path) -> Path:
    """Compile a program of one file."""
    program = scratch / "program"
    subprocess.run(["cc", *COMPILE, source, "-o", program], check=True)
    return program


@pytest.mark.row("style")
def test_the_guide_names_what_the_headers_have() -> None:
    """Each function, structure and constant of ours that the guide names is in a header, and in the declarations."""
    names = set(re.findall(r"\bpvclock_\w+\b(?!\.)", GUIDE.read_text(encoding="utf-8")))
    for folder, kind in (("include", "*.h"), (".", "*.pxd")):
        files = sorted((ROOT / "pvclock" / folder).glob(kind))
        known = set(re.findall(r"\bpvclock_\w+", "".join(file.read_text(encoding="utf-8") for file in files)))
        assert len(names & known) > 20
        assert not names - known, folder


@pytest.mark.row("style")
def test_the_guides_code_is_the_examples() -> None:
    """The guide goes through the example by its own lines, and adds pause and resume alone."""
    assert len(BLOCKS) >= 8
    assert [re.findall(r"^static \w+ (\w+)\(", block, re.MULTILINE) for block in OWN] == [
        ["pause_clock", "resume_clock"]
    ]


def run_guide(scratch: Path, body: str, *arguments: str) -> list[int]:
    """Run the program with that body, and return the numbers that it prints."""
    source = scratch / "program.c"
    source.write_text(PROGRAM.format(root=ROOT, blocks="".join(OWN), body=body), encoding="utf-8")
    program = build(scratch, source)
    done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True, timeout=HANG_S)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.row("E11", "K-17")
@pytest.mark.parametrize(("arguments", "ns"), [((), 1_000_000_000 + 11_000_000_000 // 3), (("freeze",), 1_333_333_333)])
def test_pause_and_resume_as_the_guide_has_them(tmp_path: Path, arguments: tuple[str, ...], ns: int) -> None:
    """After a pause the clock goes on from where it was, or gains what it missed, and GUEST_STOPPED is set."""
    shown, exact, flags = run_guide(tmp_path, PAUSE, *arguments)
    assert exact == ns
    assert abs(shown - exact) <= 3
    assert flags == 3  # STABLE, GUEST_STOPPED


@pytest.mark.row("K-02", "K-07")
@pytest.mark.parametrize("outside", [2**21 - 10, 2**64 - 2])
def test_the_examples_records(tmp_path: Path, outside: int) -> None:
    """The wall clock is the time of day less guest time; records that are not in memory are let be."""
    before = time.time_ns()
    version, sec, nsec, has_page = run_guide(tmp_path, RECORDS, str(outside))
    assert before <= sec * 10**9 + nsec + 10**9 <= time.time_ns()  # guest time is 1 s
    assert (version, has_page) == (2, 0)


# Where /dev is empty, in a mount namespace; and without any rights.
HIDDEN = ("unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs none /dev && exec "$0"')
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.mark.row("E13")
@pytest.mark.parametrize(
    ("command", "why"), [(HIDDEN, "No such file or directory"), (NOBODY, "Permission denied")], ids=["none", "nobody"]
)
def test_without_kvm_the_example_says_so(command: tuple[str, ...], why: str) -> None:
    """Where /dev/kvm is missing, or not the user's to open, it says that in one line and exits with 2."""
    if command is NOBODY and os.geteuid() != 0:
        pytest.skip("setpriv takes root to run a program as nobody: run the tests as root")
    with TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)  # for nobody to find the program
        program = build(Path(scratch), ROOT / "examples" / "vmm.c")
        done = subprocess.run([*command, program], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"vmm: /dev/kvm: {why}\n")
