#!/usr/bin/env bash
# Builds the Dockerfile with buildah, on a base that debootstrap makes from this machine's apt mirror, and starts the
# result once. Needs root, and no daemon or image registry. The base is kept in the cache directory for a month; layers
# are not, as this storage driver copies them whole.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 022

suite=bookworm
tag=${TAG:-share-manager:latest}
cache=${XDG_CACHE_HOME:-/var/cache}/share-manager/image
base=localhost/share-manager-base:$suite-$(date +%Y%m)
work=$(mktemp -d)
storage=(--root "$cache/storage" --runroot "$work/run" --storage-driver vfs)
container=""
server=""

say() { printf 'image: %s\n' "$*" >&2; }

cleanup() {
    if [[ -n $server ]]; then
        kill -TERM "$server" 2>/dev/null && wait "$server" || true
    fi
    [[ -z $container ]] || buildah "${storage[@]}" rm "$container" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap cleanup EXIT

((EUID == 0)) || { say "run as root" && exit 1; }
mkdir -p "$cache"

# prints the URI of the first apt source that has the suite $1
mirror_of() {
    { find /etc/apt/sources.list* -type f -exec cat {} + 2>/dev/null || true; } | awk -v suite="$1" '
        /^deb / { sub(/\[[^]]*\] */, ""); if ($3 == suite) { print $2; exit } }
        /^URIs:/ { uri = $2 }
        /^Suites:/ { for (i = 2; i <= NF; i++) if ($i == suite) { print uri; exit } }'
}

if [[ -z $(buildah "${storage[@]}" images --quiet --filter "reference=$base") ]]; then
    say "making the base with debootstrap"
    main=$(mirror_of $suite)
    [[ -n $main ]] || { say "no apt source of this machine has the suite $suite" && exit 1; }
    debootstrap --variant=minbase "$suite" "$work/base" "$main" >"$work/log" 2>&1 || { cat "$work/log" >&2 && exit 1; }
    security=$(mirror_of $suite-security)
    [[ -z $security ]] || echo "deb $security $suite-security main" >>"$work/base/etc/apt/sources.list"
    rm -rf "$work"/base/var/cache/apt/* "$work"/base/var/lib/apt/lists/* "$work"/base/usr/share/{doc,man,locale}/*
    tar -C "$work/base" -cf "$work/base.tar" .
    rm -rf "$work/base"
    # an older month's
    buildah "${storage[@]}" rmi --all --force >/dev/null 2>&1 || true
    container=$(buildah "${storage[@]}" from scratch)
    buildah "${storage[@]}" add --quiet "$container" "$work/base.tar" / >/dev/null
    rm "$work/base.tar"
    buildah "${storage[@]}" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah "${storage[@]}" commit --quiet --rm "$container" "$base" >/dev/null
    container=""
fi

say "building $tag"
# pip in the build is given this machine's settings, by mounts that leave no trace in the image
printf '[global]\n' >"$work/pip.conf"
"${VENV:-.venv}/bin/python" -m pip config list \
    | sed -nE "s/^(global|install|:env:)\.(index-url|extra-index-url|trusted-host)='(.*)'\$/\2 = \3/p" >>"$work/pip.conf"
mounts=(--volume "$work/pip.conf:/etc/pip.conf:ro")
authorities=/etc/ssl/certs/ca-certificates.crt
if [[ -e $authorities ]]; then
    echo "cert = /run/host-authorities.crt" >>"$work/pip.conf"
    mounts+=(--volume "$authorities:/run/host-authorities.crt:ro")
fi
buildah "${storage[@]}" build --quiet --isolation chroot --layers=false --build-arg BASE="$base" \
    "${mounts[@]}" --tag "$tag" . >"$work/log" 2>&1 || { tail -n 60 "$work/log" >&2 && exit 1; }

container=$(buildah "${storage[@]}" from --pull-never "$tag")
root=$(buildah "${storage[@]}" mount "$container")
# as a runtime would: the entry point of the image's own configuration
entry=$(buildah "${storage[@]}" inspect --type container --format '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}' "$container")
path=$(buildah "${storage[@]}" inspect --type container --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container" | grep '^PATH=')
port=$("${VENV:-.venv}/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

# A whole share from nothing but what the image has. Its mounts end with their namespace.
unshare --mount --propagation private bash -c '
    root=$1 && shift
    mount --bind /dev "$root/dev" && mount -t proc proc "$root/proc" && mount -t sysfs sysfs "$root/sys" &&
        mount -t tmpfs tmpfs "$root/run" && exec chroot "$root" env -i "$@"' _ "$root" \
    "$path" $entry serve image-check --size 128Mi --data-dir /srv --port "$port" --output json \
    >"$work/serve" 2>"$work/serve.err" </dev/null &
server=$!
for ((tries = 0; tries < 600; tries++)); do
    grep -q '"event":"ready"' "$work/serve" && break
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
done
kill -TERM "$server" 2>/dev/null || true
status=0
wait "$server" || status=$?
server=""
if ((status != 0)) || ! grep -q '"event":"ready"' "$work/serve"; then
    cat "$work/serve" "$work/serve.err" >&2
    say "the image does not serve (exit status $status)"
    exit 1
fi
size=$(buildah "${storage[@]}" images --format '{{.Size}}' "$tag")
say "built $tag ($size); it served a volume"
buildah "${storage[@]}" umount "$container" >/dev/null
buildah "${storage[@]}" rm "$container" >/dev/null
container=""
# what earlier builds left
buildah "${storage[@]}" rmi --prune >/dev/null 2>&1 || true
