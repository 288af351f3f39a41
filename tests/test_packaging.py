"""What is shipped works elsewhere: the source archive builds, the wheel imports, the headers compile."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.row("style")

ROOT = Path(__file__).parents[1]
HEADERS = sorted(header.name for header in ROOT.glob("pvclock/include/*.h"))
WARNINGS = ("-Wall", "-Wextra", "-Werror")
STANDARDS = {"c11": "c", "c++17": "c++"}


def run(*command: str | Path, cwd: Path, given: str = "") -> str:
    """Run a program and return what it printed; a failure shows all of it."""
    done = subprocess.run(
        command, cwd=cwd, input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment that has pvclock from a wheel, made from a source archive, made from here."""
    scratch = tmp_path_factory.mktemp("packaging")
    tree = scratch / "tree"  # a copy, so that no build meets the products or the metadata of this one
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "*.so", "*.c", "build", "*.egg-info"))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(scratch)!r})"
    run(sys.executable, "-c", build, cwd=tree)
    (archive,) = scratch.glob("pvclock-*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", scratch, archive, cwd=scratch)
    (wheel,) = scratch.glob("pvclock-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", scratch / "venv", cwd=scratch)
    python = scratch / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=scratch)
    return python


def test_wheel_from_the_source_archive_works(installed: Path, tmp_path: Path) -> None:
    """Without any dependency, the installed package computes the pair that Linux publishes."""
    program = "from pvclock import ClockScale; s = ClockScale.from_khz(2_596_132); print(s.mul, s.shift)"
    assert run(installed, "-c", program, cwd=tmp_path) == f"{0xC5376ADD} -1"


def test_wheel_carries_what_others_compile_against(installed: Path, tmp_path: Path) -> None:
    """Stubs, Cython declarations and the type marker are in it, generated C is not."""
    package = Path(run(installed, "-c", "import pvclock; print(pvclock.__path__[0])", cwd=tmp_path))
    carried = {file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file()}
    sources = {
        file.relative_to(ROOT / "pvclock").as_posix()
        for kind in ("py.typed", "*.pyi", "*.pxd", "*.h", "*.s")
        for file in (ROOT / "pvclock").rglob(kind)
    }
    assert sources <= carried
    assert not [name for name in carried if name.endswith(".c")]


@pytest.mark.parametrize("standard", STANDARDS)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_headers_compile_for_other_vmms(installed: Path, tmp_path: Path, compiler: str, standard: str) -> None:
    """Each header of get_include() stands alone as C11 and as C++17, without a warning."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}: apt-get install {compiler}")
    include = run(installed, "-c", "import pvclock; print(pvclock.get_include())", cwd=tmp_path)
    assert sorted(header.name for header in Path(include).glob("*.h")) == HEADERS
    for header in HEADERS:
        given = f"#include <{header}>\n"
        flags = (f"-std={standard}", "-x", STANDARDS[standard], *WARNINGS, "-fsyntax-only", f"-I{include}")
        run(compiler, *flags, "-", cwd=tmp_path, given=given)
