"""A talk by QEMU's Python clients, as a process of its own: `python -m tests.qemu.qmp_client legacy|asyncio SOCKET`.

It prints a line of JSON for each thing that it has found.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any

from qemu.qmp import ExecuteError, QMPClient
from qemu.qmp.legacy import QEMUMonitorProtocol

EVENT_LIMIT_S = 100.0


def tell(*found: object) -> None:
    """Print what was found."""
    print(json.dumps(found), flush=True)  # noqa: T201  # to the test


def told(event: Any) -> object:  # noqa: ANN401  # JSON
    """An event without its stamp."""
    return event["event"], event.get("data")


def legacy(path: str) -> None:
    """QEMUMonitorProtocol, as qmp-shell and QEMU's own tests have it."""
    monitor = QEMUMonitorProtocol(path)
    greeting: Any = monitor.connect()
    tell(sorted(greeting["QMP"]))
    monitor.settimeout(EVENT_LIMIT_S)
    tell(monitor.cmd("query-status"))
    tell(monitor.cmd_obj({"execute": "stop", "id": "mine"}))
    tell([told(event) for event in monitor.get_events()])
    tell(monitor.cmd_raw("nope", {"a": 1}))
    tell(monitor.cmd("cont"), told(monitor.pull_event(EVENT_LIMIT_S)))
    monitor.clear_events()
    tell(monitor.cmd("system_reset"), told(monitor.get_events(EVENT_LIMIT_S)[0]))
    try:
        monitor.cmd("pmemsave", val=0)
    except ExecuteError as refusal:
        tell(refusal.error_class, str(refusal))
    tell(monitor.cmd("quit"))
    with suppress(EOFError):  # the VMM has hung up already
        monitor.close()


async def by_asyncio(path: str) -> None:
    """QMPClient, with commands at once and a listener."""
    client = QMPClient("test")
    await client.connect(path)
    assert client.greeting is not None
    greeting: Any = client.greeting._asdict()  # as qmp-shell has it
    tell(sorted(greeting["QMP"]))
    with client.listener(("STOP", "RESUME")) as listener:
        answers = await asyncio.gather(*(client.execute(name) for name in ("stop", "query-status", "cont")))
        tell(answers, [told(await listener.get()) for _ in range(2)])
    try:
        await client.execute("stop", {"a": 1})
    except ExecuteError as refusal:
        tell(refusal.error_class, str(refusal))
    tell(await client.execute_msg(client.make_execute_msg("query-kvm")))
    tell(await client.execute("quit"))
    with suppress(EOFError):
        await client.disconnect()


if __name__ == "__main__":
    if sys.argv[1] == "legacy":
        legacy(sys.argv[2])
    else:
        asyncio.run(by_asyncio(sys.argv[2]))
