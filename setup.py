"""The extension modules and their directives, the probe's two forms, and the README as the package index shows it.

All else is in pyproject.toml.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

if (platform.system(), platform.machine()) != ("Linux", "x86_64") or sys.maxsize < 2**32:
    sys.exit(f"pvclock is for 64-bit x86 Linux; this Python is for {platform.system()} on {platform.machine()}")

# -Werror: these modules write into guest memory, so a warning is read before it is shipped.
FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]

# No symbols: with those of Cython's wrappers a module is six times as large.
LINK_FLAGS = ["-Wl,--strip-all"]

PAYLOADS = list(Path("pvclock/payloads").glob("*.s"))
PAYLOAD_FLAGS = ["-Wa,-Ipvclock/payloads"]

# The probe's two forms (docs/probe.md) are programs of their own, which pvclock.probe._images has inside as they are.
# Files of its folder that begin with "_" are Cython's, those that belong to neither form are of both.
PROBE = Path("pvclock/probe")
PROBE_SOURCES = sorted([*PROBE.glob("[!_]*.c"), *PROBE.glob("*.S")])
PROBE_LINKER_SCRIPT = PROBE / "bare.ld"
PROBE_FORMS = {
    "linux": ["-static", "-pthread"],
    "bare": [
        *("-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-fno-pie", "-no-pie", "-fcf-protection=none"),
        *("-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
        *(f"-Wl,-T,{PROBE_LINKER_SCRIPT}", "-Wl,--build-id=none"),
    ],
}
PROBE_DEPENDS = [*PROBE_SOURCES, *PROBE.glob("*.h"), PROBE_LINKER_SCRIPT, Path("pvclock/__init__.py")]

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


class BuildExtensions(build_ext):
    """Compiles the forms of the probe before the module that has them inside."""

    command_name = "build_ext"  # an editable install looks up the options below anew, by this

    def build_extension(self, extension: Extension) -> None:
        """Have the assembler look for the forms where they are built."""
        if extension.name == "pvclock.probe._images":
            folder = Path(self.build_temp) / "probe"
            folder.mkdir(parents=True, exist_ok=True)
            for form in PROBE_FORMS:
                build_form(form, folder / form)
            extension.extra_compile_args.append(f"-Wa,-I{folder}")
        super().build_extension(extension)


def build_form(form: str, program: Path) -> None:
    """Compile one form of the probe, if it is older than its sources.

    Raises:
        CompileError: there is no static C library, or what the compiler said.
    """
    depends = [str(file) for file in (*DEPENDS, *PROBE_DEPENDS)]
    if not newer_group(depends, str(program)):
        return
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    library = subprocess.run([*compiler, "-print-file-name=libc.a"], capture_output=True, text=True, check=False)
    if not Path(library.stdout.strip()).is_absolute():  # a file that is not found is printed as it was named
        raise CompileError("no static C library, libc.a: install libc6-dev (Debian), glibc-static (Fedora)")
    others = tuple({*PROBE_FORMS} - {form})
    sources = [str(file) for file in PROBE_SOURCES if not file.name.startswith(others)]
    flags = [*FLAGS, *PROBE_FORMS[form], *LINK_FLAGS, f'-DPVCLOCK_VERSION="{version()}"']
    done = subprocess.run(
        [*compiler, *flags, "-o", str(program), *sources], stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise CompileError(f"the probe's form {form} is not compiled:\n{done.stderr}")


def version() -> str:
    """The one place where it stands."""
    package = Path("pvclock/__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', package, re.MULTILINE)
    return found


def readme() -> str:
    """README.md with links that lead from anywhere to this version's files: a picture's to its bytes."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    files = f"{project['urls']['Source']}/{{}}/v{version()}/"
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
        module("pvclock._guest_budget"),
        module("pvclock._tsc_writes"),
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
        module("pvclock.kvm._stats"),
        module("pvclock.kvm._vcpu"),
        # The payloads are assembled into these modules by gas `.include`, which looks in the -I folders.
        module("pvclock.payloads._images", *PAYLOAD_FLAGS, depends=PAYLOADS),
        module("pvclock.payloads._hvprobe_image", *PAYLOAD_FLAGS, depends=PAYLOADS),
        module("pvclock.probe._images", depends=PROBE_DEPENDS),
    ],
    cmdclass={"build_ext": BuildExtensions},
    options={"build_ext": {"cython_directives": DIRECTIVES}},
)
