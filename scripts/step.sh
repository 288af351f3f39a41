#!/usr/bin/env bash
# Run a command as one line of progress; what it printed is shown only when it fails.
#
#   scripts/step.sh WHAT COMMAND [ARGUMENT ...]

printf '  %s\n' "$1"
output=$("${@:2}" 2>&1 </dev/null)
status=$?
if ((status)); then
    printf '%s\n' "$output" "FAILED ($status): ${*:2}" >&2
fi
exit "$status"
