#!/usr/bin/env bash
# Run the tests on real vCPUs and on QEMU inside the lab, where its kernel trusts its TSCs, on one CPU or on two; and with
# unstable TSCs those that do not hold a guest's readings to ns, for there KVM moves guests' TSCs by us.
# Two labs run at a time, because each keeps one CPU of this machine busy.
# With one CPU the lab's kernel trusts its TSC by itself, until its watchdog finds it late beside another clock, which a
# busy machine may bring about: --tsc-reliable keeps the watchdog out.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${VENV:-.venv}/bin
marks="(kvm or qemu) and not (lab or web or each_line)"
[[ -c /dev/kvm ]] && marks+=" and not long"  # this host has run those itself

# Found and compiled here: each process in the lab would compile all it imports, and forget it.
mapfile -t files < <(
    env -u PYTHONDONTWRITEBYTECODE "$bin/python" -m pytest --collect-only -q -m "$marks" | sed -n 's/::.*//p' | sort -u
)
((${#files[@]})) || exit 1
# How QEMU is reached, and what a watch, a drift or a run says to its user, does not depend on the host's KVM, nor does a
# report.
# A stock Linux hangs in a lab with two CPUs more often than not, and has a lab of its own.
linux=(tests/qemu/test_{watch_linux,doctor_guest_linux}.py tests/kvm/test_stock_linux*.py)
under_hand=($(printf '%s\n' "${linux[@]}" | grep -E '_(qmp|schedule|travel)\.py'))  # time commands and time travel
linux=($(printf '%s\n' "${linux[@]}" | grep -vE '_(qmp|schedule|travel)\.py'))
files=($(printf '%s\n' "${files[@]}" | grep -vE 'tests/(qemu/test_(qmp_.*|watch.*|drift|report|doctor_guest_linux)|kvm/test_(drift|run_command|qmp_.*|watch_by_qmp|machine_budget|stock_linux.*))\.py'))
# Two CPUs for what is about vCPUs that run at once; one for all else.
at_once='kvm/test_(differential|following|guest_(reads|tsc)|hvprobe|hyperv_(differential|machine)|interrupts|machine_clock|probe_offsets|runner|side_by_side_machine|steal_time|time_operations|tsc_sync|watched_machine)\.py|qemu/test_(crosscheck|probe_offsets_qemu)\.py|stress/'
on_two=($(printf '%s\n' "${files[@]}" | grep -E "tests/($at_once)"))
on_one=($(printf '%s\n' "${files[@]}" | grep -vE "tests/($at_once)"))
"$bin/python" -m compileall -q pvclock qemu_glue
"$bin/python" -c "
from pvclock.lab.kernel import find_kernel
from tests.guest_programs import compile_all
from tests.kvm.stock_linux import uncompressed
compile_all(), uncompressed(find_kernel(None, print))" || exit 1

in_lab() {  # options of `pvclock lab`, --, and what to test
    local options=()
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    "$bin/pvclock" lab --timeout 2400 "${options[@]}" -- python -m pytest -q --durations=15 -o faulthandler_timeout=600 -p no:cacheprovider -m "$marks" "${@:2}"
}

output=$(mktemp)
trap 'rm -f "$output"' EXIT
{
    in_lab --cpus 2 --tsc-reliable -- -k "not clang" "${on_two[@]}"
    behind=$?
    in_lab --tsc-reliable -- "${under_hand[@]}" || behind=1
    in_lab --cpus 2 -- tests/kvm/test_{capabilities,descriptors,differential,exits,guest_tsc,hyperv_differential,ioctls,machine,runner,steal_time,tsc_sync,execution_time_machine}.py \
        tests/kvm/test_guest_reads.py::test_stable_taken_from_running_guests tests/qemu/test_launch.py && (exit "$behind")
} >"$output" 2>&1 &
status=0
# Long tests, and clang's twins of gcc's, are left to this machine.
in_lab --tsc-reliable -- -m "$marks and not long" -k "not clang" "${on_one[@]}" || status=1
in_lab --tsc-reliable -- "${linux[@]}" || status=1
wait $! || status=1
cat "$output"
exit "$status"
