"""Two providers for one guest, side by side, as QEMU shows KVM's leaves beside Hyper-V's; neither knows the other.

The guest finds both interfaces and uses what it knows of either; pages, MSRs, timers and state of each are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from pvclock.errors import ConfigError, StateFileError
from pvclock.msr_ranges import MsrRange
from pvclock.providers.calls import each_of
from pvclock.providers.interface import (
    ClockServices,
    CpuidLeaf,
    Hooks,
    HypercallRegisters,
    HypercallResult,
    MsrValue,
    OwnPage,
    Provider,
    Status,
)
from pvclock.providers.options import option_types

__all__ = ["Pair", "Side", "SideBySide"]

SHARED: Final = frozenset({"profile", "version", "enforce_cpuid", "apic_bus_hz"})
"""Options that mean the same to every provider: one value is for both sides."""

SEVERITY: Final = {Status.NOT_ENABLED: 0, Status.NOT_AVAILABLE: 0, Status.SUCCESS: 1}
"""Of what update_paravirt_tsc() returns; anything else is worse."""

T = TypeVar("T")
DueNs: TypeAlias = Callable[[], int | None]
Expire: TypeAlias = Callable[[int], Callable[[], object] | None]


class Side(NamedTuple):
    """A provider of a pair.  fixed: options that are not the user's to choose, such as where its leaves begin."""

    kind: type[Provider]
    fixed: Mapping[str, Any] = MappingProxyType({})


class Pair(NamedTuple):
    """What makes the providers of guests that have the interfaces of both sides; it stands for a class in the registry.

    name, number: see Provider.  first: the one whose leaves begin at CPUID_BASE.  An option that both have and that is
    not in SHARED has the lower-case name of its side in front, such as "kvm_features".
    """

    name: str
    number: int
    first: Side
    second: Side

    @property
    def version(self) -> int:
        """See Provider: it goes up with either side's."""
        return self.first.kind.version + self.second.kind.version - 1

    @property
    def is_enabled(self) -> bool:
        """See Provider."""
        return self.first.kind.is_enabled or self.second.kind.is_enabled

    @property
    def msr_ranges(self) -> tuple[MsrRange, ...]:
        """See Provider."""
        return self.first.kind.msr_ranges + self.second.kind.msr_ranges

    @property
    def node_keys(self) -> Mapping[str, str]:
        """See Provider: VirtualBox has no such guest."""
        return {}

    @property
    def option_types(self) -> Mapping[str, Any]:
        """The options that it takes, see HasOptions."""
        return {
            name: option_types(side.kind)[own]
            for side in (self.first, self.second)
            for name, own in self.options_of(side).items()
        }

    def options_of(self, side: Side) -> Mapping[str, str]:
        """The pair's names of that side's options, each with the side's own."""
        first, second = (option_types(each.kind).keys() - each.fixed.keys() for each in (self.first, self.second))
        ambiguous = (first & second) - SHARED
        return {
            f"{side.kind.name.lower()}_{own}" if own in ambiguous else own: own
            for own in option_types(side.kind)
            if own not in side.fixed
        }

    def __call__(self, clock: ClockServices, vcpus: int, **options: Any) -> SideBySide:  # noqa: ANN401  # option_types
        """A provider of that VM; ConfigError as its sides' constructors."""
        return SideBySide(self, clock, vcpus, options)


