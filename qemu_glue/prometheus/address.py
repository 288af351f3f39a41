"""Where metrics are served: [ADDRESS:]PORT, as a user types it."""

from __future__ import annotations

import argparse
import re
from typing import Final, NamedTuple

__all__ = ["DEFAULT_HOST", "Address", "parsed_address"]

DEFAULT_HOST: Final = "127.0.0.1"
"""Metrics are for this host, unless the user says otherwise: there is no authentication."""
PORT_MAX: Final = 65535
FORM: Final = re.compile(r"(?:(?:\[(?P<ipv6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^\s:\[\]/]+)):)?(?P<port>[0-9]{1,5})")


class Address(NamedTuple):
    """host: a name, or an address without brackets.  port: 0: any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parsed_address(text: str) -> Address:
    """An argument that says where to serve."""
    match = FORM.fullmatch(text)
    if match is None or int(match["port"]) > PORT_MAX:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not where metrics can be served; give [ADDRESS:]PORT, such as 9911, 0.0.0.0:9911 or "
            f"[::1]:9911, with a port up to {PORT_MAX}"
        )
    return Address(match["ipv6"] or match["host"] or DEFAULT_HOST, int(match["port"]))
