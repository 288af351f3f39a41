"""Imports go down only: the layers of ARCHITECTURE.md, as a table, held against every import and cimport."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pvclock

pytestmark = pytest.mark.row("style")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pvclock"

# From the bottom up. A name stands for the module or the whole subpackage; "pvclock" alone is the public face.
LAYERS: tuple[set[str], ...] = (
    {"errors", "arguments", "quantities", "readings", "msr_ranges", "guest_layout", "threads"}
    | {"_abi", "_math", "_publish", "_hyperv"},
    {"_memory", "_scale", "_core", "_counter", "_records", "_transaction", "_bulk", "_sampling", "_stress"}
    | {"_search", "_process_memory", "_guest_budget", "_tsc_writes"},
    {"timekeeping", "tsc", "host", "kvm", "boot", "payloads", "probe"},
    {"providers"},
    {"clock", "state"},
    {"machine"},
    {"pvclock", "meter", "compat", "lab"},
    {"commands", "testing", "__main__"},
)
POLICY = {"timekeeping", "tsc"}

# What a layer's height alone does not forbid: who may not know whom, and why.
STRANGERS = {
    "kvm": POLICY | {"boot", "payloads"},  # runs vCPUs, calls the handler that it is given
    "boot": POLICY | {"payloads"},  # loads images and sets a vCPU to their entry
    "payloads": POLICY,  # are images
    "probe": POLICY | {"host", "kvm", "boot", "payloads"},  # is an image and an executable, which run without pvclock
    **{policy: {"kvm", "boot", "payloads", "probe"} for policy in POLICY},  # pure: no I/O, no machine
}

# What is in providers/: the providers, what these may know beside themselves, and the rest.
PROVIDERS_OF_GUESTS = {"none", "minimal", "hyperv", "kvm", "side_by_side"}
SHARED_BY_PROVIDERS = {"interface", "calls", "options", "timing", "hypercall_instructions", "guest_log"}
PROVIDER_MACHINERY = {"__init__", "configuration", "guest_interface", "registry", "virtualbox"}
PROVIDER_NAMES = {"None", "Minimal", "HyperV", "KVM", "HyperV+KVM"}

# What serves any provider alike, and where it names one all the same, with the reason.
NEUTRAL = ("providers/guest_interface.py", "clock", "machine", "state")
MAY_NAME = {
    ("clock/guest_clock.py", "'KVM'"): "the default of a VMM that does not choose",
    ("machine/cpuid.py", "pvclock.providers.kvm.kvm_cpuid_leaves"): "the clock of KernelClock is KVM's own",
    ("machine/machine.py", "pvclock.providers.kvm.kernel_clock_features"): "the same",
    ("machine/preflight/offer.py", "pvclock.providers.kvm.features.FEATURE_OF_MSR"): "reads CPUID as a guest does",
    ("machine/preflight/offer.py", "pvclock.providers.kvm.features.KvmFeature"): "the same",
    ("machine/preflight/offer.py", "pvclock.providers.hyperv.features.Privilege"): "the same",
}
PROVIDER_CLASS = re.compile(r"\b[A-Z]\w+Provider\b")

# Below clock/ these alone may read a clock; all else is handed what it needs.
CLOCK_READERS = {"host", "kvm"}

# What qemu_glue may use beside the names in pvclock.__all__.
PUBLIC_SUBPACKAGES = (
    "pvclock.commands",
    "pvclock.errors",
    "pvclock.host",
    "pvclock.kvm",
    "pvclock.machine",
    "pvclock.meter",
    "pvclock.payloads",
    "pvclock.state",
    "pvclock.timekeeping",
)

# What `import pvclock` must not load.
HEAVY = ("qemu", "rich", "importlib.metadata", "dataclasses", "logging")

CYTHON_IMPORT = re.compile(
    r"""^[ \t]* (?: from \s+ ([\w.]+) \s+ c?import \s+ (\([^)]*\) | .*)   # from module cimport (names)
                 | c?import \s+ (.*) )                                     # cimport modules""",
    re.MULTILINE | re.VERBOSE,
)


