"""The configuration of a VM's guest interface: its keys, and the legal values of each.

`provider`, `version` and `profile` are common to all; the others are the provider's own options (options.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Final, Literal, NamedTuple, TypeGuard, Union, get_args, get_origin

from pvclock.arguments import text
from pvclock.errors import ConfigError, WrongType
from pvclock.providers.options import option_types
from pvclock.providers.registry import PROVIDERS
from pvclock.quantities import U32_MASK, U64_MASK, quoted

__all__ = ["NEWEST", "PROFILES", "Configuration", "checked", "combined", "effective_provider"]

NEWEST: Final = 0

PROFILES: Final = ("linux", "document", "virtualbox")
"""Whose behaviour to follow where they differ: Linux's, that of KVM's documents, or VirtualBox's."""

SPELLINGS: Final = {"Provider": "provider", "Version": "version"}
"""VirtualBox's spelling of the keys that its configuration has, too."""

CHOICES: Final = {"none": "None", "minimal": "Minimal", "hyperv": "HyperV", "kvm": "KVM"}

# VirtualBox's ids of guest systems with a Linux kernel since 2.6, by their beginnings; it has others for 2.2 and 2.4.
LINUX: Final = (
    *("linux", "archlinux", "debian", "fedora", "gentoo", "mandriva", "opensuse", "oracle", "redhat", "suse"),
    *("turbolinux", "ubuntu", "xandros"),
)
OLD_LINUX: Final = ("linux22", "linux24")


class Configuration(NamedTuple):
    """A checked configuration.

    version: of the interface, as configured, possibly NEWEST; always NEWEST without an interface.  implementation: the
    number behind it.  options: the provider's.
    """

    provider: str
    version: int
    implementation: int
    profile: str
    options: Mapping[str, Any]


def checked(config: Mapping[str, object] | Configuration, beside: str = "") -> Configuration:
    """The configuration in `config`, with defaults for what it lacks; one that is checked already is returned as it is.

    provider: None by default.  version: of the provider, the newest by default; under profile "virtualbox" any of 32
    bits.  profile: see PROFILES.  VirtualBox's `Provider`, `Version` and providers' nodes (Provider.node_keys) are
    legal, too.
    ConfigError names the key, its value and what is legal; for an unknown key it ends with `beside`.
    """
    if isinstance(config, Configuration):
        return config
    if not isinstance(config, Mapping):
        raise WrongType("config", config, "a mapping of keys to values")
    given = _respelled(config)
    provider = given.get("provider", "None")
    if not isinstance(provider, str) or provider not in PROVIDERS:
        raise ConfigError(f"unknown provider {quoted(provider)}; choose from {_listed(PROVIDERS)}")
    kind = PROVIDERS[provider]
    options = option_types(kind)
    for key in given:
        if key not in {"provider", "version", "profile"} | options.keys():
            legal = (
                "provider",
                "version",
                "profile",
                *(name for name in options if name not in ("profile", "version")),
            )
            raise ConfigError(
                f"unknown key {key!r} := {given[key]!r} for provider {provider!r}; keys are {_listed(legal)}{beside}"
            )
    profile = given.setdefault("profile", PROFILES[0])
    if profile not in PROFILES:
        raise ConfigError(
            f"profile {quoted(profile)}; choose from {_listed(PROFILES)}. "
            "Palacios' time is not a profile of an interface: "
            "pvclock.compat.palacios has it, and pvclock.ExecutionTimeBackend has execution time for any provider"
        )
    version = given["version"] = _checked_version(provider, given.get("version", NEWEST), kind.version, str(profile))
    chosen = {name: _checked_option(name, given[name], options[name]) for name in options if name in given}
    kept = version if kind.is_enabled else NEWEST
    return Configuration(provider, kept, version or kind.version, str(profile), chosen)


def combined(provider: str | Mapping[str, object], options: Mapping[str, object]) -> dict[str, object]:
    """One configuration from a provider's name or a configuration, and further keys; ConfigError for a key in both."""
    if not isinstance(provider, str | Mapping):
        raise WrongType("provider", provider, "a provider's name or a configuration")
    if not isinstance(options, Mapping):
        raise WrongType("options", options, "a mapping of keys to values")
    base: Mapping[str, object] = {"provider": provider} if isinstance(provider, str) else provider
    if twice := sorted(base.keys() & options.keys()):
        raise ConfigError(
            f"given twice: {', '.join(f'{key} as {quoted(base[key])} and {quoted(options[key])}' for key in twice)}"
        )
    return {**base, **options}


