#!/usr/bin/env bash
# Run the tests on real vCPUs and on QEMU inside the lab, once in each of its clock regimes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${VENV:-.venv}/bin
status=0

in_lab() {  # options of `pvclock lab`
    "$bin/pvclock" lab --timeout 1500 "$@" -- python -m pytest -q -p no:cacheprovider -m "(kvm or qemu) and not lab" ||
        status=1
}

in_lab
in_lab --cpus 2 --tsc-reliable
in_lab --cpus 2 # its TSCs unstable
exit "$status"
