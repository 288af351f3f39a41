"""The values behind the guest's MSRs: initial, saved, and checked when they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple, Protocol

from pvclock.errors import ConfigError
from pvclock.providers.interface import MsrValue
from pvclock.quantities import U64_MASK

__all__ = ["Msr", "Register", "Surface", "load_all", "save_all"]

KIND: Final = {True: "true or false", False: "a whole number from 0 to 2^64-1 that a guest could have written"}


class Register:
    """A number of up to 64 bits, one per vCPU, or one for the whole VM (vcpus=None), whichever vCPU is the index.

    initial: its value at reset.  legal: which values it can have.  flag: is it a bool?
    """

    def __init__(
        self,
        name: str,
        vcpus: int | None,
        *,
        initial: int = 0,
        legal: Callable[[int], bool] = lambda _: True,
        flag: bool = False,
    ) -> None:
        self.name = name
        self._is_vm_wide, self._flag = vcpus is None, flag
        self._initial, self._legal = initial, legal
        self._values = [initial] * (vcpus or 1)

    def __getitem__(self, vcpu: int) -> int:
        return self._values[0 if self._is_vm_wide else vcpu]

    def __setitem__(self, vcpu: int, value: int) -> None:
        self._values[0 if self._is_vm_wide else vcpu] = value

    def reset(self) -> None:
        """Set the initial value."""
        self._values = [self._initial] * len(self._values)

    def save(self) -> MsrValue:
        """The value, or a tuple with one per vCPU."""
        if self._is_vm_wide:
            return bool(self._values[0]) if self._flag else self._values[0]
        return tuple(self._values)

    def checked(self, saved: object) -> list[int]:
        """The values in what save() returned; ConfigError for anything else."""
        values = [saved] if self._is_vm_wide else list(saved) if isinstance(saved, tuple | list) else []
        sound = [value for value in values if isinstance(value, int) and self._is_sound(value)]
        if len(sound) != len(self._values) or len(values) != len(sound):
            number = "" if self._is_vm_wide else f" for each of {len(self._values)} vCPUs"
            legal = f"{KIND[self._flag]}{number}"
            raise ConfigError(f"provider 'KVM', {self.name!r}: {saved!r:.100} was found; it is {legal}")
        return sound

    def _is_sound(self, value: int) -> bool:
        return isinstance(value, bool) is self._flag and 0 <= value <= U64_MASK and self._legal(value)

    def load(self, values: list[int]) -> None:
        """Set what checked() returned."""
        self._values = [int(value) for value in values]


class Msr(NamedTuple):
    """How one MSR is served: backing state (None reads 0) and write handler (vcpu, index, value)."""

    register: Register | None
    write: Callable[[int, int, int], None]


class Surface(Protocol):
    """A part of the provider: some MSRs and their state."""

    @property
    def msrs(self) -> Mapping[int, Msr]:
        """Its MSRs by index."""

    @property
    def registers(self) -> tuple[Register, ...]:
        """All its state."""


def save_all(registers: Iterable[Register]) -> dict[str, MsrValue]:
    """The registers by name."""
    return {register.name: register.save() for register in registers}


def load_all(registers: Iterable[Register], saved: Mapping[str, object], *, older: Iterable[frozenset[str]]) -> None:
    """Set what save_all() returned; ConfigError, with nothing changed, for anything else.

    older: sets of names that earlier versions saved.  The other registers are reset then.
    """
    by_name = {register.name: register for register in registers}
    if saved.keys() not in (by_name.keys(), *older):
        raise ConfigError(
            f"provider 'KVM' has saved {', '.join(map(repr, by_name))}; "
            f"found were {', '.join(f'{name!r:.100}' for name in list(saved)[:32]) or 'none'}"
        )
    checked = {name: by_name[name].checked(value) for name, value in saved.items()}
    for name, register in by_name.items():
        if name in checked:
            register.load(checked[name])
        else:
            register.reset()
