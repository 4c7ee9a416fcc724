//! The variables of OpenBao.

use std::{collections::BTreeSet, time::Duration};

use super::given;
use crate::config::{CertificateSource, OpenBao, OpenBaoJwt, OpenBaoLogin, RootSource};

const PROVIDER: (&str, &str) = ("CA_PROVIDER", "openbao");
const ADDRESS: (&str, &str) = ("OPENBAO_ADDRESS", "bao.vault.svc:8200");
const ROLE: (&str, &str) = ("OPENBAO_ROLE", "workload");
const AUTH_ROLE: (&str, &str) = ("OPENBAO_AUTH_ROLE", "node");

/// What these variables make of it, beside the ones that are always needed.
fn openbao(more: &[(&str, &str)]) -> OpenBao {
    let mut variables = vec![PROVIDER, ADDRESS, ROLE];
    variables.extend(more);
    let source = given(&variables).config().control.certificates;
    let CertificateSource::OpenBao(server) = source else {
        panic!("{source:?}");
    };
    *server
}

fn keys(keys: &[&str]) -> BTreeSet<String> {
    keys.iter().map(ToString::to_string).collect()
}

#[test]
fn little_has_to_be_said() {
    let server = openbao(&[AUTH_ROLE]);
    assert_eq!(server.address, "https://bao.vault.svc:8200/");
    let roots = "/var/run/secrets/openbao/ca.crt";
    assert_eq!(server.roots, RootSource::File(roots.into()));
    assert_eq!((&*server.mount, &*server.role), ("pki", "workload"));
    assert!(server.namespace.is_none() && server.root_mounts.is_empty());
    assert_eq!(server.poll_interval, Duration::from_secs(300));
    let login = OpenBaoLogin::Kubernetes {
        mount: "kubernetes".into(),
        role: "node".into(),
        jwt: OpenBaoJwt::File("/var/run/secrets/tokens/openbao-token".into()),
    };
    assert_eq!(server.login, login);
    // An address of istiod's CA does not matter.
    openbao(&[AUTH_ROLE, ("CA_ADDRESS", "")]);
}

#[test]
fn much_can_be_said() {
    let server = openbao(&[
        AUTH_ROLE,
        ("OPENBAO_ROOT_CA", "SYSTEM"),
        ("OPENBAO_NAMESPACE", "platform/mesh/"),
        ("OPENBAO_MOUNT", "/pki-mesh/"),
        ("OPENBAO_ROOT_MOUNTS", "pki-root, old/root,"),
        ("OPENBAO_POLL_INTERVAL", "1s"),
    ]);
    assert_eq!(server.roots, RootSource::System);
    assert_eq!(server.namespace.as_deref(), Some("platform/mesh"));
    assert_eq!(server.mount, "pki-mesh");
    assert_eq!(server.root_mounts, ["pki-root", "old/root"]);
    assert_eq!(server.poll_interval, Duration::from_secs(1));
}

#[test]
fn each_method_has_its_files() {
    let method = |name, more: &[_]| {
        let mut variables = vec![("OPENBAO_AUTH_METHOD", name)];
        variables.extend(more);
        openbao(&variables).login
    };
    let jwt = OpenBaoLogin::Jwt {
        mount: "oidc/node".into(),
        role: None,
        jwt: OpenBaoJwt::File("./jwt".into()),
    };
    let files = [
        ("OPENBAO_AUTH_MOUNT", "oidc/node"),
        ("OPENBAO_JWT_PATH", "./jwt"),
    ];
    assert_eq!(method("jwt", &files), jwt);
    let approle = |secret_id: Option<&str>| OpenBaoLogin::AppRole {
        mount: "approle".into(),
        role_id: "/r".into(),
        secret_id: secret_id.map(Into::into),
    };
    let role_id = ("OPENBAO_ROLE_ID_PATH", "/r");
    assert_eq!(method("approle", &[role_id]), approle(None));
    let both = [role_id, ("OPENBAO_SECRET_ID_PATH", "/s")];
    assert_eq!(method("approle", &both), approle(Some("/s")));
    let token = [("OPENBAO_TOKEN_PATH", "/t")];
    assert_eq!(
        method("token", &token),
        OpenBaoLogin::TokenFile("/t".into())
    );
}

