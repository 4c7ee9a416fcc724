#!/usr/bin/env bash
# Makes istiod an authority below the root of OpenBao: prints its Secret `cacerts` with an intermediate of its own. istiod then signs for
# workloads and keeps deciding which node may have which identity; OpenBao is asked once in the life of the intermediate.
#
#   deploy/openbao/cacerts.sh | kubectl apply -f - && kubectl -n istio-system rollout restart deployment/istiod
#
# Needs openssl and `bao` as setup.sh does, which comes first. ROOT (pki-root), TTL (8760h).
set -euo pipefail
umask 077
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out "$work/key"
openssl req -new -key "$work/key" -subj "/CN=istiod" -out "$work/csr"
bao write -field=certificate "${ROOT:-pki-root}/root/sign-intermediate" csr=@"$work/csr" use_csr_values=false \
  common_name=istiod max_path_length=0 ttl="${TTL:-8760h}" >"$work/certificate"
bao read -field=certificate "${ROOT:-pki-root}/cert/ca" >"$work/root"

entry() {
  printf '  %s: %s\n' "$1" "$(base64 -w0)"
}

cat <<'SECRET'
apiVersion: v1
kind: Secret
metadata:
  name: cacerts
  namespace: istio-system
type: Opaque
data:
SECRET
entry ca-cert.pem <"$work/certificate"
entry ca-key.pem <"$work/key"
entry root-cert.pem <"$work/root"
{ cat "$work/certificate"; echo; cat "$work/root"; } | entry cert-chain.pem
