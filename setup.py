"""The extension modules and the directives they are compiled with, and the README as the package index shows it.

All else is in pyproject.toml.
"""

import platform
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup

if (platform.system(), platform.machine()) != ("Linux", "x86_64") or sys.maxsize < 2**32:
    sys.exit(f"pvclock is for 64-bit x86 Linux; this Python is for {platform.system()} on {platform.machine()}")

# -Werror: these modules write into guest memory, so a warning is read before it is shipped.
FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]

# No symbols: with those of Cython's wrappers a module is six times as large.
LINK_FLAGS = ["-Wl,--strip-all"]

PAYLOADS = list(Path("pvclock/payloads").glob("*.s"))
PAYLOAD_FLAGS = ["-Wa,-Ipvclock/payloads"]

# A changed header, or changed flags here, rebuild what includes it.
DEPENDS = [*Path("pvclock/include").glob("*.h"), Path("setup.py")]

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,  # indices are checked where a caller's value comes in
    "wraparound": False,
    "initializedcheck": False,
    "annotation_typing": False,  # else `int` turns a float into one instead of refusing it
    "cdivision": True,  # C's division: the Python faces refuse a divisor of zero
    "auto_pickle": False,  # pages and file descriptors have no meaning in another process
    "autotestdict": False,  # else every doctest runs twice
    "embedsignature": False,  # the stubs carry the signatures
}


def module(name: str, *flags: str, depends: Iterable[Path] = ()) -> Extension:
    """Return one extension module, its source found by its name."""
    return Extension(
        name,
        [name.replace(".", "/") + ".pyx"],
        include_dirs=["pvclock/include"],
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=LINK_FLAGS,
        depends=[str(file) for file in (*DEPENDS, *depends)],
    )


def readme() -> str:
    """README.md with links that lead from anywhere to this version's files: a picture's to its bytes."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = Path("pvclock/__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', package, re.MULTILINE)
    files = f"{project['urls']['Source']}/{{}}/v{version}/"
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{files.format('raw')}", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\1{files.format('blob')}", text)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=[
        module("pvclock._memory"),
        module("pvclock._scale"),
        module("pvclock._core"),
        module("pvclock._counter"),
        module("pvclock._records"),
        module("pvclock._stress"),
        module("pvclock._transaction"),
        module("pvclock._bulk"),
        module("pvclock._sampling"),
        module("pvclock._search"),
        module("pvclock._process_memory"),
        module("pvclock.kvm._gate"),
        module("pvclock.kvm._fd"),
        module("pvclock.kvm._system"),
        module("pvclock.kvm._vm"),
        module("pvclock.kvm._vcpu"),
        # The payloads are assembled into these modules by gas `.include`, which looks in the -I folders.
        module("pvclock.payloads._images", *PAYLOAD_FLAGS, depends=PAYLOADS),
        module("pvclock.payloads._hvprobe_image", *PAYLOAD_FLAGS, depends=PAYLOADS),
    ],
    options={"build_ext": {"cython_directives": DIRECTIVES}},
)
