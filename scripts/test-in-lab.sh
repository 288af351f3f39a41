#!/usr/bin/env bash
# Run the tests on real vCPUs and on QEMU inside the lab, once in each of its clock regimes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${VENV:-.venv}/bin
status=0

in_lab() {  # MARKERS, then options of `pvclock lab`
    "$bin/pvclock" lab --timeout 1500 "${@:2}" -- python -m pytest -q -p no:cacheprovider -m "$1" || status=1
}

in_lab "(kvm or qemu) and not lab"
in_lab "(kvm or qemu) and not lab" --cpus 2 --tsc-reliable
in_lab "kvm and not qemu and not lab" --cpus 2  # TSCs unstable: QEMU's page would be late, and the cross-check say so
exit "$status"
