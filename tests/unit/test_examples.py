"""The examples: what they print, how long they are, and that a VMM author needs no private name for any of it."""

from __future__ import annotations

import ast
import os
import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.command_line import run_python

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
VMM, EMULATOR, DEVICE_MODEL = (ROOT / "examples" / f"{name}.py" for name in ("vmm", "emulator", "device_model"))
GUIDE = ROOT / "docs" / "embedding.md"
LINES_MAX = {VMM: 79, EMULATOR: 60, DEVICE_MODEL: 59}
PUBLIC = {"pvclock", "pvclock.kvm", "pvclock.machine"}
BOUND_NS = 4.0
"""A reading against the timeline: 2 ns, the tick that a shift of -1 cuts, and 0.47 ppb of 2 s."""

QUOTED = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EVERY_EXAMPLE = pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.name)


@pytest.mark.row("E13")
def test_the_emulators_guest_gets_what_is_the_clocks() -> None:
    """CPUID, MSRs, TSC, timer, hypercall and #GP each have their line, and the guest reads its clock's time."""
    done = run_python(EMULATOR)
    assert (done.returncode, done.stderr) == (0, "")
    for expected in (
        r"^cpuid 0x1 0x0: CpuidLeaf\(eax=0, ebx=0, ecx=2147483648, edx=0\)$",
        r"^cpuid 0x40000001 0x0: CpuidLeaf\(eax=\d+, ",
        r"^rdtsc 0x0 0x0: \d+$",
        r"^interrupt, \d+ ns late$",
        r"^vmcall 0x9 0x3000: HypercallResult\(status=<Status.SUCCESS: 'success'>, rax=",
        r"^#GP: RDMSR 0x4b564d08: not served$",
    ):
        assert re.search(expected, done.stdout, re.MULTILINE), (expected, done.stdout)
    readings = re.findall(r"guest (\d+) ns, ([+-][\d.]+) ns from", done.stdout)
    assert all(abs(float(apart)) <= BOUND_NS for _, apart in readings)
    first, second = (int(ns) for ns, _ in readings)
    assert second - first >= 50_000_000  # what the timer between them takes


@pytest.mark.row("E13")
@pytest.mark.parametrize(("redirect", "status", "lines"), [("| head -1", 0, 1), (">/dev/full", 2, 0)])
def test_nobody_reads_the_emulator(redirect: str, status: int, lines: int) -> None:
    """It ends, without a traceback, where a reader leaves or the disk is full; the status tells."""
    done = run_python(EMULATOR, redirect=redirect)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (status, "", lines)


@pytest.mark.row("E15", "E13")
def test_the_device_model_plugs_the_clock_in() -> None:
    """The guest reads its clock, which moves to another VM without a step, and is reset with the other device."""
    done = run_python(DEVICE_MODEL)
    assert (done.returncode, done.stderr) == (0, "")
    read, moved, last = done.stdout.splitlines()
    ns = re.fullmatch(r"the guest reads (\d+) ns at rate 1/2", read)
    there, here = re.findall(r"at (\d+) ns, here it is (\d+) ns", moved)[0]
    assert ns is not None
    assert int(ns[1]) <= int(there) == int(here)
    assert last == "after the reset: None and 440 Hz"


@pytest.mark.row("E13")
@pytest.mark.parametrize("device", ["/nonexistent/kvm", os.devnull, str(ROOT)])
def test_a_vmm_without_kvm_says_so_in_one_line(device: str) -> None:
    """The line says what cannot be opened; the exit status is 2, and there is no traceback."""
    done = run_python(VMM, device)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"open {device}: \w+ .*\n", done.stderr)


@pytest.mark.row("E13")
def test_a_vmm_with_too_many_arguments() -> None:
    """They are no device's path, and there is no traceback."""
    done = run_python(VMM, "/dev/kvm", "again")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"open /dev/kvm again: ENOENT .*; KVM's device is /dev/kvm\n", done.stderr)


@EVERY_EXAMPLE
@pytest.mark.row("style")
def test_examples_take_public_names_from_public_places(example: Path) -> None:
    """What they import of ours is in the __all__ of a public package, and no name begins with an underscore."""
    nodes = list(ast.walk(ast.parse(example.read_bytes())))
    imports = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
    froms = {node.module: node for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    ours = {module: node for module, node in froms.items() if module.startswith("pvclock")}
    assert "pvclock" in {*imports, *ours}
    assert not [name for name in imports if name.startswith("pvclock.")]
    assert ours.keys() <= PUBLIC
    taken = {(module, each.name) for module, node in ours.items() for each in node.names}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    taken |= {("pvclock", node.attr) for node in attributes if ast.unparse(node.value) == "pvclock"}
    assert {(module, name) for module, name in taken if name not in ast_all(module)} == set()
    private = {ast.unparse(node) for node in attributes if node.attr.startswith("_")}
    assert private <= {"os._exit"}  # the system's, not ours


def ast_all(module: str) -> list[str]:
    """Return the public names of a package of ours."""
    return list(import_module(module).__all__)


@EVERY_EXAMPLE
@pytest.mark.row("style")
def test_examples_are_short(example: Path) -> None:
    """A whole run loop fits on a page or two, docstring included."""
    assert len(example.read_bytes().splitlines()) <= LINES_MAX[example]


@pytest.mark.row("style")
def test_the_guide_quotes_the_examples() -> None:
    """Each block that is an example's stands in it, line for line; and no line of the VMM's main() is left out."""
    sources = [unindented(example.read_text(encoding="utf-8")) for example in EXAMPLES]
    blocks = list(map(unindented, QUOTED.findall(GUIDE.read_text(encoding="utf-8"))))
    assert blocks
    assert not [block for block in blocks if not any(block in source for source in sources)]
    (main,) = [node for node in ast.parse(VMM.read_bytes()).body if isinstance(node, ast.FunctionDef)]
    wanted = unindented(VMM.read_text(encoding="utf-8")).splitlines()[main.lineno - 1 : main.end_lineno]
    quoted = {line for block in blocks for line in block.splitlines()}
    assert not [line for line in wanted if line and line not in quoted]


def unindented(source: str) -> str:
    """Return source code without its indentation, which a quotation of a part may leave out."""
    return re.sub(r"^ +", "", source, flags=re.MULTILINE)
