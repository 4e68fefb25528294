#!/usr/bin/env bash
# Builds kube-apiserver and kube-controller-manager for the tests out of Debian's source package, with apt alone, and
# keeps them in the cache directory. Says nothing when they are there, or when KUBEBUILDER_ASSETS names newer ones.
# `scripts/kube.sh --print` prints the directory that has them.
set -euo pipefail
umask 022

suite=bookworm
package=kubernetes
version=1.20.5+really1.20.2-1.1+deb12u1
upstream=v1.20.2
programs=(kube-apiserver kube-controller-manager)
# what is built differs from the package by what is done below: count it up with every change there
build=2
go=/usr/lib/go-1.19
cache=${XDG_CACHE_HOME:-/var/cache}/share-manager/kube
there=$cache/$upstream-$build

if [[ ${1:-} == --print ]]; then
    printf '%s\n' "${KUBEBUILDER_ASSETS:-$there}"
    exit
fi

say() { printf 'kube: %s\n' "$*" >&2; }
die() { say "$*" && exit 1; }

if [[ -n ${KUBEBUILDER_ASSETS:-} ]]; then
    [[ -x $KUBEBUILDER_ASSETS/kube-apiserver ]] || die "there is no kube-apiserver in KUBEBUILDER_ASSETS=$KUBEBUILDER_ASSETS"
    exit
fi
complete() { local program && for program in "${programs[@]}"; do [[ -x $there/$program ]] || return 1; done; }
complete && exit
command -v apt-get >/dev/null || die "not a Debian system: name a directory with kube-apiserver and kube-controller-manager by KUBEBUILDER_ASSETS="
[[ -x $go/bin/go ]] || die "there is no $go: apt-get install golang-1.19-go"

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
complete && exit

# what a build that was killed left, its caches are read-only
{ chmod -R u+w "$cache"/build-* && rm -rf "$cache"/build-*; } 2>/dev/null || true
work=$(mktemp -d "$cache/build-XXXXXX")
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT
say "building ${programs[*]} $upstream from Debian's source package, once: this takes some minutes"

# Sources of their own, so that the machine's are left as they are: those of its mirror, as source.
mkdir -p "$work"/{lists/partial,archives/partial,download,bin}
{ find /etc/apt/sources.list* -type f -exec cat {} + 2>/dev/null || true; } | awk -v suite="$suite" '
    function say(uri, name) { print "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]", uri, name, "main" }
    /^deb / { sub(/\[[^]]*\] */, ""); if (index($3, suite) == 1) say($2, $3) }
    /^URIs:/ { uri = $2 }
    /^Suites:/ { for (i = 2; i <= NF; i++) if (index($i, suite) == 1) say(uri, $i) }' | sort -u >"$work/sources.list"
[[ -s $work/sources.list ]] || die "no apt source of this machine has the suite $suite"
apt=(apt-get -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$work/lists"
    -o Dir::Cache="$work" -o APT::Sandbox::User=root -o Acquire::Retries=3)

log=$work/log
build() {
    "${apt[@]}" update
    (cd "$work/download" && "${apt[@]}" source --download-only "$package=$version")
    export GOROOT=$go GOPATH=$work/go GOCACHE=$work/cache GO111MODULE=off GOFLAGS= CGO_ENABLED=0 PATH=$go/bin:$PATH
    local source=$GOPATH/src/k8s.io/kubernetes packages flags="-s -w" one
    mkdir -p "$source"
    tar -xzf "$work/download/${package}_"*.orig.tar.gz --strip-components=1 -C "$source"
    cd "$source"
    # the vendored reflect2 1.0.1 crashes with Go 1.18 and newer
    rm -rf vendor/github.com/modern-go/reflect2
    cp -rL /usr/share/gocode/src/github.com/modern-go/reflect2 vendor/github.com/modern-go/
    # the one generated file that is not in the source package
    go build -p 2 -o "$work/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
    packages=$(grep -rl --include='*.go' '+k8s:openapi-gen=' \
        vendor/k8s.io/{api,apimachinery,apiserver,apiextensions-apiserver,client-go,cloud-provider,component-base,controller-manager,kube-aggregator,kube-controller-manager,kube-proxy,kube-scheduler,kubelet,metrics} pkg \
        | grep -v -e _test.go -e zz_generated -e testdata | xargs -n1 dirname | LC_ALL=C sort -u | sed 's#^#k8s.io/kubernetes/#' | paste -sd,)
    "$work/openapi-gen" --logtostderr -i "$packages" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi \
        -h vendor/k8s.io/code-generator/hack/boilerplate.go.txt -r /dev/null
    for one in component-base/version client-go/pkg/version; do
        one=k8s.io/kubernetes/vendor/k8s.io/$one
        flags+=" -X $one.gitVersion=$upstream -X $one.gitMajor=1 -X $one.gitMinor=20"
    done
    for one in "${programs[@]}"; do
        # the clients of cloud providers are a third of the work
        go build -p 2 -tags providerless -ldflags "$flags" -o "$work/bin/$one" "./cmd/$one"
    done
}
# not `if ! build`, within which a failure would not end it
set +e
(set -e && renice -n 10 $BASHPID >/dev/null && build) >"$log" 2>&1 </dev/null
status=$?
set -e
if ((status != 0)); then
    tail -n 40 "$log" >&2
    die "they could not be built"
fi
rm -rf "$there"
mv "$work/bin" "$there"
say "built $there"
