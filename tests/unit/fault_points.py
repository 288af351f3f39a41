"""Where tests interrupt, stop and race: lines of these modules, named by subject so that a move of code keeps them."""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module
from types import ModuleType
from typing import Final

from pvclock import threads
from pvclock.clock import event_delivery, event_log, tick_workers, ticker

__all__ = ["CHANGES_OF_TIME", "EVENTS", "EXECUTION_TIME", "MACHINE", "TICKER", "product"]


def package(name: str) -> tuple[ModuleType, ...]:
    """Every Python module of a package of ours."""
    found = pkgutil.iter_modules(import_module(name).__path__, f"{name}.")
    modules = [import_module(each.name) for each in found if not each.ispkg]
    return tuple(module for module in modules if (module.__file__ or "").endswith(".py"))


EVENTS: Final = (event_log, event_delivery, threads)
TICKER: Final = (ticker, tick_workers, threads)
EXECUTION_TIME: Final = package("pvclock.host")
MACHINE: Final = package("pvclock.machine")
CHANGES_OF_TIME: Final = tuple(module for module in package("pvclock.clock") if module not in {*EVENTS, *TICKER})


def product() -> list[ModuleType]:
    """All of pvclock that is written in Python, as far as it is loaded."""
    found = [module for name, module in sys.modules.items() if name.split(".")[0] == "pvclock"]
    return [module for module in found if (module.__file__ or "").endswith(".py")]
