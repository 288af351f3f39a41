"""Many mutants of compiled files in one build, one of them chosen when a program starts.

The chosen mutant's number is in the environment (CHOICE); each module and native test program takes it from there as
it is loaded.  In a .h file the function around a mutant's text is compiled once more for each mutant, and calls the
chosen one; a text outside of functions is an expression.  In a .pyx file a text of whole statements, from the first
letter to the end of a line, becomes an `if`; any other text is an expression.  A .s file is the image of a guest, which
has no environment: each mutant's is assembled by itself.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

from tests.mutants.mutant import BadMutant, Mutant

CHOICE = "PVCLOCK_MUTANT"
CHOOSER = f"""\
#ifndef {CHOICE}
#define {CHOICE}
#include <stdlib.h>
static int pvclock_mutant __attribute__((unused));
__attribute__((constructor, unused)) static void pvclock_mutant_choose(void)
{{
	const char *number = getenv("{CHOICE}");
	pvclock_mutant = number ? atoi(number) : 0;
}}
#endif
"""

# A mistake may be one that the compiler warns of.
NO_WARNINGS = "#pragma GCC system_header\n"

C_FUNCTION = re.compile(
    r"^static inline (?P<returns>[^()]*?)(?P<name>\w+)\((?P<parameters>[^)]*)\)\n\{\n.*?^\}\n", re.MULTILINE | re.DOTALL
)
CYTHON_DOCSTRING = re.compile(r'\A(?:#.*\n|\n)*""".*?"""\n', re.DOTALL)
IMAGES_MODULE = '''\
"""The guest payloads as the chosen mutant has them."""

import os
from pathlib import Path


def clockprobe() -> bytes:
    """The clockprobe guest."""
    number = os.environ.get("PVCLOCK_MUTANT", "0")
    image = Path(__file__).parent / "mutants" / f"{number}.image"
    return (image if image.exists() else image.with_stem("0")).read_bytes()
'''


def groups(mutants: list[Mutant], root: Path) -> list[list[Mutant]]:
    """Divide compiled mutants so that no two of a build have texts in common, outside of C functions and images.

    Raises:
        BadMutant: one does not apply.
    """
    builds: list[list[Mutant]] = []
    spans = {mutant.name: span(mutant, root) for mutant in mutants}
    for mutant in mutants:
        for build in builds:
            if not any(overlap(mutant, other, spans) for other in build):
                build.append(mutant)
                break
        else:
            builds.append([mutant])
    return builds


def span(mutant: Mutant, root: Path) -> range:
    """Return where a mutant's text is in its file; errors as groups()."""
    begin = mutant.begin(mutant.source(root))
    return range(begin, begin + len(mutant.text))


def overlap(one: Mutant, other: Mutant, spans: dict[str, range]) -> bool:
    """Whether two mutants stand in each other's way: a C function or an image is made anew for each."""
    here, there = spans[one.name], spans[other.name]
    common = here.start < there.stop and there.start < here.stop
    return common and one.file == other.file and not one.file.endswith((".h", ".s"))


def write(root: Path, chosen: dict[int, Mutant]) -> None:
    """Rewrite a tree's sources so that each number chooses its mutant; the tree is then to be built.

    Raises:
        BadMutant: one does not apply, is not assembled, or cannot be chosen at run time.
    """
    files: dict[str, dict[int, Mutant]] = defaultdict(dict)
    for number, mutant in chosen.items():
        files[mutant.file][number] = mutant
    for name, mutants in files.items():
        file = root / name
        source = file.read_text(encoding="utf-8")
        if file.suffix == ".s":
            assemble(file, source, mutants)
        else:
            file.write_text((header if file.suffix == ".h" else cython)(source, mutants), encoding="utf-8")


def header(source: str, mutants: dict[int, Mutant]) -> str:
    """Return a C header with these mutants, each chosen by its number."""
    inside: dict[int, dict[int, Mutant]] = defaultdict(dict)
    functions = {match.start(): match for match in C_FUNCTION.finditer(source)}
    edits: list[tuple[int, int, str]] = []
    for number, mutant in mutants.items():
        begin = mutant.begin(source)
        end = begin + len(mutant.text)
        around = [at for at, match in functions.items() if at <= begin and end <= match.end()]
        if around:
            inside[around[0]][number] = mutant
        else:
            edits.append((begin, end, f"(pvclock_mutant == {number} ? ({mutant.replacement}) : ({mutant.text}))"))
    for at, those in inside.items():
        edits.append((at, functions[at].end(), variants(functions[at], those)))
    return NO_WARNINGS + CHOOSER + edited(source, edits)


