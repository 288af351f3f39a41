"""VirtualBox's user-facing word for a guest's debugger: the text after --paravirtdebug, as keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from pvclock import arguments
from pvclock.errors import ConfigError
from pvclock.quantities import quoted

__all__ = ["DebugOptions", "parsed"]

DEFAULTS: Final = {
    "enabled": "0",
    "address": "127.0.0.1",
    "port": "50000",
    "vendor": "Microsoft Hv",
    "vsinterface": "1",
    "hypercallinterface": "0",
}
PORT_MAX: Final = 65535


class DebugOptions(NamedTuple):
    """Where the VMM's debugger listens, for its DebugDevice, and the node of the provider's configuration."""

    address: str
    port: int
    node: Mapping[str, object]
    """The value of key "HyperV"."""


def parsed(options: str) -> DebugOptions | None:
    """What "enabled=1,address=...,port=...,vendor=...,vsinterface=...,hypercallinterface=..." says, in any order.

    None unless enabled.  ConfigError for an unknown key, one that is there twice, or a value that cannot be.
    """
    given: dict[str, str] = {}
    for each in filter(None, arguments.text("options", options).split(",")):
        key, _, value = each.partition("=")
        if key not in DEFAULTS:
            raise ConfigError(f"unrecognized debug option {quoted(key)}; choose from {', '.join(DEFAULTS)}")
        if key in given:
            raise ConfigError(f"debug option {key} is given twice: {quoted(given[key])} and {quoted(value)}")
        given[key] = value
    chosen = {**DEFAULTS, **given}
    enabled, vs_interface, hypercalls = (
        _switch(chosen, key) for key in ("enabled", "vsinterface", "hypercallinterface")
    )
    port = _port(chosen["port"])
    node = {"VendorID": chosen["vendor"], "VSInterface": vs_interface, "HypercallDebugInterface": hypercalls}
    return DebugOptions(chosen["address"], port, node) if enabled else None


def _switch(chosen: Mapping[str, str], key: str) -> bool:
    if chosen[key] not in ("0", "1"):
        raise ConfigError(f"debug option {key} is {quoted(chosen[key])}; it is 0 or 1")
    return chosen[key] == "1"


def _port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(PORT_MAX)) else 0
    if not 0 < port <= PORT_MAX:
        raise ConfigError(f"debug option port is {quoted(text)}; it is 1 to {PORT_MAX}")
    return port
