"""What is shipped works elsewhere: the source archive builds, the wheel imports, the headers compile."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import pytest

import pvclock
from tests.waiting import HANG_S

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
def scratch() -> Iterator[Path]:
    """A folder that everybody may look into; pytest's own are closed to other users."""
    with TemporaryDirectory(prefix="pvclock-packaging-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def tree(scratch: Path) -> Path:
    """A copy of this tree as it is kept, so that no build meets the products or the metadata of this one."""
    copy = scratch / "tree"
    made = (".git", ".venv", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__", "*.so", "build", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*made))
    for generated in copy.glob("pvclock/**/_*.c"):
        generated.unlink()
    return copy


@pytest.fixture(scope="module")
def unpacked(scratch: Path, tree: Path) -> Path:
    """The folder that a source archive made of the tree unpacks to."""
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(scratch)!r})"
    run(sys.executable, "-c", build, cwd=tree)
    (archive,) = scratch.glob("pvclock-*.tar.gz")
    (scratch / "unpacked").mkdir()
    run("tar", "xzf", archive, cwd=scratch / "unpacked")  # tarfile's filters are not in Python 3.11.2
    (folder,) = (scratch / "unpacked").iterdir()
    return folder


HASTY_COMPILER = """#!/bin/sh
case " $* " in
*" -c "*) exec cc "$@" -O0 ;;
*) exec cc "$@" ;;
esac
"""
"""Optimizing the extension modules takes three times as long, and what is looked at here is the same."""


@pytest.fixture(scope="module")
def wheel(scratch: Path, unpacked: Path) -> Path:
    """A wheel made from the source archive."""
    compiler = scratch / "hasty-cc"
    compiler.write_text(HASTY_COMPILER)
    compiler.chmod(0o755)
    pip = ("env", f"CC={compiler}", sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", scratch, unpacked, cwd=scratch)
    (made,) = scratch.glob("pvclock-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(scratch: Path, wheel: Path) -> Path:
    """Return the Python of an environment that has the wheel, and what it depends on from here."""
    run(sys.executable, "-m", "venv", "--without-pip", scratch / "venv", cwd=scratch)
    python = scratch / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", wheel, cwd=scratch)
    return python


@pytest.fixture(scope="module")
def bin_folder(installed: Path) -> Path:
    """The programs of that environment, once it has what pvclock depends on: taken from here."""
    packages = run(installed, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=ROOT)
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # after the wheel's own folder
    return installed.parent


def as_a_stranger(*command: str | Path, bin_folder: Path, cwd: Path, redirect: str = "") -> tuple[int, str, str]:
    """Run a command as nobody, without HOME, a compiler or QEMU; returns its exit status and what it printed.

    Where this user may do anything, nobody keeps the right to read: this Python may lie in a home folder.
    """
    setpriv = (shutil.which("setpriv") or "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    to_read = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    nobody = (*setpriv, *to_read) if os.geteuid() == 0 else ()
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirect}', "sh", *nobody, *command],
        cwd=cwd,
        env={"PATH": str(bin_folder), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    return done.returncode, done.stdout, done.stderr


def test_source_archive_is_the_tree(tree: Path, unpacked: Path) -> None:
    """Nothing that is kept in the tree is missing from the source archive, and nothing but metadata is added."""

    def files(folder: Path) -> set[str]:
        return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}

    added = {name for name in files(unpacked) - files(tree) if ".egg-info/" not in name}
    assert added == {"PKG-INFO", "setup.cfg"}
    assert files(tree) - files(unpacked) == set()


def test_tests_of_the_source_archive_run(unpacked: Path, wheel: Path) -> None:
    """All of its tests are found, and those of the arithmetic pass there."""
    with ZipFile(wheel) as archive:
        archive.extractall(unpacked, [name for name in archive.namelist() if name.endswith(".so")])
    pytest_here = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    run(*pytest_here, "--collect-only", cwd=unpacked)
    assert "passed" in run(*pytest_here, "tests/unit/test_scale.py", cwd=unpacked)


def test_extension_modules_carry_no_symbols(wheel: Path, tmp_path: Path) -> None:
    """Neither symbol tables nor what debuggers read: five times the code."""
    with ZipFile(wheel) as archive:
        modules = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path, modules)
    assert len(modules) > 5
    for module in modules:
        sections = run("readelf", "--wide", "--sections", module, cwd=tmp_path)
        assert ".text" in sections
        assert ".symtab" not in sections
        assert ".debug" not in sections


def test_metadata_for_the_package_index(wheel: Path) -> None:
    """Either licence, where the project lives, and a description whose links lead somewhere from anywhere."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert metadata["License-Expression"] == "Apache-2.0 OR MIT"
    assert set(metadata.get_all("License-File", [])) == {"LICENSE-APACHE", "LICENSE-MIT"}
    assert {url.partition(",")[0] for url in metadata.get_all("Project-URL", [])} >= {"Source", "Issues", "Changelog"}
    assert "Hyper-V" not in metadata["Summary"]
    targets = re.findall(r"\]\(([^)]+)\)", str(metadata.get_payload()))
    assert len(targets) > 5
    assert not [target for target in targets if not target.startswith("https://")]
    assert [target for target in targets if target.endswith("drift.svg") and "/raw/" in target]


@pytest.mark.parametrize("machine", ["aarch64", "riscv64", "i686"])
def test_other_architectures_are_refused_in_a_sentence(machine: str) -> None:
    """The build ends with what pvclock is for and what was found, not with a compiler's errors."""
    pretend = f"import platform, runpy; platform.machine = lambda: {machine!r}; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", pretend], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"pvclock is for 64-bit x86 Linux; this Python is for Linux on {machine}\n"


