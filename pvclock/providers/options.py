"""The options of a provider, and the types of their values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol, get_type_hints

from pvclock.providers.interface import Provider

__all__ = ["HasOptions", "option_types"]


class HasOptions(Protocol):
    """What makes providers and is no class, so that its parameters do not tell which options it takes."""

    @property
    def option_types(self) -> Mapping[str, Any]:
        """The options by name, with the types of their values as annotations have them."""


def option_types(kind: type[Provider] | HasOptions) -> Mapping[str, Any]:
    """The options of the providers of a kind, by name, with the types of their values."""
    return _keyword_parameters(kind) if isinstance(kind, type) else kind.option_types


@cache
def _keyword_parameters(kind: type[Provider]) -> Mapping[str, Any]:
    constructor: Any = kind.__init__
    hints = get_type_hints(constructor)
    return {name: hints[name] for name in constructor.__kwdefaults__ or ()}
