"""Errors of pvclock: one tree; each error keeps its numbers as attributes.

PvclockError
├── WrongType (TypeError)         .parameter .given .wanted; an argument of a wrong type
├── RangeError (ValueError)       a number that its type cannot hold, or no (mul, shift) can express
├── ConfigError (ValueError)      an unknown word or option, or one that contradicts another
├── ImageError (ValueError)       a boot image that cannot be loaded
├── GuestAddressError (LookupError)  .gpa .length; a guest-physical range outside guest memory
├── StateError                    .operation .state .allowed; an operation that the present state does not allow
├── StateFileError (ValueError)   .field .found .supported .path; a saved state that cannot be read, written or used
├── MsrFault                      .index .value; the guest gets #GP
├── TscOffsetNotHonoured          .offset; the host accepts a TSC offset but the guest does not see it
├── GuestCrashed                  .vcpu .reason .site; the guest cannot go on
├── GuestPanicked                 the guest's kernel panicked, and said so
├── PagesNotFound                 .searched_bytes .looked_for; no pvclock page is in a guest's memory
├── MemoryNotReadable             .pid; a guest's memory cannot be read from outside
│   └── VmEnded                   the process that ran a watched VM has ended
├── VmNotObservable               .pid .why; a process that cannot be looked at, or runs no KVM guest
├── ProbeNotRun                   .status .said; the probe could not be run, or ended without a result
├── ProbeRecordError (ValueError) .field .found .supported; a measurement from inside a guest that cannot be read
├── ProbeFailed                   .why; a probe printed an error instead of a measurement
├── ReportSourceError (ValueError)   .path .line .found .expected; a file that `pvclock report` cannot tell of
├── LabError                      .console_tail; the lab lacks something, did not boot, or timed out
└── KvmError (OSError)            .errno .call; a failed KVM system call
    ├── KvmUnavailable            /dev/kvm cannot be used; the message says what to do
    └── MissingCapability         .capability; this host's KVM lacks it
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "ConfigError",
    "GuestAddressError",
    "GuestCrashed",
    "GuestPanicked",
    "ImageError",
    "KvmError",
    "KvmUnavailable",
    "LabError",
    "MemoryNotReadable",
    "MissingCapability",
    "MsrFault",
    "PagesNotFound",
    "ProbeFailed",
    "ProbeNotRun",
    "ProbeRecordError",
    "PvclockError",
    "RangeError",
    "ReportSourceError",
    "StateError",
    "StateFileError",
    "TscOffsetNotHonoured",
    "VmEnded",
    "VmNotObservable",
    "WrongType",
]

GIVEN_MAX, GIVEN_BITS_MAX = 40, 64
"""Characters of a value, and bits of a number, that a message shows."""


class PvclockError(Exception):
    """Base of all errors that pvclock raises on purpose.  They pickle with their attributes."""

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[PvclockError], arguments: tuple[object, ...], attributes: dict[str, object]) -> PvclockError:
    """Unpickle an error without its own __init__, which takes numbers, not the message made of them."""
    error = kind.__new__(kind)
    base = OSError if issubclass(kind, OSError) else Exception
    base.__init__(error, *arguments)
    error.__dict__.update(attributes)
    return error


class WrongType(PvclockError, TypeError):
    """An argument of a wrong type; nothing was done.

    parameter: its name.  given, wanted: what it was and what it can be, in words.
    """

    def __init__(self, parameter: str, value: object, wanted: str) -> None:
        given = _described(value)
        super().__init__(f"{parameter} is {given}; it can be {wanted}")
        self.parameter = parameter
        self.given = given
        self.wanted = wanted


def _described(value: object) -> str:
    """A value for a message: plain ones with their type, others by type alone, since a repr may be long or raise."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    article = "an" if kind[0] in "aeiouAEIOU" else "a"
    if not (type(value) in (float, str, bytes, bool) or (type(value) is int and abs(value) < 1 << GIVEN_BITS_MAX)):
        return f"{article} {kind}"
    shown = repr(value)
    return f"{shown if len(shown) <= GIVEN_MAX else shown[:GIVEN_MAX] + '...'}, {article} {kind}"


class RangeError(PvclockError, ValueError):
    """A number outside what its type or its unit can hold."""


class ConfigError(PvclockError, ValueError):
    """An unknown word or option, one that contradicts another, or a configuration value of a wrong type."""


class ImageError(PvclockError, ValueError):
    """A boot image that cannot be loaded; the message names the bad part."""


class GuestAddressError(PvclockError, LookupError):
    """`length` bytes at guest-physical address `gpa` are not entirely in guest memory."""

    def __init__(self, gpa: int, length: int, why: str = "is not in guest memory") -> None:
        super().__init__(f"guest-physical range {gpa:#x}+{length} {why}")
        self.gpa = gpa
        self.length = length


class StateError(PvclockError):
    """`operation` is not possible in `state`; `allowed` says how to make it possible."""

    def __init__(self, operation: str, state: str, allowed: str) -> None:
        super().__init__(f"{operation}: {state}; {allowed}")
        self.operation = operation
        self.state = state
        self.allowed = allowed


class StateFileError(PvclockError, ValueError):
    """A saved state that cannot be read, written or used here; nothing was changed.

    field: a dotted path such as "vcpus[1].tsc_offset", or "file" for the whole file.  found, supported: the value
    there, shortened, and the values allowed, in words.  path: the file, if any.
    """

    def __init__(self, field: str, found: str, supported: str, path: str = "") -> None:
        super().__init__((f"{path}: " if path else "") + f"{field}: found {found}; supported: {supported}")
        self.field = field
        self.found = found
        self.supported = supported
        self.path = path


