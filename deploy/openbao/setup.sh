#!/usr/bin/env bash
# Sets up an OpenBao (or Vault) server as authority of the mesh. It may run again: what is there stays, roles and policies are written
# anew. Needs `bao` with BAO_ADDR, BAO_TOKEN and, for a private root, BAO_CACERT; from the environment also:
#
#   LOGIN         kubernetes    the proxy logs in as istio-system/ztunnel; its token may then be any workload of the trust domain
#                 workload      each workload logs in with the token of its own account, and signs for nobody else
#                 cert-manager  cert-manager signs, for istio-csr; the proxy does not talk to OpenBao
#                 none          no login is set up
#   TRUST_DOMAIN      cluster.local
#   ROOT, MESH        pki-root, pki-mesh: the engines with the root and with the intermediate that signs
#   KUBERNETES_HOST   https://kubernetes.default.svc
#   KUBERNETES_CA, REVIEWER_JWT   files, where OpenBao runs outside of the cluster: roots of the API server; a token that may review others
#   JWT_KEYS          file with the public keys that tokens are signed with (LOGIN=workload), instead of asking KUBERNETES_HOST for them
set -euo pipefail

login=${LOGIN:-kubernetes} domain=${TRUST_DOMAIN:-cluster.local} root=${ROOT:-pki-root} mesh=${MESH:-pki-mesh}
kubernetes=${KUBERNETES_HOST:-https://kubernetes.default.svc}

engine() {
  bao read "sys/mounts/$1" >/dev/null 2>&1 && return
  bao secrets enable -path="$1" -max-lease-ttl=43800h pki
}

method() {
  bao read "sys/auth/$1" >/dev/null 2>&1 || bao auth enable "$1"
}

issuers() {
  bao list "$1/issuers" >/dev/null 2>&1
}

# What may be signed: a request's own URIs within `allowed_uri_sans`, without any other name.
role() {
  local name=$1
  shift
  bao write "$mesh/roles/$name" require_cn=false use_csr_common_name=false \
    key_usage=DigitalSignature allow_ip_sans=false allow_localhost=false \
    ttl=1h max_ttl=24h not_before_duration=2m not_after_bound=forbid no_store=true \
    basic_constraints_valid_for_non_ca=true "$@"
}

# A login by service account may use one role, and nothing else.
may_sign() {
  bao policy write "$1" - <<<"path \"$mesh/sign/$2\" { capabilities = [\"update\"] }"
}

kubernetes_login() {
  method kubernetes
  bao write auth/kubernetes/config kubernetes_host="$kubernetes" \
    ${KUBERNETES_CA:+kubernetes_ca_cert=@"$KUBERNETES_CA"} ${REVIEWER_JWT:+token_reviewer_jwt=@"$REVIEWER_JWT"}
  bao write "auth/kubernetes/role/$1" bound_service_account_namespaces="$2" bound_service_account_names="$3" \
    audience=openbao token_policies="$1" token_ttl=1h token_type=batch
}

workload_login() {
  local keys=(oidc_discovery_url="$kubernetes" ${KUBERNETES_CA:+oidc_discovery_ca_pem=@"$KUBERNETES_CA"})
  [ -z "${JWT_KEYS-}" ] || keys=(jwt_validation_pubkeys=@"$JWT_KEYS")
  method jwt
  bao write auth/jwt/config "${keys[@]}"
  bao write auth/jwt/role/workload - <<'ROLE'
{
  "role_type": "jwt", "user_claim": "sub", "bound_audiences": "openbao", "token_policies": "culvert", "token_type": "batch",
  "token_ttl": "5m",
  "claim_mappings": {"/kubernetes.io/namespace": "namespace", "/kubernetes.io/serviceaccount/name": "account"}
}
ROLE
}

engine "$root"
engine "$mesh"
if ! issuers "$root"; then
  bao write "$root/root/generate/internal" common_name="mesh root" issuer_name=root key_type=ec ttl=87600h >/dev/null
fi
if ! issuers "$mesh"; then
  csr=$(bao write -field=csr "$mesh/intermediate/generate/internal" common_name="mesh intermediate" key_type=ec)
  signed=$(bao write -field=certificate "$root/root/sign-intermediate" csr="$csr" format=pem_bundle ttl=43000h)
  bao write "$mesh/intermediate/set-signed" certificate="$signed" >/dev/null
fi
# Certificates end with their issuer at the latest, instead of not being issued at all.
bao patch "$mesh/issuer/default" leaf_not_after_behavior=truncate >/dev/null
# Revocation lists are renewed before they end.
for mount in "$root" "$mesh"; do
  bao write "$mount/config/crl" auto_rebuild=true >/dev/null
done

may_sign culvert workload

case $login in
  kubernetes | none)
    role workload key_type=ec key_bits=256 allowed_uri_sans_template=false allowed_uri_sans="spiffe://$domain/ns/*"
    [ "$login" = none ] || kubernetes_login culvert istio-system ztunnel
    ;;
  workload)
    workload_login
    account=identity.entity.aliases.$(bao read -field=accessor sys/auth/jwt).metadata
    role workload key_type=ec key_bits=256 allowed_uri_sans_template=true \
      allowed_uri_sans="spiffe://$domain/ns/{{$account.namespace}}/sa/{{$account.account}}"
    ;;
  cert-manager)
    # Also the server certificates of istiod and istio-csr, which have RSA keys.
    role cert-manager key_type=any allowed_uri_sans="spiffe://$domain/ns/*" allow_bare_domains=true \
      allowed_domains=istiod.istio-system.svc,cert-manager-istio-csr.cert-manager.svc
    may_sign cert-manager cert-manager
    kubernetes_login cert-manager istio-system openbao-issuer
    ;;
  *)
    echo "LOGIN=$login: not one of kubernetes, workload, cert-manager, none" >&2
    exit 2
    ;;
esac