def edited(source: str, edits: list[tuple[int, int, str]]) -> str:
    """Return a source with other text between each begin and end."""
    for begin, end, text in sorted(edits, reverse=True):
        source = source[:begin] + text + source[end:]
    return source


def variants(function: re.Match[str], mutants: dict[int, Mutant]) -> str:
    """Return a C function, each of its mutants before it, and at its beginning the choice."""
    name, whole = function["name"], function[0]
    arguments = (
        ", ".join(re.findall(r"(\w+)\s*(?:,|$)", function["parameters"])) if function["parameters"] != "void" else ""
    )
    returns = "" if function["returns"].strip() == "void" else "return "
    copies, choices = [], []
    for number, mutant in mutants.items():
        copies.append(mutant.applied(whole).replace(f"{name}(", f"{name}_mutant_{number}(", 1))
        call = f"{returns}{name}_mutant_{number}({arguments});"
        choices.append(f"\tif (pvclock_mutant == {number}) {{ {call}{'' if returns else ' return;'} }}\n")
    head, brace, body = whole.partition("\n{\n")
    return "\n".join([*copies, head + brace + "".join(choices) + body])


def cython(source: str, mutants: dict[int, Mutant]) -> str:
    """Return a Cython source with these mutants, each chosen by its number."""
    edits = []
    for number, mutant in mutants.items():
        begin = mutant.begin(source)
        edits.append((begin, begin + len(mutant.text), choice(mutant, source, number)))
    source = edited(source, edits)
    declared = CYTHON_DOCSTRING.match(source)
    if declared is None:
        raise BadMutant(f"{next(iter(mutants.values())).file} does not begin with a docstring")
    lines = CHOOSER.replace("\n", "\n    ").rstrip(" ")
    extern = f'\ncdef extern from *:\n    """\n    {lines}    """\n    const int pvclock_mutant\n\n'
    return source[: declared.end()] + extern + source[declared.end() :]


def choice(mutant: Mutant, source: str, number: int) -> str:
    """Return what stands in a Cython source in place of a mutant's text."""
    begin = mutant.begin(source)
    line_begin = source.rfind("\n", 0, begin) + 1
    rest = source[begin + len(mutant.text) :]
    indent = source[line_begin:begin]
    if indent.strip() or not rest.startswith("\n"):
        return f"({mutant.replacement} if pvclock_mutant == {number} else {mutant.text})"
    replaced, kept = (text.replace("\n", "\n    ") for text in (mutant.replacement or "pass", mutant.text))
    return f"if pvclock_mutant == {number}:\n{indent}    {replaced}\n{indent}else:\n{indent}    {kept}"


def assemble(file: Path, source: str, mutants: dict[int, Mutant]) -> None:
    """Assemble a guest's image as it is (0) and for each mutant, and let the package of images give the chosen one.

    Its compiled module stays, for the build makes that anew; the package takes another instead.

    Raises:
        BadMutant: one does not apply, or is not assembled.
    """
    folder = file.parent / "mutants"
    folder.mkdir(exist_ok=True)
    images = {0: source} | {number: mutant.applied(source) for number, mutant in mutants.items()}
    for number, text in images.items():
        written, binary = folder / f"{number}.s", folder / f"{number}.o"
        written.write_text(f".section .rodata\n{text}", encoding="utf-8")
        assembled = subprocess.run(
            ["as", "-I", file.parent, "-o", binary, written], capture_output=True, text=True, check=False
        )
        if assembled.returncode:
            raise BadMutant(f"{file.name} is not assembled: {assembled.stderr}")
        options = ("--only-section=.rodata", "--output-target=binary")
        subprocess.run(["objcopy", *options, binary, folder / f"{number}.image"], check=True)
    (file.parent / "_mutants.py").write_text(IMAGES_MODULE, encoding="utf-8")
    package = file.parent / "__init__.py"
    source = package.read_text(encoding="utf-8")
    package.write_text(source.replace("pvclock.payloads._images", "pvclock.payloads._mutants"), encoding="utf-8")
