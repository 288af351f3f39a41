"""Modules: files that an image finds in memory, each with a string, listed as multiboot and PVH have it."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock._memory import GuestMemory
from pvclock.boot import BootModule, BootSource
from pvclock.boot.source import Protocol
from pvclock.errors import ConfigError, ImageError, WrongType
from pvclock.guest_layout import BOOT_INFORMATION
from pvclock.machine import Machine
from tests.unit.boot_images import GPA, PATTERN, RAM_BYTES, TEXT, note, plain, with_addresses, with_notes
from tests.unit.kernel_images import bzimage

pytestmark = pytest.mark.row("E18")

IMAGES: dict[Protocol, bytes] = {"multiboot": with_addresses(), "pvh": with_notes(note())}
KERNEL = BootModule(b"a kernel", "kernel quiet root=µ")
DATA = BootModule(bytes(range(256)) * 40)


class Found(NamedTuple):
    """A module as a guest finds it."""

    gpa: int
    content: bytes
    string: bytes


def found(memory: GuestMemory, protocol: Protocol, information: int) -> list[Found]:
    """The modules by the structure's list."""
    if protocol == "multiboot":
        flags, count, at = (struct.unpack("<I", memory.read(information + offset, 4))[0] for offset in (0, 20, 24))
        assert bool(flags & 1 << 3) == bool(count)
        listed = [struct.unpack("<IIII", memory.read(at + number * 16, 16)) for number in range(count)]
        places = [(start, end - start, string) for start, end, string, _ in listed]
    else:
        (count, at) = struct.unpack("<IQ", memory.read(information + 12, 12))
        places = [struct.unpack("<QQQQ", memory.read(at + number * 32, 32))[:3] for number in range(count)]
    return [Found(gpa, memory.read(gpa, length), text(memory, string)) for gpa, length, string in places]


def text(memory: GuestMemory, gpa: int) -> bytes:
    """A C string; PVH's that is not there has address 0."""
    end = gpa
    while gpa and memory.read(end, 1) != b"\0":
        end += 1
    return memory.read(gpa, end - gpa)


@pytest.mark.parametrize("protocol", IMAGES)
def test_modules_are_listed_in_order(protocol: Protocol) -> None:
    """An initrd first, then the others: each on pages of its own, above 1 MiB and the image, with its string."""
    memory = GuestMemory(bytearray(PATTERN * RAM_BYTES))
    source = BootSource(IMAGES[protocol], "quiet", b"initrd", modules=(KERNEL, DATA))
    modules = found(memory, protocol, source.load(memory).registers["rbx"])
    assert [module[1:] for module in modules] == [
        (b"initrd", b""),
        (KERNEL.content, KERNEL.string.encode()),
        (DATA.content, b""),
    ]
    assert all(module.gpa % 4096 == 0 and module.gpa > GPA for module in modules)


@pytest.mark.parametrize("protocol", IMAGES)
@given(
    modules=st.lists(
        st.builds(
            BootModule,
            st.binary(max_size=9000),
            st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=300),
        ),
        max_size=60,
    ),
    cmdline=st.integers(0, 3839).map("x".__mul__),
)
def test_modules_lie_over_nothing_else(protocol: Protocol, modules: list[BootModule], cmdline: str) -> None:
    """However many there are: a guest finds each as it was given, the command line and the image, too."""
    memory = GuestMemory(bytearray(RAM_BYTES))
    source = BootSource(IMAGES[protocol], cmdline, modules=tuple(modules))
    information = source.load(memory).registers["rbx"]
    there = found(memory, protocol, information)
    assert [(module.content, module.string.decode()) for module in there] == modules
    assert all(lower.gpa + len(lower.content) <= upper.gpa for lower, upper in pairwise(there))
    at = struct.unpack("<I", memory.read(information + (16 if protocol == "multiboot" else 24), 4))[0]
    assert text(memory, at).decode() == cmdline
    assert TEXT in memory.read(GPA, 1024)


def test_a_list_that_needs_more_room() -> None:
    """It goes on behind the command line's page, or, where the image is there, all of it is above the image."""
    modules = tuple(BootModule(b"", "a string") for _ in range(500))
    memory = GuestMemory(bytearray(RAM_BYTES))
    assert BootSource(with_addresses(), modules=modules).load(memory).registers["rbx"] == BOOT_INFORMATION
    low = with_addresses(header=0xB000, begin=0xB000, end=0, bss_end=0, entry=0xB000)
    assert BootSource(low, modules=modules[:10]).load(memory).registers["rbx"] == BOOT_INFORMATION
    assert BootSource(low, modules=modules).load(memory).registers["rbx"] == 0xC000


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (bzimage(), "Linux takes one initrd and no modules; several are one initrd, too, behind one another"),
        (plain(64), "Linux takes one initrd and no modules"),
        (TEXT, "a flat image takes no modules; give it a multiboot header"),
    ],
    ids=["bzimage", "linux64", "flat"],
)
def test_an_image_that_takes_no_modules(image: bytes, message: str) -> None:
    """It is refused, by a machine before it makes anything; and memory is untouched."""
    memory = GuestMemory(bytearray(PATTERN * RAM_BYTES))
    source = BootSource(image, modules=(KERNEL,))
    with pytest.raises(ConfigError, match=message):
        source.load(memory)
    assert memory.read(0, RAM_BYTES) == PATTERN * RAM_BYTES
    with pytest.raises(ConfigError, match=message):
        Machine(source)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (BootModule(b"", "a\0b"), "string of a module of 3 bytes: at most 3839, and no NUL"),
        (BootModule(b"", "x" * 3840), "string of a module of 3840 bytes"),
        (BootModule(b"", "\ud800"), "string of a module: "),
        (BootModule(bytes(RAM_BYTES)), "no room for an initrd or module of 4194304 bytes .* give it more"),
    ],
    ids=["nul", "long", "surrogate", "big"],
)
@pytest.mark.parametrize("protocol", IMAGES)
def test_a_module_that_cannot_be_passed(protocol: Protocol, module: BootModule, message: str) -> None:
    """It is named, and memory is untouched."""
    memory = GuestMemory(bytearray(PATTERN * RAM_BYTES))
    with pytest.raises(ImageError, match=message):
        BootSource(IMAGES[protocol], modules=(module,)).load(memory)
    assert memory.read(0, RAM_BYTES) == PATTERN * RAM_BYTES


@pytest.mark.parametrize("modules", [b"content", None, (b"content",), (BootModule("text"),), (BootModule(b"", b""),)])  # type: ignore[arg-type]
def test_what_is_no_module(modules: object) -> None:
    """A machine refuses it, before it makes anything."""
    with pytest.raises(WrongType, match=r"image\.modules"):
        Machine(BootSource(IMAGES["pvh"], modules=modules))  # type: ignore[arg-type]
