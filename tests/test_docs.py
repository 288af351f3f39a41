"""What the documents say is so: their paths exist, and their examples run."""

import doctest
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.row("style")

ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
ARCHITECTURE_LINES_MAX = 200

# A path is a word that ends in a slash or a known suffix. Not ours: absolute ones, <linux/kvm.h>, and addresses.
PATH = re.compile(r"(?<![\w/.<*:-])([\w*-][\w./*-]*(?:/(?=[\s`),;:]|$)|\.(?:py|pyx|pxd|pyi|h|s|c|sh|md|tsv|toml)\b))")
PYTHON_BLOCK = re.compile(r"^```(?:python|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
README_LINES_MAX = 100
"""Two screens."""

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def exists(path: str) -> bool:
    """Whether a path or glob is in the tree: from the root, in the package, or a bare name anywhere in either."""
    places = (ROOT, ROOT / "pvclock") if "/" in path else (ROOT, ROOT / "pvclock", *ROOT.glob("[a-z]*/**/"))
    return any(next(place.glob(path.rstrip("/")), None) for place in places)


def test_architecture_names_what_exists() -> None:
    """Every path in the map is there, and the map is short enough to be read."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    assert not sorted({path for path in PATH.findall(text) if not exists(path)})
    assert len(text.splitlines()) <= ARCHITECTURE_LINES_MAX


@pytest.mark.parametrize(
    "document", sorted({*DOCUMENTS, *ROOT.glob("*.md")}), ids=lambda file: str(file.relative_to(ROOT))
)
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link of a document is to a file or folder of the tree."""
    text = document.read_text(encoding="utf-8")
    assert [link for link in LINK.findall(text) if not (document.parent / link).exists()] == []


def test_readme_is_short_and_the_index_whole() -> None:
    """README fits two screens; docs/index.md names every document."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES_MAX
    linked = {link.rpartition("/")[2] for link in LINK.findall((ROOT / "docs/index.md").read_text(encoding="utf-8"))}
    assert {file.name for file in ROOT.glob("docs/*.md")} - linked == {"index.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_placeholder_is_left(document: Path) -> None:
    """A figure that was still to be measured stood as @@."""
    assert "@@" not in document.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_examples_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python block runs after those above it, and prints what its `>>>` lines say."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    text = document.read_text(encoding="utf-8")
    for block in PYTHON_BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        if ">>> " in block[1]:
            run_doctest(block[1], names, document, line)
        else:
            exec(compile("\n" * line + block[1], document, "exec"), names)  # noqa: S102 - our own document


def run_doctest(source: str, names: dict[str, object], document: Path, line: int) -> None:
    """Run one block of `>>>` examples in the given names, and keep what it defines."""
    test = doctest.DocTestParser().get_doctest(source, names, document.name, str(document), line)
    runner = doctest.DebugRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    try:
        runner.run(test, clear_globs=False)
    except doctest.DocTestFailure as failure:
        at = line + (failure.example.lineno or 0) + 1
        pytest.fail(f"{document.name}:{at}: expected {failure.example.want!r}, got {failure.got!r}")
    except doctest.UnexpectedException as failure:
        raise failure.exc_info[1] from None
    names.update(test.globs)