class SideBySide:
    """The provider that a Pair makes.

    A hypercall is the first side's while that has hypercalls enabled (Hyper-V: once the guest has said what it is),
    else the second's, as in KVM.  VirtualBox has no such guest, so its saved unit holds neither side's state.
    """

    def __init__(self, kind: Pair, clock: ClockServices, vcpus: int, options: Mapping[str, Any]) -> None:
        self.kind, self.clock = kind, clock
        self.name, self.number, self.version, self.is_enabled = kind.name, kind.number, kind.version, kind.is_enabled
        self.node_keys = kind.node_keys
        self._first, self._second = (_made(kind, side, clock, vcpus, options) for side in (kind.first, kind.second))
        self._sides = self._first, self._second
        self.sides: Mapping[str, Provider] = {side.name: side for side in self._sides}
        """The two providers by name: each has services of its own for VMMs that emulate CPUs."""
        self.msr_ranges = self._first.msr_ranges + self._second.msr_ranges
        self._msrs_of_second = [range(each.base, each.base + each.length) for each in self._second.msr_ranges]
        self.hypercall_opcodes = tuple(dict.fromkeys(self._first.hypercall_opcodes + self._second.hypercall_opcodes))
        self.cpuid_base = self._first.cpuid_base
        self.hypercall_port = _one_of(side.hypercall_port for side in self._sides)
        self.debug_setup = _one_of(side.debug_setup for side in self._sides)
        # A side without pvclock pages forbids neither.
        self.refreshes_pages = all(side.refreshes_pages for side in self._sides)
        self.tells_of_pauses = all(side.tells_of_pauses for side in self._sides)
        self.hooks = _both(self._first.hooks, self._second.hooks)

    @property
    def config(self) -> Mapping[str, int | bool | str]:
        """See Provider."""
        return {
            name: side.config[own]
            for side, options in zip(self._sides, self._options(), strict=True)
            for name, own in options.items()
            if own in side.config
        }

    def _options(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        return self.kind.options_of(self.kind.first), self.kind.options_of(self.kind.second)

    @property
    def warnings(self) -> tuple[str, ...]:
        """See Provider."""
        return self._first.warnings + self._second.warnings

    # The guest's side

    @property
    def cpuid_leaves(self) -> Mapping[int, CpuidLeaf]:
        """Those of both; each side's first leaf has the number of its last one in EAX."""
        return {**self._first.cpuid_leaves, **self._second.cpuid_leaves}

    @property
    def guest_lives_by_tsc(self) -> bool:
        """See Provider."""
        return any(side.guest_lives_by_tsc for side in self._sides)

    @property
    def shows_invariant_tsc(self) -> bool:
        """See Provider."""
        return all(side.shows_invariant_tsc for side in self._sides)

    def read_msr(self, vcpu: int, index: int) -> int:
        """See Provider."""
        return self._side_of(index).read_msr(vcpu, index)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """See Provider."""
        self._side_of(index).write_msr(vcpu, index, value)

    def _side_of(self, index: int) -> Provider:
        return self._second if any(index in msrs for msrs in self._msrs_of_second) else self._first

    @property
    def are_hypercalls_enabled(self) -> bool:
        """See Provider."""
        return any(side.are_hypercalls_enabled for side in self._sides)

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """See Provider."""
        side = self._first if self._first.are_hypercalls_enabled else self._second
        return side.hypercall(vcpu, registers)

    def own_page(self, vcpu: int) -> OwnPage | None:
        """See Provider."""
        return _one_of(side.own_page(vcpu) for side in self._sides)

    @property
    def allows_stable(self) -> bool:
        """See Provider; what has no pvclock pages says no, for it is never asked."""
        return self._first.allows_stable or self._second.allows_stable

    @property
    def is_paravirt_tsc_enabled(self) -> bool:
        """See Provider."""
        return any(side.is_paravirt_tsc_enabled for side in self._sides)

    def update_paravirt_tsc(self) -> Status:
        """See Provider; of both outcomes the worse one, and SUCCESS if only one side has such pages."""
        outcomes = [side.update_paravirt_tsc() for side in self._sides]
        return max(outcomes, key=lambda outcome: SEVERITY.get(outcome, 2))

    # Life

    def reset(self) -> None:
        """See Provider."""
        for side in self._sides:
            side.reset()

    def save(self) -> Mapping[str, MsrValue]:
        """What both save; each name has its side's in front: "KVM-system_time"."""
        return {f"{side.name}-{name}": value for side in self._sides for name, value in side.save().items()}

    def load(self, msrs: Mapping[str, object]) -> None:
        """See Provider."""
        parts = {side.name: _part(side, msrs) for side in self._sides}
        if unknown := [name for name in msrs if name.partition("-")[0] not in parts]:
            raise ConfigError(f"provider {self.name!r} saves nothing by these names: {', '.join(map(repr, unknown))}")
        with ExitStack() as undo:
            # The second first: the page of the first one's time moves with its load, and moves once.
            for side in (self._second, self._first):
                before = side.save()
                side.load(parts[side.name])
                undo.callback(side.load, before)
            undo.pop_all()

    def save_unit(self) -> bytes:
        """Nothing."""
        return b""

    def load_unit(self, part: bytes, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """Accepts nothing."""
        if part:
            raise StateFileError("unit", f"{len(part)} bytes after the header", f"none of provider {self.name!r}")
        begin()


def _made(pair: Pair, side: Side, clock: ClockServices, vcpus: int, options: Mapping[str, Any]) -> Provider:
    given = {own: options[name] for name, own in pair.options_of(side).items() if name in options}
    return side.kind(clock, vcpus, **given, **side.fixed)  # type: ignore[call-arg]  # each kind has its own


def _part(side: Provider, msrs: Mapping[str, object]) -> dict[str, object]:
    prefix = f"{side.name}-"
    return {name.removeprefix(prefix): value for name, value in msrs.items() if name.startswith(prefix)}


def _both(first: Hooks, second: Hooks) -> Hooks:
    """Hooks that tell both sides; ConfigError if both account run delays, which nobody could do in one step."""
    if first.run_delay and second.run_delay:
        raise ConfigError("two providers that account run delays cannot be side by side")
    return Hooks(
        run_delay=first.run_delay or second.run_delay,
        tick=each_of(first.tick, second.tick),
        time_changed=each_of(first.time_changed, second.time_changed),
        next_due_ns=_earlier(first.next_due_ns, second.next_due_ns),
        expire=_expired(first.expire, second.expire),
    )


def _earlier(first: DueNs | None, second: DueNs | None) -> DueNs | None:
    """The earlier one of what is due."""
    if first is None or second is None:
        return first or second
    return lambda: min((due for due in (first(), second()) if due is not None), default=None)


def _expired(first: Expire | None, second: Expire | None) -> Expire | None:
    """What expires on both sides, and then delivers both."""
    if first is None or second is None:
        return first or second
    return lambda now_ns: each_of(first(now_ns), second(now_ns))


def _one_of(values: Iterable[T | None]) -> T | None:
    """The first one that is there."""
    return next((value for value in values if value is not None), None)
