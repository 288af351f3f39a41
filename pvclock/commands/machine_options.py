"""The options of a machine's clock, which `pvclock run` and `pvclock doctor --machine` share."""

from __future__ import annotations

import argparse
from typing import Any, Final

from pvclock.commands.arguments import factor
from pvclock.errors import ConfigError
from pvclock.machine import Machine

__all__ = ["CPUS_MAX", "add_arguments", "clock_options", "options_given", "set_rate"]

CPUS_MAX: Final = 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them.  None stands for an option that is not given."""
    parser.add_argument("--clock", choices=("engine", "kernel"), help="who serves its clock (default engine)")
    parser.add_argument("--provider", metavar="NAME", help="the engine's: KVM (default), HyperV, HyperV+KVM, None, ...")
    parser.add_argument(
        "--reference",
        choices=("off", "raw", "monotonic", "realtime"),
        help="which clock of the host's the engine's follows (default off)",
    )
    parser.add_argument(
        "--rate", type=factor, metavar="N/D", help="guest seconds in a host's second, from boot on: 1/10 is a tenth"
    )
    parser.add_argument(
        "--force-rate", action="store_const", const=True, help="even a --rate that its timers cannot follow"
    )
    parser.add_argument(
        "--invtsc", action="store_const", const=True, help="show the guest an invariant TSC, which it prefers"
    )


def options_given(arguments: argparse.Namespace) -> list[str]:
    """Those of them that are on the command line."""
    names = ("clock", "provider", "reference", "rate", "invtsc")
    return [f"--{name}" for name in names if getattr(arguments, name) is not None]


def clock_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Machine's options for them; ConfigError for those that the kernel's clock does not have."""
    options = {"provider": arguments.provider, "reference": arguments.reference}
    options["offer_invariant_tsc"] = arguments.invtsc
    options = {name: value for name, value in options.items() if value is not None}
    if arguments.clock == "kernel" and (options or arguments.rate):
        raise ConfigError("--clock kernel: it takes none of --provider, --reference, --rate and --invtsc")
    return {"clock": arguments.clock or "engine", **options}


def set_rate(machine: Machine, arguments: argparse.Namespace) -> None:
    """Let guest time pass at --rate from now on, before the machine starts."""
    if arguments.rate is not None and machine.clock is not None:
        machine.clock.dilate(*arguments.rate.as_integer_ratio(), force=bool(arguments.force_rate))