#[test]
fn workloads_may_log_in_for_themselves() {
    let jwt = |more: &[_]| {
        let mut variables = vec![("OPENBAO_AUTH_METHOD", "jwt")];
        variables.extend(more);
        let login = openbao(&variables).login;
        let OpenBaoLogin::Jwt { jwt, .. } = login else {
            panic!("{login:?}");
        };
        jwt
    };
    let directory = ("OPENBAO_JWT_SOURCE", "directory");
    let usual = "/var/run/secrets/openbao/workloads";
    assert_eq!(jwt(&[directory]), OpenBaoJwt::Directory(usual.into()));
    let elsewhere = [directory, ("OPENBAO_JWT_PATH", "/tokens")];
    assert_eq!(jwt(&elsewhere), OpenBaoJwt::Directory("/tokens".into()));

    let kubernetes = ("OPENBAO_JWT_SOURCE", "kubernetes");
    let made = |address: &str, account: &str, audience: &str| OpenBaoJwt::Kubernetes {
        address: address.parse().unwrap(),
        account: account.into(),
        audience: audience.into(),
    };
    let usual = "/var/run/secrets/kubernetes.io/serviceaccount";
    let little = [kubernetes, ("KUBERNETES_SERVICE_HOST", "10.96.0.1")];
    assert_eq!(
        jwt(&little),
        made("https://10.96.0.1:443/", usual, "openbao")
    );
    let much = [
        kubernetes,
        ("KUBERNETES_SERVICE_HOST", "fd00::1"),
        ("KUBERNETES_SERVICE_PORT", "6443"),
        ("KUBERNETES_ACCOUNT_PATH", "/account"),
        ("OPENBAO_JWT_AUDIENCE", "vault"),
    ];
    assert_eq!(
        jwt(&much),
        made("https://[fd00::1]:6443/", "/account", "vault")
    );

    let faulty = |more: &[_], key: &str| {
        let mut variables = vec![PROVIDER, ADDRESS, ROLE, AUTH_ROLE];
        variables.extend(more);
        assert_eq!(given(&variables).faulty(), keys(&[key]));
    };
    faulty(&[kubernetes], "KUBERNETES_SERVICE_HOST");
    faulty(&[("OPENBAO_JWT_SOURCE", "vault")], "OPENBAO_JWT_SOURCE");
}

#[test]
fn what_is_missing_is_told_together() {
    let missing = ["OPENBAO_ADDRESS", "OPENBAO_AUTH_ROLE", "OPENBAO_ROLE"];
    assert_eq!(given(&[PROVIDER]).faulty(), keys(&missing));
    for (method, key) in [
        ("approle", "OPENBAO_ROLE_ID_PATH"),
        ("token", "OPENBAO_TOKEN_PATH"),
    ] {
        let variables = [PROVIDER, ADDRESS, ROLE, ("OPENBAO_AUTH_METHOD", method)];
        assert_eq!(given(&variables).faulty(), keys(&[key]));
    }
    // Refused is not missing.
    let refused = [PROVIDER, ("OPENBAO_ADDRESS", "http://a"), ROLE, AUTH_ROLE];
    assert_eq!(given(&refused).faulty(), keys(&["OPENBAO_ADDRESS"]));
}

#[test]
fn there_is_one_provider() {
    let istiod = given(&[("CA_PROVIDER", "istiod"), ADDRESS]).config();
    let source = istiod.control.certificates;
    assert!(matches!(source, CertificateSource::Istio(_)));
    let vault = given(&[("CA_PROVIDER", "vault")]);
    assert_eq!(vault.faulty(), keys(&["CA_PROVIDER"]));
    let both = [PROVIDER, ADDRESS, ROLE, AUTH_ROLE, ("FAKE_CA", "true")];
    let both = given(&both).read().unwrap_err().to_string();
    assert!(
        both.contains("CA_PROVIDER=openbao and FAKE_CA=true"),
        "{both}"
    );
    let fake = given(&[("CA_PROVIDER", "istiod"), ("FAKE_CA", "true")]).config();
    let source = fake.control.certificates;
    assert!(matches!(source, CertificateSource::InProcess { .. }));
}
