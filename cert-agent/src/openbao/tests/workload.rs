//! A login for each workload, with the token of its own service account.

use std::{fs, sync::Arc};

use http::Method;
use serde_json::json;

use super::{
    super::*,
    server::{Fake, Reply, Seen, Stage, ToFake, errors, header, reply, stage_around},
};
use crate::Retry;

const DB: &str = "spiffe://td/ns/shop.eu/sa/db-1";
const OWN: &str = "eyJ.n0de.jwt";

fn login(jwt: Jwt) -> Login {
    Login::Jwt {
        mount: "jwt".into(),
        role: Some("workload".into()),
        jwt,
    }
}

/// The JWTs of all logins.
fn shown(fake: &Fake) -> Vec<String> {
    let logins = fake.seen().into_iter().filter(Seen::is_login);
    logins
        .map(|seen| seen.body["jwt"].as_str().unwrap().to_owned())
        .collect()
}

/// The tokens of all requests to sign.
fn used(fake: &Fake) -> Vec<String> {
    let signings = fake.seen().into_iter();
    signings
        .filter(|seen| seen.path.contains("/sign/"))
        .map(|seen| seen.header("x-vault-token").to_owned())
        .collect()
}

#[tokio::test(start_paused = true)]
async fn each_certificate_has_a_login_of_its_workload() {
    let directory = tempfile::tempdir().unwrap();
    let write = |account: &str, token: &str| {
        let path = directory.path().join(account);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, token).unwrap();
    };
    write("shop/web", "web-1\n");
    let path = directory.path().to_owned();
    let stage = stage_around(Fake::new(), |settings| {
        settings.login = login(Jwt::Directory(path));
    });
    stage.sign().await.unwrap();
    let error = stage.sign_for(DB).await.unwrap_err();
    assert!(error.to_string().contains("shop.eu/db-1"), "{error}");
    assert_eq!(error.retry(), Retry::Soon, "it may appear at any time");
    write("shop.eu/db-1", "db-1");
    write("shop/web", "web-2");
    stage.sign_for(DB).await.unwrap();
    stage.sign().await.unwrap();
    assert_eq!(shown(&stage.fake), ["web-1", "db-1", "web-2"]);
    assert_eq!(used(&stage.fake), ["token-1", "token-2", "token-3"]);
}

/// An authority whose workloads' tokens are made by the same server, which plays Kubernetes, too.
fn with_kubernetes() -> (Stage, tempfile::NamedTempFile) {
    let own = tempfile::NamedTempFile::new().unwrap();
    fs::write(own.path(), format!("{OWN}\n")).unwrap();
    let fake = Fake::new();
    let api = KubernetesApi::over(
        Arc::new(ToFake(Arc::clone(&fake))),
        "https://kubernetes:6443".parse().unwrap(),
        own.path().to_owned(),
        "openbao".to_owned(),
    );
    let stage = stage_around(fake, |settings| settings.login = login(Jwt::Requested(api)));
    (stage, own)
}

fn is_account(seen: &Seen) -> bool {
    seen.path.starts_with("/api/v1/namespaces/")
}

fn made(token: &str) -> Reply {
    reply(201, json!({ "status": { "token": token } }).to_string())
}