def test_wheel_from_the_source_archive_works(installed: Path, tmp_path: Path) -> None:
    """Without any dependency, the installed package computes the pair that Linux publishes."""
    program = "from pvclock import ClockScale; s = ClockScale.from_khz(2_596_132); print(s.mul, s.shift)"
    assert run(installed, "-c", program, cwd=tmp_path) == f"{0xC5376ADD} -1"


def test_the_wheel_has_the_version_of_the_source(installed: Path, tmp_path: Path) -> None:
    """Its metadata say what pvclock.__version__ does: the one place where the version stands."""
    program = "import pvclock; from importlib.metadata import version; print(pvclock.__version__, version('pvclock'))"
    said, installed_version = run(installed, "-c", program, cwd=tmp_path).split()
    assert said == installed_version == pvclock.__version__


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


def test_wheel_carries_the_probe(installed: Path, scratch: Path) -> None:
    """Both of its forms: the program for Linux runs as nobody without a library, the image is an ELF64 file."""
    write = "import sys, pvclock.probe; open(sys.argv[1], 'wb').write(pvclock.probe.linux_executable())"
    run(installed, "-c", write, scratch / "probe", cwd=scratch)
    (scratch / "probe").chmod(0o755)
    status, stdout, _ = as_a_stranger(scratch / "probe", "--help", bin_folder=installed.parent, cwd=scratch)
    assert status == 0
    assert "--seconds" in stdout
    show = "import sys, pvclock.probe; print(pvclock.probe.bootable_image()[:5])"
    assert run(installed, "-c", show, cwd=scratch) == repr(b"\x7fELF\x02")


def probe_form(compiler: Path | str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Have setup.py compile the probe's form for Linux, and do nothing else."""
    program = f"""
import runpy, setuptools, pathlib
setuptools.setup = lambda **_: None
runpy.run_path("setup.py")["build_form"]("linux", pathlib.Path({str(folder)!r}) / "linux")
"""
    given = os.environ | {"CC": str(compiler)}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=given, capture_output=True, text=True, check=False
    )


def test_no_static_c_library(tmp_path: Path) -> None:
    """The build says which package has it, where a compiler finds none."""
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho libc.a\n")
    compiler.chmod(0o755)
    done = probe_form(compiler, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "no static C library, libc.a: install libc6-dev (Debian), glibc-static (Fedora)"
    )


def test_the_probe_is_compiled_when_a_source_is_newer(tmp_path: Path) -> None:
    """Not again where none is; the sources of each of its forms and the headers count."""
    program = tmp_path / "linux"
    for source in (ROOT / "pvclock" / "probe" / "report.c", ROOT / "pvclock" / "include" / "pvclock_abi.h"):
        program.write_bytes(b"older")
        newest = source.stat().st_mtime
        os.utime(program, (newest - 1, newest - 1))
        assert probe_form("cc", tmp_path).returncode == 0
        built = program.stat().st_mtime
        assert program.read_bytes()[:4] == b"\x7fELF"
        assert probe_form("cc", tmp_path).returncode == 0
        assert program.stat().st_mtime == built


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


