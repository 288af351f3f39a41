#!/usr/bin/env bash
# Make the virtual environment with everything that building, testing and running pvclock needs.
#
#   PYTHON=python3 VENV=.venv scripts/make-venv.sh
#
# An environment of the same Python is brought up to date; one of another Python, or a broken one, is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${PYTHON:=python3}" "${VENV:=.venv}"

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
includes() { printf '#include <%s>\n' "$1" | cc -E -x c "${@:2}" - >/dev/null 2>&1; }

version=$(version_of "$PYTHON") || { echo "pvclock: $PYTHON does not run; name another: make PYTHON=python3.12"; exit 1; }
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "pvclock: $PYTHON is Python $version, 3.11 or newer is needed; name another: make PYTHON=python3.12"
    exit 1
fi

# What a fresh system may lack, and what cannot be done without it.
missing=()
lacks() { printf 'pvclock: %s is missing: %s\n' "$1" "$2"; missing+=("$1"); }
command -v cc >/dev/null || lacks gcc "no extension module can be built"
command -v as >/dev/null || lacks binutils "no extension module can be built"
includes stdlib.h || lacks libc6-dev "no extension module can be built"
includes linux/kvm.h || lacks linux-libc-dev "pvclock.kvm cannot be built"
headers=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[[ -e $headers/Python.h ]] || lacks "python$version-dev" "no extension module can be built"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || lacks "python$version-venv" "nothing can be installed or run"
if ((${#missing[@]})); then
    scripts/debian-packages.sh "${missing[@]}" || true  # go on: the step that cannot be done says so itself
fi

if [[ $(version_of "$VENV/bin/python" || true) != "$version" ]]; then
    scripts/step.sh "make $VENV with Python $version" "$PYTHON" -m venv --clear "$VENV"
fi

pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
mapfile -t build_requires < <("$VENV/bin/python" - <<'END'
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")
END
)
scripts/step.sh "install ${build_requires[*]}" "${pip[@]}" "${build_requires[@]}"
scripts/step.sh "install pvclock and its tools" "${pip[@]}" --no-build-isolation --editable '.[test,lab,plot,prometheus]'
