"""The shape of the tree: how long functions, classes and files may be, what they may be called and contain."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from tests.vacuous import TESTS, comes_to_an_assert, every_test, is_true_by_form

pytestmark = pytest.mark.row("style")

ROOT = Path(__file__).parents[1]
FOLDERS = ("pvclock", "qemu_glue", "tests", "bench", "scripts", "examples")
LINES_MAX = 700
CLASS_CODE_LINES_MAX = 250
FUNCTION_LINES_WANTED, FUNCTION_LINES_MAX = 40, 70
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

# The classes of ours that others of ours inherit from, beside exceptions and protocols, and why.
BASES = {
    "Counter": "one level of cdef classes around one C structure",
    "Fd": "one level of cdef classes, one for each kind of file descriptor of KVM's",
}
CYTHON_CLASS = re.compile(r"^[ \t]*(?:cdef )?class (\w+)(?:\((.*)\))?:", re.MULTILINE)

# Words that stood for the field's own, as whole words or parts of a name; the right ones are in ARCHITECTURE.md.
PRIVATE_WORDS = re.compile(
    r"(?<![a-z])(tempo|pace|boost|churn|storm|heed|mend|forgiven|unslaved|slaved|lest|whoever)(?![a-z])"
    r"|(?<![a-z])(?:vcpus|while|check|all|is)_held(?![a-z])",
    re.IGNORECASE,
)
MAY_USE_PRIVATE_WORDS = {
    "pvclock/compat/palacios.py": "Palacios' own words for where its guests' time comes from",
    "CHANGELOG.md": "says what is called what now",
    "ARCHITECTURE.md": "says which words give way to which",
    "docs/rows.tsv": "quotes what is owed",
}
SIGNED_DIFFERENCE = re.compile(r"U64_MASK // 2|>> 63 << 64|CIRCLE // 2|1 << 63\b.*1 << 64")
MAY_COMPARE_HALVES = {
    "pvclock/quantities.py": "signed64() itself",
    "pvclock/timekeeping/timeline.py": "how far a counter can be waited for",
    "pvclock/timekeeping/discipline.py": "a TSC that went back begins anew",
    "pvclock/host/execution_time.py": "how far a counter can be waited for",
    "pvclock/tsc/agreement.py": "a spread round the circle, which is not a difference of two",
    "pvclock/kvm/backend.py": "may an offset grow by that, which is never negative?",
}

# A sentence's words by their place: the test fails when the sentence is improved, and not when the fact in it is wrong.
PICKED_WORD = re.compile(r"\b(why|message|str\(\w+\)|stderr|stdout)\b[^\n]*\.split\(\)\[")

CYTHON_DOCSTRING = re.compile(r'^\s*""".*?"""\n', re.MULTILINE | re.DOTALL)
CYTHON_CLASS_BODY = re.compile(r"^(?:cdef )?class (\w+)[^\n]*\n((?:[ \t]+[^\n]*\n|\n)*)", re.MULTILINE)

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


def test_classes_are_short() -> None:
    """No class has more than 250 lines of code; docstrings, comments and blank lines are not counted."""
    long = {}
    for file in sources(".py"):
        code = code_lines(file)
        for node in classes(file):
            lines = len(code & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            if lines > CLASS_CODE_LINES_MAX:
                long[f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert not long


def test_cython_classes_are_short() -> None:
    """The same of a Cython class, from its header to the next line that is not indented."""
    long = {}
    for file in sources(".pyx"):
        source = file.read_text(encoding="utf-8")
        for name, body in CYTHON_CLASS_BODY.findall(CYTHON_DOCSTRING.sub("", source)):
            lines = [line for line in body.splitlines() if line.strip() and not line.strip().startswith("#")]
            if len(lines) > CLASS_CODE_LINES_MAX:
                long[f"{file.relative_to(ROOT)} {name}"] = len(lines)
    assert not long


def classes(file: Path) -> Iterator[ast.ClassDef]:
    """Give each class of a Python source, nested ones too."""
    return (node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.ClassDef))


def code_lines(file: Path) -> set[int]:
    """Return the numbers of a Python source's lines that hold code."""
    source = file.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for it in tokens if it.type not in NO_CODE for line in range(it.start[0], it.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):  # docstrings, those of attributes too
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def test_our_classes_are_composed() -> None:
    """A class of the product inherits from none of ours, but exceptions, protocols and those that BASES lists."""
    product = [file for file in sources(".py", ".pyx") if file.relative_to(ROOT).parts[0] != "tests"]
    found = [(file, name, set(inherited)) for file in product for name, inherited in bases(file)]
    errors = {"Exception"}
    for _ in found:  # each round finds those one level below the ones that are known
        errors |= {name for _, name, inherited in found if inherited & errors}
    protocols = {name for _, name, inherited in found if "Protocol" in inherited}
    ours = {name for _, name, _ in found} - errors - protocols
    assert not {f"{file.relative_to(ROOT)}: {name}" for file, name, each in found if each & ours - set(BASES)}
    assert set(BASES) == set().union(*(each & ours for _, _, each in found))