def effective_provider(choice: str, guest_os: str = "") -> str:
    """The provider for a user's `choice`: "default", "legacy", or a provider's name.

    guest_os: "linux", "windows", "macos", or VirtualBox's id ("Ubuntu_64", "Windows11_64", "Linux24").  default: Linux
    since 2.6 gets KVM, Windows HyperV, macOS Minimal, others None.  legacy: what VMs had before there was a choice,
    Minimal for macOS and None for others.  As VirtualBox's --paravirtprovider; ConfigError for another choice.
    """
    text("choice", choice)
    system = text("guest_os", guest_os).lower()
    if choice in CHOICES or choice in CHOICES.values():
        return CHOICES.get(choice, choice)
    if choice not in ("default", "legacy"):
        raise ConfigError(f"provider choice {quoted(choice)}; choose from {_listed(('default', 'legacy', *CHOICES))}")
    if system.startswith("macos"):
        return "Minimal"
    if choice == "legacy" or system.startswith(OLD_LINUX):
        return "None"
    if system.startswith("windows"):
        return "HyperV"
    return "KVM" if system.startswith(LINUX) else "None"


def _respelled(config: Mapping[str, object]) -> dict[str, object]:
    """The configuration in our spelling, without VirtualBox's nodes of other providers; ConfigError if one is bad."""
    given: dict[str, object] = {}
    for key, value in config.items():
        if not _is_node(key):
            _put_once(given, SPELLINGS.get(key, key), value)
    for name in filter(_is_node, config):
        options = _options_in_node(name, config[name])
        if name == given.get("provider"):
            for option, value in options.items():
                _put_once(given, option, value)
    return given


def _is_node(key: str) -> bool:
    """Is that the name of a provider for which VirtualBox has a configuration node?"""
    return key in PROVIDERS and bool(PROVIDERS[key].node_keys)


def _put_once(given: dict[str, object], name: str, value: object) -> None:
    if name in given:
        raise ConfigError(f"given twice: {name} as {quoted(given[name])} and {quoted(value)}")
    given[name] = value


def _options_in_node(provider: str, node: object) -> dict[str, object]:
    """What VirtualBox's node of that provider says, by the names of its options; ConfigError if it is unsound."""
    keys = PROVIDERS[provider].node_keys
    if not isinstance(node, Mapping):
        raise ConfigError(f"{provider} is {quoted(node)}; it is a node with the keys {_listed(keys)}")
    for key in node:
        if key not in keys:
            raise ConfigError(f"unknown key {key!r} := {node[key]!r} in node {provider}; keys are {_listed(keys)}")
    return {keys[key]: value for key, value in node.items()}


def _checked_version(provider: str, version: object, newest: int, profile: str) -> int:
    # VirtualBox accepts any number: all but NEWEST mean an interface without features.
    limit = U32_MASK if profile == "virtualbox" else newest
    if not _is_whole(version) or not NEWEST <= version <= limit:
        raise ConfigError(
            f"version {quoted(version)}; provider {provider!r} has 1 to {limit}, and {NEWEST} is the newest"
        )
    return version


def _checked_option(key: str, value: object, expected: object) -> object:
    if not _accepts(expected, value):
        raise ConfigError(f"{key} is {quoted(value)}; it can be {_words(expected)}")
    return value


def _accepts(expected: Any, value: object) -> bool:  # noqa: ANN401  # a type, or what typing makes of several
    if get_origin(expected) in (Union, UnionType):
        return any(_accepts(each, value) for each in get_args(expected))
    if get_origin(expected) is Literal:
        return any(value is each or (isinstance(value, str) and value == each) for each in get_args(expected))
    if expected is int:
        return _is_whole(value) and 0 <= value <= U64_MASK
    return isinstance(value, expected)


def _words(expected: Any) -> str:  # noqa: ANN401  # as _accepts()
    if get_origin(expected) in (Union, UnionType):
        return " or ".join(map(_words, get_args(expected)))
    if get_origin(expected) is Literal:
        return _listed(get_args(expected))
    names = {int: "a whole number from 0 to 2^64-1", bool: "True or False", str: "text", NoneType: "None"}
    return names.get(expected, str(expected))


def _is_whole(value: object) -> TypeGuard[int]:
    # To Python, True is an int.
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(names: Any) -> str:  # noqa: ANN401  # any iterable
    return ", ".join(map(repr, names))
