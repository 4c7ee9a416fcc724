#!/usr/bin/env bash
# Makes a cluster of kind with Istio ambient, Culvert in the place of ztunnel, and the pods of workloads.yaml.
#
#   up.sh [IMAGE_ARCHIVE]     of `make image`; with PROXY=ztunnel the upstream proxy instead
#
# Needs docker, kind, kubectl and helm. ISTIO: version of Istio. down.sh removes all of it.
set -euo pipefail
cd "$(dirname "$0")"
proxy=${PROXY:-culvert} istio=${ISTIO:-1.32.0} cluster=culvert
charts=https://istio-release.storage.googleapis.com/charts

kind get clusters 2>/dev/null | grep -qx "$cluster" || kind create cluster --config cluster.yaml --wait 3m
kubectl config use-context "kind-$cluster"

install() {
  helm upgrade --install "$@" --namespace istio-system --create-namespace --wait --timeout 5m
}
upstream() {
  install "$1" "$2" --repo "$charts" --version "$istio" "${@:3}"
}
upstream istio-base base -f ../istio/base.yaml
upstream istio-cni cni -f ../istio/cni.yaml
upstream istiod istiod -f ../istio/istiod.yaml
case $proxy in
  culvert)
    archive=${1:-$(find ../../target/image -name 'culvert-*-amd64.tar' 2>/dev/null | sort | tail -n 1)}
    [ -n "$archive" ] || { echo "no image: run 'make image' first, or name its archive" >&2; exit 1; }
    kind load image-archive "$archive" --name "$cluster"
    helm uninstall ztunnel --namespace istio-system --ignore-not-found --wait
    install culvert ../chart -f ../manifests/overlays/kind/values.yaml
    ;;
  ztunnel)
    helm uninstall culvert --namespace istio-system --ignore-not-found --wait
    upstream ztunnel ztunnel --set profile=ambient
    ;;
  *)
    echo "PROXY=$proxy: not one of culvert, ztunnel" >&2
    exit 2
    ;;
esac
kubectl apply -f workloads.yaml
kubectl -n mesh wait --for=condition=Ready pod --all --timeout=3m
kubectl -n direct wait --for=condition=Ready pod --all --timeout=3m