def bases(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Give each class of a Python or Cython source with the names of its bases, without modules and parameters."""
    if file.suffix == ".py":
        found = [(node.name, list(map(ast.unparse, node.bases))) for node in classes(file)]
    else:
        matches = CYTHON_CLASS.findall(file.read_text(encoding="utf-8"))
        found = [(name, inherited.split(",") if inherited else []) for name, inherited in matches]
    for name, inherited in found:
        yield name, [base.partition("[")[0].rpartition(".")[2].strip() for base in inherited]


def test_files_are_short() -> None:
    """A file answers one question, in no more than 700 lines."""
    lengths = {str(file.relative_to(ROOT)): len(file.read_bytes().splitlines()) for file in sources(".py", ".pyx")}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES_MAX}


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


def test_words_are_the_fields() -> None:
    """No private word is left in the product, its benchmarks and its documents."""
    found = [
        f"{name}:{number}: {line.strip()}"
        for file in sources(".py", ".pyx", ".pyi", ".pxd", ".h", ".s", ".md", ".toml")
        if (name := str(file.relative_to(ROOT))) not in MAY_USE_PRIVATE_WORDS and name != "docs/conformance.md"
        if not name.startswith("tests/")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if PRIVATE_WORDS.search(line)
    ]
    assert not found


def test_a_signed_difference_is_signed64() -> None:
    """Python code that asks which of two 64-bit counters is ahead asks signed64()."""
    found = [
        f"{name}:{number}: {line.strip()}"
        for file in sources(".py")
        if (name := str(file.relative_to(ROOT))).startswith(("pvclock/", "qemu_glue/", "bench/"))
        and name not in MAY_COMPARE_HALVES
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if SIGNED_DIFFERENCE.search(line)
    ]
    assert not found


def test_every_test_comes_to_an_assert() -> None:
    """In no test do all asserts stand in branches or in loops that may have no turn."""
    found = list(every_test())
    assert len(found) > 1000
    vacuous = [where for where, node in found if not comes_to_an_assert(node.body, {it.arg for it in node.args.args})]
    assert vacuous == []


def test_nothing_is_compared_with_itself() -> None:
    """No assert is true by its form: of a constant, or of the same expression on both sides."""
    found = [
        f"{where}: {ast.unparse(each)}"
        for where, node in every_test()
        for each in ast.walk(node)
        if isinstance(each, ast.Assert) and is_true_by_form(each.test)
    ]
    assert found == []


def test_no_word_is_picked_out_of_a_sentence() -> None:
    """What a message has to say is looked for by what it is, not by where it stands."""
    found = [
        f"{file.relative_to(TESTS)}:{number}: {line.strip()}"
        for file in sorted(TESTS.rglob("*.py"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if PICKED_WORD.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("body", "sure"),
    [
        ("assert x", True),
        ("with pytest.raises(ValueError):\n    f()", True),
        ("for each in (1, 2):\n    assert each", True),
        ("for each in given:\n    assert each", True),
        ("for each in f():\n    assert each", False),
        ("for each in [it for it in given if it]:\n    assert each", False),
        ("for each in ():\n    assert each", False),
        ("while True:\n    assert x", True),
        ("while x:\n    assert x", False),
        ("if x:\n    assert x", False),
        ("if x:\n    assert x\nelse:\n    assert y", True),
        ("try:\n    f()\nexcept ValueError:\n    assert x", False),
        ("f()", False),
        ("if x:\n    return\nassert x", False),
        ("if x:\n    assert y\n    return\nassert x", True),
    ],
)
def test_what_is_vacuous(body: str, *, sure: bool) -> None:
    """The checks above tell tests that can fail from those that may not."""
    assert comes_to_an_assert(ast.parse(body).body, {"given"}) is sure
