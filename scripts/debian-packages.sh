#!/usr/bin/env bash
# Install Debian packages where that is allowed; where it is not, print the command that does.
#
#   scripts/debian-packages.sh PACKAGE ...       packages that are there already cost nothing
#
# The exit status is 1 when a package is still missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

missing=()
for package in "$@"; do
    state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [[ $state == installed ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

if ! command -v apt-get >/dev/null; then
    cat <<END
pvclock: this system has no apt-get. Install what Debian calls
    ${missing[*]}
and run make again.
END
    exit 1
fi

as_root=()
if ((EUID != 0)); then
    as_root=(sudo -n)
    if ! sudo -n true 2>/dev/null; then
        cat <<END
pvclock: not root, and no sudo without a password. Run as root:
    apt-get update && apt-get install -y ${missing[*]}
END
        exit 1
    fi
fi

# env: sudo drops the caller's variables.
apt_get=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q)
scripts/step.sh "update Debian's package lists" "${apt_get[@]}" update
scripts/step.sh "install ${missing[*]}" "${apt_get[@]}" install -y --no-install-recommends "${missing[@]}"