class MsrFault(PvclockError):
    """The guest may not access MSR `index`, or not write `value` (None: a read); it gets #GP(0)."""

    def __init__(self, index: int, value: int | None = None, why: str = "not served") -> None:
        access = f"RDMSR {index:#x}" if value is None else f"WRMSR {index:#x} := {value:#x}"
        super().__init__(f"{access}: {why}")
        self.index = index
        self.value = value


class TscOffsetNotHonoured(PvclockError):
    """The host accepted TSC offset `offset` (ticks, modulo 2^64) but the guest's RDTSC does not show it."""

    def __init__(self, offset: int, why: str = "the guest's TSC is the host's; offsets need a VMX or SVM host") -> None:
        super().__init__(
            f"TSC offset not honoured by this host: set to {offset:#x}, but {why}; "
            "`pvclock lab` has a host that honours them"
        )
        self.offset = offset


class GuestCrashed(PvclockError):
    """vCPU `vcpu` exited with `reason` and cannot go on (a triple fault, an emulation failure).

    site: where that was, with registers and code: a CrashSite, or None if it is not known.
    """

    def __init__(self, vcpu: int, reason: object, site: object = None) -> None:
        super().__init__(f"the guest crashed on vCPU {vcpu}: {reason}" + ("" if site is None else f"; {site}"))
        self.vcpu = vcpu
        self.reason = reason
        self.site = site


class GuestPanicked(PvclockError):
    """The guest's kernel panicked, and told the pvpanic device."""

    def __init__(self) -> None:
        super().__init__("the guest's kernel panicked; its console says why")


class PagesNotFound(PvclockError):
    """No pvclock page was found in searched_bytes of a guest's memory; looked_for says what would have been one."""

    def __init__(self, searched_bytes: int, looked_for: str, why: str) -> None:
        super().__init__(f"no pvclock page in {searched_bytes >> 20} MiB of guest memory ({looked_for}): {why}")
        self.searched_bytes = searched_bytes
        self.looked_for = looked_for


class MemoryNotReadable(PvclockError):
    """The memory of a guest cannot be read from outside; pid: the process that runs it, None if unknown."""

    def __init__(self, pid: int | None, why: str) -> None:
        super().__init__(f"guest memory of process {pid}: {why}" if pid is not None else f"guest memory: {why}")
        self.pid = pid


class VmEnded(MemoryNotReadable):
    """The process that ran a watched VM has ended, and its guest's memory is gone."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid, "the process has ended")


class VmNotObservable(PvclockError):
    """Process `pid` cannot be looked at, is not there, or runs no KVM guest; the message says what helps."""

    def __init__(self, pid: int, why: str) -> None:
        super().__init__(f"process {pid}: {why}")
        self.pid = pid
        self.why = why


class ProbeNotRun(PvclockError):
    """The probe could not be run here, or ended without a result.

    status: its exit status, below 0 the signal that ended it, None if it was not started.  said: what it said last.
    """

    def __init__(self, why: str, status: int | None = None, said: str = "") -> None:
        super().__init__(why + (f": {said}" if said else ""))
        self.status = status
        self.said = said


class ProbeRecordError(PvclockError, ValueError):
    """A measurement from inside a guest that cannot be read.

    field: a dotted path such as "clocks[0].pairs[2].cpus", or "file" for the whole output.  found, supported: what is
    there, shortened, and what can be, in words.
    """

    def __init__(self, field: str, found: str, supported: str) -> None:
        super().__init__(f"{field}: found {found}; supported: {supported}")
        self.field = field
        self.found = found
        self.supported = supported


class ProbeFailed(PvclockError):
    """A probe printed an error, `why`, instead of a measurement."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the probe could not measure: {why}")
        self.why = why


class ReportSourceError(PvclockError, ValueError):
    """A file of which no report can be made; nothing was written.

    path: the file.  line: of what is wrong, from 1; None if it is the whole file.  found, expected: in words.
    """

    def __init__(self, path: str, line: int | None, found: str, expected: str) -> None:
        where = path if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: found {found}; expected {expected}")
        self.path = path
        self.line = line
        self.found = found
        self.expected = expected


class LabError(PvclockError):
    """The lab lacks something, did not boot, or timed out; `console_tail` holds the last console lines."""

    def __init__(self, why: str, console_tail: str = "") -> None:
        super().__init__(why + (f"; its console's last lines:\n{console_tail}" if console_tail else ""))
        self.console_tail = console_tail


class KvmError(PvclockError, OSError):
    """KVM system call `call` failed with `errno`."""

    def __init__(self, call: str, errno: int, advice: str = "") -> None:
        reason = f"{_errno.errorcode.get(errno, errno)} ({os.strerror(errno)})"
        super().__init__(errno, f"{call}: {reason}" + (f"; {advice}" if advice else ""))
        self.call = call

    def __str__(self) -> str:
        return str(self.strerror)


class KvmUnavailable(KvmError):
    """/dev/kvm cannot be used on this machine; the message says what to do."""


class MissingCapability(KvmError):
    """This host's KVM lacks `capability`, which the operation needs."""

    def __init__(self, capability: str, purpose: str) -> None:
        super().__init__(capability, _errno.EOPNOTSUPP, f"this host's KVM lacks it; needed {purpose}")
        self.capability = capability
