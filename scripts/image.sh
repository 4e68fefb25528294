#!/usr/bin/env bash
# Builds the Dockerfile with buildah, on a base that debootstrap makes from this machine's apt mirror, and starts the
# result once. Needs root, and no daemon or image registry. The base is kept in the cache directory for a month.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 022

suite=bookworm
tag=${TAG:-share-manager:latest}
cache=${XDG_CACHE_HOME:-/var/cache}/share-manager/image
base_tar=$cache/base-$suite-$(dpkg --print-architecture)-$(date +%Y%m).tar
work=$(mktemp -d)
storage=(--root "$cache/storage" --runroot "$work/run" --storage-driver vfs)
container=""

say() { printf 'image: %s\n' "$*" >&2; }

cleanup() {
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

if [[ ! -e $base_tar ]]; then
    say "making the base with debootstrap"
    main=$(mirror_of $suite)
    [[ -n $main ]] || { say "no apt source of this machine has the suite $suite" && exit 1; }
    debootstrap --variant=minbase "$suite" "$work/base" "$main" >"$work/log" 2>&1 || { cat "$work/log" >&2 && exit 1; }
    security=$(mirror_of $suite-security)
    [[ -z $security ]] || echo "deb $security $suite-security main" >>"$work/base/etc/apt/sources.list"
    rm -rf "$work"/base/var/cache/apt/* "$work"/base/var/lib/apt/lists/* "$work"/base/usr/share/{doc,man,locale}/*
    rm -f "$cache"/base-"$suite"-*.tar
    tar -C "$work/base" -cf "$base_tar.part" .
    mv "$base_tar.part" "$base_tar"
    rm -rf "$work/base"
fi

say "building $tag"
container=$(buildah "${storage[@]}" from scratch)
buildah "${storage[@]}" add --quiet "$container" "$base_tar" / >/dev/null
buildah "${storage[@]}" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
buildah "${storage[@]}" commit --quiet --rm "$container" localhost/share-manager-base >/dev/null
container=""

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
buildah "${storage[@]}" build --quiet --isolation chroot --layers=false --build-arg BASE=localhost/share-manager-base \
    "${mounts[@]}" --tag "$tag" . >"$work/log" 2>&1 || { tail -n 60 "$work/log" >&2 && exit 1; }

container=$(buildah "${storage[@]}" from --pull-never "$tag")
# as a runtime would: the entry point of the image's own configuration
entry=$(buildah "${storage[@]}" inspect --type container --format '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}' "$container")
buildah "${storage[@]}" run --isolation chroot "$container" -- $entry --help >"$work/help" 2>&1 || { cat "$work/help" >&2 && exit 1; }
grep -qw serve "$work/help" || { cat "$work/help" >&2 && say "the entry point shows no 'serve' command" && exit 1; }
buildah "${storage[@]}" run --isolation chroot "$container" -- sh -c 'for program in ganesha.nfsd mkfs.ext4 mkfs.xfs losetup dbus-daemon nft ip; do command -v $program >/dev/null || { echo "image: $program is missing"; exit 1; }; done' >&2
size=$(buildah "${storage[@]}" images --format '{{.Size}}' "$tag")
say "built $tag ($size); '${entry% } --help' starts"
buildah "${storage[@]}" rm "$container" >/dev/null
container=""
# dangling layers of earlier builds
buildah "${storage[@]}" rmi --prune >/dev/null 2>&1 || true
