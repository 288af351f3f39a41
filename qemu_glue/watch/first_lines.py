"""What is said of a VM once its pages are found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.text import Text

from pvclock.meter.watch.loop import WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.words import plain_ns
from qemu_glue.watch.sentences import addresses_in_words

__all__ = ["first_lines"]

US_PER_S: Final = 1_000_000


def first_lines(loop: WatchLoop, found: PagesFound) -> Iterator[Text]:
    """Where its pages are, and what cannot be seen of it."""
    vm = loop.vm
    interval = plain_ns(round(loop.interval_s * US_PER_S) * 1000)
    yield Text(f"{vm.name}: watching {addresses_in_words(found.pages)}, every {interval}")
    if loop.is_paused:
        yield Text("The guest is stopped.", "yellow")
    for lacking, why in (("clock readings", vm.why_no_offsets), ("causes of steps", vm.why_no_events)):
        if why is not None:
            yield Text(f"No {lacking}: {why}", "yellow")
    if loop.finder.doubt is not None:
        yield Text(f"Perhaps not the guest's: {loop.finder.doubt}", "yellow")
