#!/usr/bin/env bash
# Installs what `make serve` (run) or `make test` (test) needs on Debian: packages, then a virtual environment.
# Says, writes and fetches nothing when all of it is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 022

kind=${1:-}
case $kind in
    run) lists=(runtime build) extra="" ;;
    test) lists=(runtime node build test) extra="[dev]" ;;
    *) echo "usage: scripts/setup.sh run|test" >&2 && exit 2 ;;
esac
python=${PYTHON:-/usr/bin/python3}
venv=${VENV:-.venv}

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*" && exit 1; }

listed() { for list in "${lists[@]}"; do sed 's/#.*//' "deploy/apt/$list.txt"; done | xargs -n1; }

installed() {
    dpkg-query --show --showformat='${Package} ${db:Status-Status}\n' "$@" 2>/dev/null | sed -n 's/ installed$//p'
}

missing_packages() {
    local wanted
    mapfile -t wanted < <(listed)
    comm -23 <(printf '%s\n' "${wanted[@]}" | sort -u) <(installed "${wanted[@]}" | sort -u)
}

# The packages of ganesha and rpcbind start services that listen on 2049 and 111. Services that this installation brings
# are kept from starting; those that were there before are left alone.
policy=${POLICY_RC_D:-/usr/sbin/policy-rc.d}
hold_back_services() {
    [[ -e $policy ]] && return
    trap 'rm -f "$policy"' EXIT
    cat >"$policy" <<'POLICY'
#!/bin/sh
case "$1" in
    nfs-ganesha*|rpcbind*|nfs-common*|rpc-statd*) exit 101 ;;
esac
exit 0
POLICY
    chmod 755 "$policy"
}

disable_new_services() {
    command -v systemctl >/dev/null || return 0
    local unit units=()
    [[ " $1 " == *" nfs-ganesha "* ]] && units+=(nfs-ganesha.service nfs-ganesha-lock.service)
    [[ " $1 " == *" rpcbind "* ]] && units+=(rpcbind.socket rpcbind.service)
    for unit in "${units[@]}"; do
        systemctl --quiet --now disable "$unit" >/dev/null 2>&1 || true
    done
    ((${#units[@]} == 0)) || say "left disabled: ${units[*]} (share-manager starts a ganesha of its own and needs no rpcbind)"
}

install_packages() {
    local service fresh="" missing=("$@")
    ((EUID == 0)) || die "run as root, or first: apt-get install ${missing[*]}"
    for service in nfs-ganesha rpcbind; do
        [[ -n $(installed "$service") ]] || fresh+=" $service"
    done
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
    local apt=(apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3) log
    log=$(mktemp)
    hold_back_services
    if ! { "${apt[@]}" update && "${apt[@]}" install --yes --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null; then
        cat "$log" >&2
        rm -f "$log"
        die "apt-get could not install them"
    fi
    rm -f "$log"
    disable_new_services "$fresh"
    # ganesha finds the filesystem of an export there; containers and minimal systems may lack it
    [[ -e /etc/mtab ]] || ln -s /proc/self/mounts /etc/mtab
}

if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]} == 0)) || install_packages "${missing[@]}"
fi

# what is compiled has to be compiled again when it was changed
compiled() { sed -n 's/^    "\(engine.*\)",$/\1/p' setup.py; }
fingerprint() {
    { compiled | xargs cat setup.py ganesha/wake.c pyproject.toml constraints.txt && "$venv/bin/python" --version && pwd; } |
        sha256sum | cut -d' ' -f1
}
stamp() { printf '%s/.share-manager-%s' "$venv" "$1"; }

if ! "$venv/bin/python" -c "" 2>/dev/null; then
    command -v "$python" >/dev/null || die "there is no $python: install Python 3.11 or newer, or name one with PYTHON="
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$python is older than Python 3.11: name another with PYTHON="
    say "creating $venv"
    "$python" -m venv --clear "$venv"
fi

want=$(fingerprint)
if [[ $(cat "$(stamp $kind)" 2>/dev/null) != "$want" ]]; then
    command -v apt-get >/dev/null || say "not a Debian system: the equivalents of these packages must be there: $(listed | xargs)"
    say "installing Python packages into $venv"
    "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt -e ".$extra"
    rm -f "$(stamp run)" "$(stamp test)"
    # an environment for the tests can also serve
    [[ $kind == run ]] || printf '%s\n' "$want" >"$(stamp test)"
    printf '%s\n' "$want" >"$(stamp run)"
fi

[[ $kind == run ]] || scripts/kube.sh
