"""Mutants: one deliberate mistake each, as data, with the tests that must notice it.

They stand in the *.toml files beside this one, a file for each source of rows.  A table of tables has a row's name:

    [[K-10]]
    breaks = "a page goes on being updated after bit 0 was cleared"
    file = "pvclock/providers/kvm/kvmclock.py"
    text = 'if not value & 1:'
    replacement = 'if False:'
    dies_in = ["unit/test_kvm_provider.py::test_clearing_bit_0_ends_updates"]

`text` stands in `file` exactly once; the tests name the row.  How a compiled file is mutated: schemata.py; the probe,
which has no environment where it is a guest, is built anew for each mutant.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FIELDS = {"breaks", "file", "text", "replacement", "dies_in"}
COMPILED = {".pyx", ".h", ".s"}
PROBE = "pvclock/probe/"
PROBE_SOURCES = {".c", ".h", ".S", ".ld"}


class BadMutant(ValueError):
    """The data do not describe a mutant of this tree."""


class Mutant(NamedTuple):
    """One mistake, and the row that forbids it."""

    name: str
    """The row and a number: K-10.2."""
    row: str
    breaks: str
    """What a guest or VMM would meet with."""
    file: str
    text: str
    replacement: str
    dies_in: tuple[str, ...]
    """Node ids below tests/, without parameters."""

    @property
    def is_compiled(self) -> bool:
        """Whether its file needs a compiler, and the mistake can be chosen at run time."""
        return Path(self.file).suffix in COMPILED and not self.is_of_the_probe

    @property
    def is_of_the_probe(self) -> bool:
        """Whether its file is of the programs in C that pvclock.probe carries."""
        return self.file.startswith(PROBE) and Path(self.file).suffix in PROBE_SOURCES

    @property
    def needs_machine(self) -> bool:
        """Whether it dies on real vCPUs or under load, and so runs with no other beside it."""
        return not all(test.startswith(("unit/", "model/")) for test in self.dies_in)

    def applied(self, source: str) -> str:
        """Return its file's source with the mistake in it.

        Raises:
            BadMutant: its text is not there, or more than once.
        """
        begin = self.begin(source)
        return source[:begin] + self.replacement + source[begin + len(self.text) :]

    def source(self, root: Path) -> str:
        """Return its file's source in a tree.

        Raises:
            BadMutant: there is no such file.
        """
        try:
            return (root / self.file).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BadMutant(f"{self.name}: there is no {self.file}") from None

    def begin(self, source: str) -> int:
        """Return where its text is in its file's source; errors as applied()."""
        if (count := source.count(self.text)) != 1:
            raise BadMutant(f"{self.name}: its text is {count} times in {self.file}, not once")
        return source.index(self.text)


def load(folder: Path = HERE) -> list[Mutant]:
    """Return the mutants of a folder's files, in their order; those of one row are numbered through all files.

    Raises:
        BadMutant: a table lacks a field or has an unknown one, or changes nothing.
    """
    numbers: Counter[str] = Counter()
    mutants = []
    for mutant in (each for file in sorted(folder.glob("*.toml")) for each in of_file(file)):
        numbers[mutant.row] += 1
        mutants.append(mutant._replace(name=f"{mutant.row}.{numbers[mutant.row]}"))
    return mutants


def of_file(file: Path) -> Iterator[Mutant]:
    """Give the mutants of one file; errors as load()."""
    for row, tables in tomllib.loads(file.read_text(encoding="utf-8")).items():
        for number, table in enumerate(tables, start=1):
            name = f"{row}.{number}"
            if table.keys() != FIELDS:
                raise BadMutant(f"{file.name}: {name} has {sorted(table)}, not {sorted(FIELDS)}")
            if table["text"] == table["replacement"] or not all("::" in test for test in table["dies_in"] or [""]):
                raise BadMutant(f"{file.name}: {name} changes nothing, or names no test that is to notice it")
            yield Mutant(name, row, **table | {"dies_in": tuple(table["dies_in"])})