#[tokio::test(start_paused = true)]
async fn kubernetes_makes_the_tokens() {
    let (stage, own) = with_kubernetes();
    stage
        .fake
        .script(|seen| is_account(seen).then(|| made(&format!("token of {}", seen.path))));
    stage.sign().await.unwrap();
    fs::write(own.path(), "renewed").unwrap();
    stage.sign_for(DB).await.unwrap();
    let path = |namespace, account| {
        format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token")
    };
    let expected = [path("shop", "web"), path("shop.eu", "db-1")];
    let seen = stage.fake.seen();
    let asked: Vec<_> = seen.iter().filter(|seen| is_account(seen)).collect();
    for (asked, path) in asked.iter().zip(&expected) {
        assert_eq!((&asked.method, &asked.path), (&Method::POST, path));
        assert_eq!(asked.host, "kubernetes:6443");
        assert_eq!(asked.body["kind"], "TokenRequest");
        assert_eq!(asked.body["apiVersion"], "authentication.k8s.io/v1");
        assert_eq!(asked.body["spec"]["audiences"], json!(["openbao"]));
        assert_eq!(asked.body["spec"]["expirationSeconds"], 600);
        assert_eq!(asked.header("x-vault-token"), "");
    }
    assert_eq!(asked[0].header("authorization"), format!("Bearer {OWN}"));
    assert_eq!(asked[1].header("authorization"), "Bearer renewed");
    let tokens = expected.map(|path| format!("token of {path}"));
    assert_eq!(shown(&stage.fake), tokens);
    assert!(
        seen.iter()
            .all(|it| it.header("authorization").is_empty() || is_account(it))
    );
}

#[tokio::test(start_paused = true)]
async fn refusals_of_kubernetes_have_their_pace() {
    for (status, expected) in [
        (400, Retry::Slowly),
        (401, Retry::Soon),
        (403, Retry::Slowly),
        (404, Retry::Slowly),
        (429, Retry::After(Duration::from_secs(7))),
        (500, Retry::Soon),
        (503, Retry::Soon),
    ] {
        let (stage, _own) = with_kubernetes();
        stage.fake.script(move |seen| {
            let message = format!("no, {OWN}\n{} {OWN}", "-".repeat(278));
            let said = json!({ "kind": "Status", "message": message }).to_string();
            is_account(seen).then(|| header(reply(status, said), "retry-after", "7"))
        });
        let error = stage.sign().await.unwrap_err();
        assert_eq!(error.retry(), expected, "{status}");
        let text = error.to_string();
        let begin = "getting the workload's token from Kubernetes failed: status ";
        assert!(text.starts_with(begin) && !text.contains("eyJ"), "{text}");
        assert_eq!(
            text.contains("serviceaccounts/token"),
            status == 403,
            "{text}"
        );
        assert_eq!(stage.fake.logins(), 0);
        // Its limits are none of OpenBao's.
        stage
            .fake
            .script(|seen| is_account(seen).then(|| made("t")));
        stage.sign().await.unwrap();
    }
    for junk in ["", "{}", r#"{"status":{"token":" "}}"#] {
        let (stage, _own) = with_kubernetes();
        stage
            .fake
            .script(move |seen| is_account(seen).then(|| reply(201, junk)));
        assert_eq!(stage.sign().await.unwrap_err().retry(), Retry::Soon);
    }
}

#[tokio::test(start_paused = true)]
async fn a_kubernetes_that_is_silent_is_given_up() {
    let (stage, _own) = with_kubernetes();
    stage.fake.script(|seen| is_account(seen).then_some(None));
    let error = stage.sign().await.unwrap_err().to_string();
    assert!(
        error.contains("no answer from https://kubernetes:6443"),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_refused_signature_is_not_blamed_on_the_token() {
    let (stage, _own) = with_kubernetes();
    stage.fake.script(|seen| {
        if is_account(seen) {
            return Some(made("t"));
        }
        seen.path
            .contains("/sign/")
            .then(|| errors(403, "permission denied"))
    });
    stage.sign().await.unwrap_err();
    assert_eq!((stage.fake.logins(), stage.fake.signings()), (1, 1));
}

#[test]
fn kubernetes_is_reached_over_tls_only() {
    let api = KubernetesApi::new(
        "http://kubernetes".parse().unwrap(),
        Roots::System,
        "/token".into(),
        "openbao".to_owned(),
        crate::TlsOptions::default(),
    );
    let address = "https://bao.example".parse().unwrap();
    let settings = Settings::new(address, Roots::System, "r", login(Jwt::Requested(api)));
    assert!(matches!(
        Authority::new(settings),
        Err(SettingsError::Address(_))
    ));
}
