"""The script that runs inside the lab: loads KVM, runs the command and reports over three serial ports."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["PORTS", "inner_script"]

PORTS = ("pvclock.stdout", "pvclock.stderr", "pvclock.report")
"""Names of the virtio serial ports; the report has lines: ready, failed WHY, or exit STATUS."""

SCRIPT = """\
# The ports are found by name in /sys, as without udev nothing makes links.
port() {{
    for folder in /sys/class/virtio-ports/*; do
        if [ -e "$folder/name" ] && [ "$(cat "$folder/name")" = "$1" ]; then echo "/dev/${{folder##*/}}"; fi
    done
}}
exec 3>"$(port pvclock.report)"
failed() {{ echo "failed $*" >&3; sleep 60; exit 1; }}

# A port is opened by one process at a time, while a command may open /dev/stderr as often as it likes: cats between.
mkfifo /run/lab.stdout /run/lab.stderr || failed "no pipes in /run"
for stream in stdout stderr; do
    {{ cat "/run/lab.$stream"; printf %s {end}; }} >"$(port "pvclock.$stream")" 2>/dev/null 3>&- &
done
exec 4>/run/lab.stdout 5>/run/lab.stderr
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
mountpoint -q /tmp || mount -t tmpfs -o mode=1777 tmpfs /tmp || failed "no /tmp"

modprobe kvm_amd || failed "modprobe kvm_amd: $?"
chmod 0666 /dev/kvm || failed "no /dev/kvm"
{environment}
cd {cwd} || failed "no folder" {cwd}
echo ready >&3
# Not in the background: there a shell makes a command ignore SIGINT.
setsid --wait sh -c 'echo $$ >/run/lab.group; exec "$@"' sh {command} </dev/null >&4 2>&5 3>&- 4>&- 5>&-
status=$?
kill -KILL -- "-$(cat /run/lab.group)" 2>/dev/null  # a process that it left running would keep its outputs open
echo "exit $status" >&3
exec 4>&- 5>&-
sleep 60
"""


def inner_script(command: Sequence[str], environment: Mapping[str, str], cwd: Path, end: str) -> str:
    """Write the script that runs `command`; `end` follows the last byte of each of its output streams."""
    exports = (f"export {shlex.quote(f'{name}={value}')}" for name, value in environment.items() if name.isidentifier())
    return SCRIPT.format(
        command=shlex.join(command),
        environment="\n".join(exports),
        cwd=shlex.quote(str(cwd)),
        end=shlex.quote(end),
    )
