"""A stand-in for virsh: what qemu_glue.watch.virsh asks of it, said to a QEMU without libvirt, by its QMP sockets.

Environment: STANDIN_QMP and STANDIN_EVENTS, two QMP sockets of one QEMU; STANDIN_DOMAIN, its name.  Options and output
as of virsh 9.0; and a file STANDIN_EVENTS.listening, once it hears events.  It is begun often, and imports little.
"""

from __future__ import annotations

import _socket  # socket and json are most of what a call would take
import os
import struct
import sys

EVENT = '{"timestamp"'
"""How a line begins that is no answer."""


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
        sys.stdout.write(answer(*options[3:]) + "\n")
    else:
        assert (command, *options[2:]) == ("qemu-monitor-event", "--loop")
        print_events(options[1])
    return 0


def answer(question: str, descriptor: str = "") -> str:
    """QEMU's answer to a command."""
    talk = Talk(os.environ["STANDIN_QMP"])
    fds = [struct.pack("i", int(descriptor.removeprefix("--pass-fds=")))] if descriptor else []
    talk.connection.sendmsg([question.encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd) for fd in fds])
    return next(line for line in talk.lines if not line.startswith(EVENT))


def print_events(domain: str) -> None:
    """Print the events as they come, until QEMU hangs up."""
    import json

    path = os.environ["STANDIN_EVENTS"]
    talk = Talk(path)
    os.close(os.open(f"{path}.listening", os.O_CREAT))
    for event in map(json.loads, talk.lines):
        stamp = event["timestamp"]
        when = f"{stamp['seconds']}.{stamp['microseconds']:06}"
        data = json.dumps(event["data"]) if "data" in event else "<null>"
        sys.stdout.write(f"event {event['event']} at {when} for domain '{domain}': {data}\n")
        sys.stdout.flush()


class Talk:
    """A connection to QEMU, ready for commands, and the lines that it says from then on."""

    def __init__(self, path: str) -> None:
        self.connection = _socket.socket(_socket.AF_UNIX)
        self.connection.connect(path)
        self.lines = os.fdopen(self.connection.fileno(), closefd=False)
        self.lines.readline()
        self.connection.sendall(b'{"execute": "qmp_capabilities"}')
        self.lines.readline()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
