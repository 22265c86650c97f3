#!/usr/bin/env bash
# Makes etcd and programs of Kubernetes in a folder: from Debian 12's packages and its source package of Kubernetes, the
# last of Debian's that has the server. Installs nothing; takes some minutes and 2 GB meanwhile, or 5 GB for all programs.
#
# Usage: build.sh FOLDER PROGRAM... (kube-apiserver, kubelet, and so on)
set -euo pipefail
. "$(dirname "$0")"/../debian/apt.sh

folder=$1
shift
work=$folder.building
tree=$work/gopath/src/k8s.io/kubernetes

command -v openssl >/dev/null || { echo "openssl is missing: apt-get install openssl" >&2; exit 1; }

rm -rf "$work"
mkdir -p "$work"/debs
private_apt "$work"/apt bookworm
cd "$work"/debs
unpack "$work"/debian golang-1.19-go golang-1.19-src golang-github-modern-go-reflect2-dev etcd-server
apt source --download-only kubernetes
mkdir -p "${tree%/*}"
tar -xf kubernetes_*.orig.tar.gz -C "$work"
source=$(echo "$work"/kubernetes-*)
ln -s "$source" "$tree"

export GOROOT=$work/debian/usr/lib/go-1.19 GOPATH=$work/gopath GOCACHE=$work/gocache
export GO111MODULE=off CGO_ENABLED=0
go() { nice -n 10 "$GOROOT"/bin/go "$@"; }

# The bundled one reads the Go runtime's tables as they were before Go 1.18.
rm -rf "$source"/vendor/github.com/modern-go/reflect2
cp -r "$work"/debian/usr/share/gocode/src/github.com/modern-go/reflect2 "$source"/vendor/github.com/modern-go/

# The one generated file that the source package lacks.
cd "$tree"
vendor=k8s.io/kubernetes/vendor
go build -o "$work"/openapi-gen $vendor/k8s.io/kube-openapi/cmd/openapi-gen
described=$(grep -rl --include='*.go' --exclude-dir=testdata --exclude-dir=_examples --exclude-dir=code-generator \
    --exclude-dir=sample-apiserver '+k8s:openapi-gen=' pkg staging/src | xargs -n 1 dirname | sort -u |
    sed -e "s,^staging/src/,$vendor/," -e 's,^pkg/,k8s.io/kubernetes/pkg/,' | paste -sd ,)
"$work"/openapi-gen -i "$described" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi \
    -h hack/boilerplate/boilerplate.generatego.txt -r "$work"/violations

version=v${source##*/kubernetes-}
names="-X $vendor/k8s.io/component-base/version.gitVersion=$version -X $vendor/k8s.io/client-go/pkg/version.gitVersion=$version"
mkdir "$work"/programs
# Without the clouds' own code, and that for Docker, which is a third of it and has no part in the tests.
go build -tags providerless,dockerless -ldflags "-s -w $names" -o "$work"/programs/ "${@/#/k8s.io/kubernetes/cmd/}"

rm -rf "$folder"
mkdir -p "$folder"
# What signs the tokens of service accounts; good for tests on loopback and nothing else.
openssl genrsa -out "$work"/service-account.key 2048
mv "$work"/service-account.key "$work"/programs/* "$work"/debian/usr/bin/etcd "$folder"
rm -rf "$work"
