#!/usr/bin/env bash
# Run the tests on real vCPUs and on QEMU inside the lab: all of them where its kernel trusts its TSCs, with one CPU and
# with two; with unstable TSCs those that do not hold a guest's readings to ns, for there KVM moves guests' TSCs by us.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${VENV:-.venv}/bin
status=0

in_lab() {  # options of `pvclock lab`, --, and what to test
    local options=()
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    "$bin/pvclock" lab --timeout 1500 "${options[@]}" -- \
        python -m pytest -q -p no:cacheprovider -m "(kvm or qemu) and not (lab or each_line)" "${@:2}" || status=1
}

in_lab --
in_lab --cpus 2 --tsc-reliable --
in_lab --cpus 2 -- tests/kvm/test_{capabilities,descriptors,differential,exits,guest_tsc,ioctls,machine,runner,steal_time,tsc_sync,execution_time_machine}.py \
    tests/kvm/test_guest_reads.py::test_stable_taken_from_running_guests tests/qemu/test_launch.py
exit "$status"