def modules() -> list[Path]:
    """Return every Python and Cython source of the package."""
    return sorted(file for kind in ("py", "pyx", "pxd") for file in PACKAGE.rglob(f"*.{kind}"))


def dotted(file: Path) -> str:
    """Return a source's module name."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> Iterator[str]:
    """Give each module that a source imports or cimports, `from x import y` as x.y, relative ones resolved."""
    package = dotted(file) if file.stem == "__init__" else dotted(file).rpartition(".")[0]
    pairs = python_imports(file) if file.suffix == ".py" else cython_imports(file)
    for origin, name in pairs:
        dots = len(origin) - len(origin.lstrip("."))
        base = package.split(".")[: len(package.split(".")) - dots + 1] if dots else []
        yield ".".join(filter(None, [*base, origin[dots:], name]))


def python_imports(file: Path) -> Iterator[tuple[str, str]]:
    """Give (module, name) of each import statement, also of those inside functions."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from ((origin, alias.name) for alias in node.names)


def cython_imports(file: Path) -> Iterator[tuple[str, str]]:
    """Give (module, name) of each import and cimport statement."""
    text = re.sub(r"#.*", "", file.read_text(encoding="utf-8"))
    for origin, names, plain in CYTHON_IMPORT.findall(text):
        for name in filter(None, map(str.strip, (names or plain).strip("() \t\n").split(","))):
            first = name.split()[0]  # without "as other"
            yield (origin, first) if origin else (first, "")


def subject(name: str) -> str | None:
    """Return what LAYERS calls a module of pvclock: a direct child, or "pvclock" for a name of the public face."""
    root, _, rest = name.partition(".")
    if root != "pvclock":
        return None
    child = rest.partition(".")[0]
    is_module = any(PACKAGE.glob(f"{child}.py*")) or any(PACKAGE.glob(f"{child}.pxd")) or (PACKAGE / child).is_dir()
    return child if child and is_module else "pvclock"


def height(name: str) -> int:
    """Return a subject's layer, counted from the bottom."""
    for level, names in enumerate(LAYERS):
        if name in names:
            return level
    raise AssertionError(f"pvclock/{name} has no layer: give it one in tests/test_layering.py and ARCHITECTURE.md")


def internal_imports() -> Iterator[tuple[Path, str, str]]:
    """Give (source, its subject, imported module) for each import of one part of pvclock by another."""
    for file in modules():
        own = subject(dotted(file)) or ""
        yield from ((file, own, name) for name in imported(file) if subject(name) not in {None, own})


def test_imports_go_down_only() -> None:
    """No module imports one of a higher layer, or a neighbour that it is not to know."""
    wrong = []
    for file, own, name in internal_imports():
        other = subject(name) or ""
        if height(other) > height(own) or other in STRANGERS.get(own, ()):
            wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_pvclock_knows_no_face_and_no_test() -> None:
    """Nothing in pvclock imports qemu_glue, tests or bench."""
    outside = {"qemu_glue", "tests", "bench"}
    assert not [(dotted(file), name) for file in modules() for name in imported(file) if name.split(".")[0] in outside]


def test_providers_know_no_other_provider() -> None:
    """A provider imports the contract, what several share, and its own modules; only the registry knows them all."""
    folder = PACKAGE / "providers"
    modules_there = {own_provider(file) for file in folder.rglob("*.py")}
    assert modules_there == PROVIDERS_OF_GUESTS | SHARED_BY_PROVIDERS | PROVIDER_MACHINERY
    wrong = [
        f"{file.relative_to(folder)} imports {name}"
        for file in folder.rglob("*.py")
        if file != folder / "registry.py"
        for name in imported(file)
        if name.startswith("pvclock.providers.")
        and (other := name.split(".")[2]) != own_provider(file)
        and (other in PROVIDERS_OF_GUESTS or own_provider(file) in PROVIDERS_OF_GUESTS)
        and other not in SHARED_BY_PROVIDERS
    ]
    assert not wrong


