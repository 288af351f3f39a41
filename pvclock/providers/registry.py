"""The providers that a guest can have, by name, and their ids.  The one place that lists their classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pvclock.providers.interface import Provider
from pvclock.providers.kvm import KvmProvider
from pvclock.providers.minimal import MinimalProvider
from pvclock.providers.none import NoneProvider
from pvclock.providers.side_by_side import Pair

__all__ = ["PROVIDERS", "PROVIDER_NUMBERS"]

PROVIDERS: Final[Mapping[str, type[Provider] | Pair]] = {
    each.name: each for each in (NoneProvider, MinimalProvider, KvmProvider)
}

PROVIDER_NUMBERS: Final[Mapping[str, int]] = {"None": 0, "Minimal": 1, "HyperV": 2, "KVM": 3}
"""VirtualBox's ids, which saved units hold; not all of them are provided here."""