@pytest.mark.row("E13")
def test_the_guides_cython_module_is_built_and_runs(installed: Path, tmp_path: Path) -> None:
    """docs/c.md's setup.py finds declarations and headers in an installed pvclock, and its clock keeps to its line."""
    guide = (ROOT / "docs" / "c.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^```(?:python|cython|toml) (\S+)\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL))
    assert sorted(files) == ["pyproject.toml", "setup.py", "vmm_clock.pyx"]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    package = run(installed, "-c", "import pvclock; print(pvclock.__path__[0])", cwd=tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(package).parent)}  # before what this Python has of ours
    build = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    done = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    program = """
import pvclock, vmm_clock
memory = bytearray(4096)
clock = vmm_clock.Clock(memory, 2_596_132_000)
before = clock.read()
for turn in range(1000):
    clock.change_rate(1 + turn % 3, 1 + turn % 2)
    after = clock.read()
    assert after[0] > before[0] and after[1] >= before[1] and abs(after[1] - after[2]) <= 3
    before = after
print(memory[0], pvclock.__path__[0])
"""
    assert run(installed, "-c", program, cwd=tmp_path) == f"{2002 % 256} {package}"


@pytest.mark.row("X-02")
@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (("--version",), 0, pvclock.__version__),
        (("--help",), 0, "doctor"),
        (("scale", "2.4GHz"), 0, "0xd5555555"),
        (("doctor",), 1, "/dev/kvm"),
        (("demo", "--seconds", "0.5"), 0, "Everything as it should be"),
        (("state", "show", "tests/states/v3-typical.json"), 0, "timeline.guest_ns"),
        (("state", "check", "tests/states/v1-least.json"), 0, "valid"),
        (("lab", "true"), 2, ""),
        (("crosscheck",), 2, ""),
    ],
)
def test_what_a_stranger_types_first(
    bin_folder: Path, unpacked: Path, arguments: tuple[str, ...], status: int, shown: str
) -> None:
    """README's commands from a wheel, as nobody, without HOME, compiler and QEMU: an answer, or why not in one line."""
    found, stdout, stderr = as_a_stranger(bin_folder / "pvclock", *arguments, bin_folder=bin_folder, cwd=unpacked)
    assert found in ({0, 1} if arguments[0] == "doctor" else {status}), stderr  # 0: everybody may use /dev/kvm
    assert "Traceback" not in stderr
    assert shown in stdout
    assert status != 2 or len(stderr.splitlines()) == 1


@pytest.mark.row("X-02")
@pytest.mark.parametrize(("redirect", "why"), [(">&-", "standard output is closed"), (">/dev/full", "No space left")])
@pytest.mark.parametrize("arguments", [("scale", "2.4GHz"), ("doctor", "--json"), ("demo", "--seconds", "0.5")])
def test_an_output_that_takes_nothing(
    bin_folder: Path, unpacked: Path, arguments: tuple[str, ...], redirect: str, why: str
) -> None:
    """A closed or a full standard output is one line and exit status 2."""
    program = bin_folder / "pvclock"
    status, _, stderr = as_a_stranger(program, *arguments, bin_folder=bin_folder, cwd=unpacked, redirect=redirect)
    assert status == 2
    (line,) = stderr.splitlines()
    assert why in line


@pytest.mark.row("E13")
def test_the_examples_from_a_wheel(bin_folder: Path, unpacked: Path) -> None:
    """The emulator's VMM runs as nobody; the one on /dev/kvm runs, or says in one line what it lacks."""
    python = bin_folder / "python"
    status, stdout, stderr = as_a_stranger(python, "examples/emulator.py", bin_folder=bin_folder, cwd=unpacked)
    assert (status, stderr) == (0, "")
    assert "from the timeline" in stdout
    status, stdout, stderr = as_a_stranger(python, "examples/vmm.py", bin_folder=bin_folder, cwd=unpacked)
    assert (status, bool(stdout), len(stderr.splitlines())) in {(0, True, 0), (2, False, 1)}
