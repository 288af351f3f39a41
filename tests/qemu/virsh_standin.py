"""A stand-in for virsh: what qemu_glue.watch.virsh asks of it, said to a QEMU without libvirt, by its QMP sockets.

Environment: STANDIN_QMP and STANDIN_EVENTS, two QMP sockets of one QEMU; STANDIN_DOMAIN, its name.  Options and output
as of virsh 9.0; and a file STANDIN_EVENTS.listening, once it hears events.  It is begun often, and imports little.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from collections.abc import Iterator


def main(command: str, *options: str) -> int:
    """Do what the command line says; the exit status."""
    if command == "uri":
        sys.stdout.write(os.environ["LIBVIRT_DEFAULT_URI"] + "\n")
        return 0
    if options[:2] != ("--domain", os.environ["STANDIN_DOMAIN"]):
        sys.stderr.write(f"error: failed to get domain '{options[1]}'\n")
        return 1
    if command == "qemu-monitor-command":
        assert options[2] == "--cmd"
        sys.stdout.write(json.dumps(answer(*options[3:])) + "\n\n")
    else:
        assert (command, *options[2:]) == ("qemu-monitor-event", "--loop")
        print_events(options[1])
    return 0


def answer(question: str, descriptor: str = "") -> object:
    """QEMU's answer to a command."""
    connection, messages = talk(os.environ["STANDIN_QMP"])
    fds = [struct.pack("i", int(descriptor.removeprefix("--pass-fds=")))] if descriptor else []
    connection.sendmsg([question.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd) for fd in fds])
    return next(message for message in messages if "event" not in message)


def print_events(domain: str) -> None:
    """Print the events as they come, until QEMU hangs up."""
    path = os.environ["STANDIN_EVENTS"]
    _connection, messages = talk(path)
    os.close(os.open(f"{path}.listening", os.O_CREAT))
    for event in messages:
        stamp = event["timestamp"]
        when = f"{stamp['seconds']}.{stamp['microseconds']:06}"
        data = json.dumps(event["data"]) if "data" in event else "<null>"
        sys.stdout.write(f"event {event['event']} at {when} for domain '{domain}': {data}\n")
        sys.stdout.flush()


def talk(path: str) -> tuple[socket.socket, Iterator[dict]]:  # type: ignore[type-arg]  # JSON
    """A connection to QEMU, ready for commands, and what it says from then on."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    messages = map(json.loads, connection.makefile())
    next(messages)
    connection.sendall(b'{"execute": "qmp_capabilities"}')
    next(messages)
    return connection, messages


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
