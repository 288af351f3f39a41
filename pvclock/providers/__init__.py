"""Guest-visible clock interfaces, chosen once by name for the life of a VM."""

from __future__ import annotations

from typing import Final

from pvclock.errors import ConfigError
from pvclock.providers.interface import ClockServices, Provider
from pvclock.providers.kvm import KvmProvider
from pvclock.providers.none import NoneProvider

__all__ = ["PROVIDERS", "create"]

PROVIDERS: Final[dict[str, type[KvmProvider | NoneProvider]]] = {"None": NoneProvider, "KVM": KvmProvider}


def create(name: str, clock: ClockServices, vcpus: int, **options: object) -> Provider:
    """The provider `name` ("None", "KVM") for a VM of `vcpus`; ConfigError for an unknown name or option."""
    if name not in PROVIDERS:
        raise ConfigError(f"unknown provider {name!r}; choose from {', '.join(map(repr, PROVIDERS))}")
    try:
        return PROVIDERS[name](clock, vcpus, **options)  # type: ignore[arg-type]  # checked by the call itself
    except TypeError as error:
        raise ConfigError(f"provider {name!r}: {error}") from None
