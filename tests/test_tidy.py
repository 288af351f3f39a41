"""The shape of the tree: how long functions and files may be, what they may be called and contain."""

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

pytestmark = pytest.mark.row("style")

ROOT = Path(__file__).parents[1]
FOLDERS = ("pvclock", "qemu_glue", "tests", "bench", "scripts")
LINES_MAX = {".py": 400, ".pyx": 700}
FUNCTION_LINES_WANTED, FUNCTION_LINES_MAX = 40, 70
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
UNFINISHED = re.compile(r"\b(T[O]DO|FIX[M]E|X[X]X)\b")
SOURCE_SUFFIXES = {".py", ".pyx", ".pxd", ".pyi", ".h", ".s", ".sh", ".md", ".toml"}
GENERATED = {"__pycache__", ".venv", "build", "dist"}


def sources(*suffixes: str) -> list[Path]:
    """Return the files of these kinds that people write, in the project's folders and at its root."""
    files = chain(ROOT.glob("*"), *((ROOT / folder).rglob("*") for folder in FOLDERS), ROOT.glob("docs/**/*"))
    return sorted(file for file in files if file.suffix in suffixes and not GENERATED & set(file.parts))


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Give each function of a file with its lines, from header to end, the docstring not counted."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
            yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", lines


def test_functions_are_short() -> None:
    """No function is longer than 70 lines, and nine in ten are within 40."""
    lengths = dict(chain.from_iterable(map(functions, sources(".py"))))
    assert not {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES_MAX}
    long = {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES_WANTED}
    assert len(long) * 10 <= len(lengths), long


@pytest.mark.parametrize("suffix", LINES_MAX)
def test_files_are_short(suffix: str) -> None:
    """A file answers one question, within the limit for its kind."""
    lengths = {str(file.relative_to(ROOT)): len(file.read_bytes().splitlines()) for file in sources(suffix)}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES_MAX[suffix]}


def test_file_names_say_what_is_inside() -> None:
    """No file or folder has a name that could hold anything."""
    assert not [str(file.relative_to(ROOT)) for file in sources(*SOURCE_SUFFIXES) if VAGUE_NAMES & words_of(file)]


def words_of(file: Path) -> set[str]:
    """Return the names in a file's path below the root, without its suffix."""
    return set(file.relative_to(ROOT).with_suffix("").parts)


def test_only_commands_print() -> None:
    """Everything but a command returns what it has to say."""
    libraries = [file for file in sources(".py") if file.relative_to(ROOT).parts[0] in {"pvclock", "qemu_glue"}]
    prints = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in libraries
        if "commands" not in words_of(file)
        for node in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints


def test_nothing_is_left_for_later() -> None:
    """What is unfinished stands in an issue, not in a comment."""
    unfinished = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in sources(*SOURCE_SUFFIXES)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if UNFINISHED.search(line)
    ]
    assert not unfinished