def own_provider(file: Path) -> str:
    """Return the name of the provider, a module or a package in providers/, that a file is part of."""
    return file.relative_to(PACKAGE / "providers").with_suffix("").parts[0]


def test_only_providers_know_which_one_it_is() -> None:
    """What serves any provider names none, and asks for no name, number or class, but as MAY_NAME says."""
    files = [file for name in NEUTRAL for file in (PACKAGE / name, *(PACKAGE / name).rglob("*.py")) if file.is_file()]
    named = {(str(file.relative_to(PACKAGE)), found) for file in files for found in providers_named_in(file)}
    assert named == set(MAY_NAME)


def providers_named_in(file: Path) -> Iterator[str]:
    """Give what in a Python source depends on which provider there is."""
    for name in imported(file):
        if name.startswith("pvclock.providers.") and name.split(".")[2] in PROVIDERS_OF_GUESTS:
            yield name
    for node in ast.walk(ast.parse(file.read_bytes())):
        match node:
            case ast.Constant(value=str(text)) if text in PROVIDER_NAMES:
                yield repr(text)
            case ast.Name(id=name) | ast.Attribute(attr=name) if PROVIDER_CLASS.fullmatch(name):
                yield name
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass" | "type"), args=[asked, *_]) if (
                "provider" in ast.unparse(asked).lower()
            ):
                yield ast.unparse(node)
            case ast.Subscript(value=ast.Name(id="PROVIDER_NUMBERS")):
                yield ast.unparse(node)


@pytest.mark.parametrize(
    "line",
    [
        "from pvclock.providers.minimal import MinimalProvider",
        "isinstance(self._provider, Provider)",
        "match provider:\n    case KvmProvider():\n        pass",
        "name == 'HyperV'",
        "number != PROVIDER_NUMBERS[name]",
        "type(self.interface.provider).__name__",
    ],
)
def test_a_branch_on_the_provider_would_be_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to depend on which provider there is, by itself, is one that providers_named_in() gives."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "sample.py").write_text(line, encoding="utf-8")
    assert list(providers_named_in(tmp_path / "sample.py"))


def test_time_is_handed_in_below_the_guest_clock() -> None:
    """Below clock/ nothing but the backend and the KVM runner imports a clock."""
    limit = height("clock")
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in modules()
        if (own := subject(dotted(file)) or "") not in CLOCK_READERS and height(own) < limit
        for name in imported(file)
        if name.split(".")[0] in {"time", "datetime"}
    ]
    assert not wrong


def test_qemu_glue_uses_the_public_interface() -> None:
    """The device face takes names of pvclock.__all__ and of the documented subpackages."""
    public = {f"pvclock.{name}" for name in public_names()} | {"pvclock"}
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / "qemu_glue").rglob("*.py")
        for name in imported(file)
        if name.split(".")[0] == "pvclock" and name not in public and not name.startswith(PUBLIC_SUBPACKAGES)
    ]
    assert not wrong


def public_names() -> set[str]:
    """Return the names that type checkers take from pvclock/__init__.py, read without importing it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_bytes())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    return {alias.asname for node in imports for alias in node.names if alias.asname == alias.name}


def test_names_are_the_same_at_run_time_and_for_type_checkers() -> None:
    """pvclock.__all__ has what is imported for type checkers, each from the same module, and get_include()."""
    assert set(pvclock.__all__) == public_names() | {"get_include"}
    for name in pvclock.__all__:
        assert getattr(pvclock, name) is not None


def test_import_is_light() -> None:
    """`import pvclock`, and its version, loads nothing that only some callers need."""
    program = (
        "import sys; before = set(sys.modules); import pvclock; pvclock.__version__; print(*set(sys.modules) - before)"
    )
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    heavy = sorted(set(HEAVY) & set(loaded.stdout.split()))
    assert not heavy
