"""The twins in C: compiled from bench/native with the product's headers, and called without the GIL."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sysconfig
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, Self

import pvclock

__all__ = [
    "FILTER_AT_LAST",
    "BareVm",
    "Layout",
    "MinimalVm",
    "RateOfTime",
    "Stalls",
    "Step",
    "Twins",
    "WindowSample",
    "compile_empty_call",
    "compile_twins",
]

NATIVE = Path(__file__).parent / "native"
COMPILE = ("cc", "-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")

u64 = ctypes.c_uint64


class Layout(ctypes.Structure):
    """Pages in memory: struct layout of published.h."""

    _fields_ = (("memory", ctypes.c_void_p), ("pages", ctypes.c_size_t), ("stride", ctypes.c_size_t))


class Line(ctypes.Structure):
    """struct pvclock_line of pvclock_math.h."""

    _fields_ = tuple((name, u64) for name in pvclock.ClockLine._fields)


class Scale(ctypes.Structure):
    """struct pvclock_scale of pvclock_math.h."""

    _fields_ = (("mul", ctypes.c_uint32), ("shift", ctypes.c_int8))


class RateOfTime(ctypes.Structure):
    """struct rate_of_time of published.h."""

    _fields_ = (("line", Line), ("scale", Scale))

    @classmethod
    def of(cls, clock: pvclock.GuestClock) -> RateOfTime:
        """Return what `clock` publishes."""
        return cls(Line(*clock.line), Scale(clock.scale.mul, clock.scale.shift))


class Stalls(ctypes.Structure):
    """struct stalls of window.c."""

    _fields_ = (("reads", u64), ("stalled", u64), ("longest_ticks", u64))
    reads: int
    stalled: int
    longest_ticks: int


class WindowSample(NamedTuple):
    """One publish, in ticks: struct window_sample of window.c."""

    window: int
    stamps: int
    stamped_publish: int
    publish: int
    lost_cpu: int


class Twins:
    """The functions of bench/native, each a loop."""

    def __init__(self, library: ctypes.CDLL) -> None:
        layout, rate, size = ctypes.POINTER(Layout), ctypes.POINTER(RateOfTime), ctypes.c_size_t
        samples, stalls = ctypes.POINTER(u64), ctypes.POINTER(Stalls)
        windows = (layout, rate, u64, size, samples, size, stalls)
        self.library = library
        self._publish = function(library, "publish_loop", ctypes.c_int, layout, rate, u64)
        self._windows = function(library, "measure_windows", ctypes.c_int, *windows)
        self._read = function(library, "pvclock_read_loop", u64, ctypes.c_void_p, u64)
        self._sum = function(library, "sum_of_words", u64, ctypes.c_void_p, size)
        self.vdso = function(library, "vdso_loop", u64, u64)
        self.fenced_rdtsc = function(library, "fenced_rdtsc_loop", u64, u64)

    def publish(self, layout: Layout, rate: RateOfTime, publishes: int) -> None:
        """Publish to the pages over and over."""
        if self._publish(layout, rate, publishes) != 0:
            raise MemoryError

    def pvclock_read(self, address: int, reads: int) -> None:
        """Read the clock in the page at `address` over and over."""
        if self._read(address, reads) == 0:
            raise RuntimeError("the page is always odd or changing")

    def sum_of_words(self, memory: memoryview) -> int:
        """The sum of a writable memory's 64-bit words, modulo 2^64."""
        words = (u64 * (memory.nbytes // 8)).from_buffer(memory)
        return int(self._sum(words, len(words)))

    def windows(
        self, layout: Layout, rate: RateOfTime, count: int, *, rest_ticks: int, readers: int
    ) -> tuple[list[WindowSample], Stalls]:
        """Stamp `count` publishes while `readers` threads read."""
        fields = len(WindowSample._fields)
        samples, stalls = (u64 * (fields * count))(), Stalls()
        if self._windows(layout, rate, rest_ticks, readers, samples, count, stalls) != 0:
            raise RuntimeError(f"no memory or no threads for {readers} readers")
        return [WindowSample(*samples[i : i + fields]) for i in range(0, len(samples), fields)], stalls


class MinimalVm:
    """A guest in the minimal KVM_RUN loop of exits.c; a context manager."""

    def __init__(self, library: ctypes.CDLL, image: bytes, msr: int) -> None:
        opened = function(
            library, "minimal_vm_open", ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint32
        )
        self._run = function(library, "minimal_vm_run", ctypes.c_int64, ctypes.c_void_p)
        self._close = function(library, "minimal_vm_close", None, ctypes.c_void_p)
        self._vm = opened(image, len(image), msr)
        if not self._vm:
            raise RuntimeError("the minimal VM cannot be made; pvclock's can")

    def run(self) -> int:
        """Run until the guest writes the exit port; returns the exits before that."""
        exits = int(self._run(self._vm))
        if exits < 0:
            raise RuntimeError("KVM_RUN failed in the minimal VM")
        return exits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close(self._vm)


class Step(IntEnum):
    """enum step of start.c: from /dev/kvm to a guest's first exit, in the order that waits least."""

    OPEN = 0
    RAM = 1
    VM = 2
    FILTER = 3
    SLOT = 4
    IRQCHIP = 5
    VCPU = 6
    CPUID = 7
    REGISTERS = 8
    FIRST_EXIT = 9


FILTER_AT_LAST = tuple(sorted(Step, key=lambda step: (step is Step.FIRST_EXIT, step is Step.FILTER, step)))
"""The order of a VMM that filters MSRs once its vCPUs and their clock are there."""


class BareVm:
    """A guest that start.c has brought to its first exit; `ns` is what each step took."""

    def __init__(self, library: ctypes.CDLL, image: bytes, order: tuple[Step, ...] = tuple(Step)) -> None:
        pointers = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(u64)
        start = function(library, "bare_vm_start", ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, *pointers)
        self._close = function(library, "bare_vm_close", None, ctypes.c_void_p)
        ns = (u64 * len(Step))()
        self._vm = start(image, len(image), (ctypes.c_int * len(Step))(*order), ns)
        if not self._vm:
            raise RuntimeError("the bare VM does not come to its first exit; pvclock's does")
        self.ns = dict(zip(Step, ns, strict=True))

    def close(self) -> None:
        """Give everything back; once."""
        self._close(self._vm)


def function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:  # noqa: ANN401  # ctypes' own types
    """Return a function of the library with its types."""
    found = library[name]
    found.restype, found.argtypes = result, arguments
    return found


def compile_twins(folder: Path) -> Twins:
    """Compile bench/native into `folder` and load it."""
    library = folder / "twins.so"
    sources = [NATIVE / name for name in ("publish.c", "window.c", "reader.c", "exits.c", "search.c", "start.c")]
    subprocess.run([*COMPILE, f"-I{pvclock.get_include()}", *sources, "-o", library], check=True)
    return Twins(ctypes.CDLL(str(library)))


def compile_empty_call(folder: Path) -> Callable[..., None]:
    """Compile the empty extension into `folder`, and return its function."""
    module = folder / "empty_module.so"
    headers = sysconfig.get_path("include")
    subprocess.run([*COMPILE, f"-I{headers}", NATIVE / "empty_module.c", "-o", module], check=True)
    spec = importlib.util.spec_from_file_location("empty_module", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    nothing: Callable[..., None] = loaded.nothing
    return nothing
