//! The token: got once, replaced in time, replaced when refused.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
};

use futures_util::future::join_all;
use serde_json::json;
use tokio::time::{Duration, advance};

use super::{
    super::*,
    server::{JWT, errors, header, reply, stage, stage_with},
};
use crate::Retry;

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

#[tokio::test(start_paused = true)]
async fn many_share_one_login() {
    let stage = stage();
    for signed in join_all((0..8).map(|_| stage.sign())).await {
        signed.unwrap();
    }
    assert_eq!((stage.fake.logins(), stage.fake.signings()), (1, 8));
}

#[tokio::test(start_paused = true)]
async fn many_share_one_failure() {
    let stage = stage();
    stage
        .fake
        .script(|_| Some(errors(403, "permission denied")));
    for signed in join_all((0..8).map(|_| stage.sign())).await {
        assert_eq!(signed.unwrap_err().retry(), Retry::Soon);
    }
    assert_eq!(stage.fake.logins(), 1);
    stage.sign().await.unwrap_err();
    assert_eq!(stage.fake.logins(), 1, "a moment ago it failed");
    advance(seconds(1)).await;
    stage.fake.script(|_| None);
    stage.sign().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_login_that_is_dropped_blocks_nobody() {
    let stage = stage();
    stage.fake.script(|seen| seen.is_login().then_some(None));
    let given_up = timeout(seconds(5), stage.sign()).await;
    assert!(given_up.is_err());
    stage.fake.script(|_| None);
    stage.sign().await.unwrap();
    assert_eq!(stage.fake.logins(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_token_is_replaced_after_two_thirds_of_its_life() {
    let stage = stage();
    stage.sign().await.unwrap();
    advance(seconds(59)).await;
    stage.sign().await.unwrap();
    assert_eq!(stage.fake.logins(), 1);
    advance(seconds(1)).await;
    stage.sign().await.unwrap();
    assert_eq!(stage.fake.logins(), 2);
    assert_eq!(
        stage.fake.seen().last().unwrap().header("x-vault-token"),
        "token-2"
    );
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_still_good_outlasts_failing_logins() {
    let stage = stage();
    stage.sign().await.unwrap();
    stage
        .fake
        .script(|seen| seen.is_login().then(|| errors(500, "")));
    advance(seconds(70)).await;
    stage.sign().await.unwrap();
    stage.sign().await.unwrap();
    assert_eq!(stage.fake.logins(), 2, "the failure is a moment old");
    advance(seconds(20)).await;
    stage.sign().await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn a_refused_token_is_replaced_once() {
    let stage = stage();
    stage.sign().await.unwrap();
    stage.fake.script(|seen| {
        let revoked = seen.header("x-vault-token") == "token-1";
        revoked.then(|| errors(403, "permission denied"))
    });
    for signed in join_all((0..4).map(|_| stage.sign())).await {
        signed.unwrap();
    }
    assert_eq!((stage.fake.logins(), stage.fake.signings()), (2, 1 + 4 + 4));
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_refuses_makes_no_storm_of_logins() {
    let stage = stage();
    let refuse = || errors(403, "permission denied");
    assert_eq!(stage.refusal(refuse).await.retry(), Retry::Soon);
    assert_eq!((stage.fake.logins(), stage.fake.signings()), (2, 2));
    for _ in 0..5 {
        stage.sign().await.unwrap_err();
    }
    assert_eq!((stage.fake.logins(), stage.fake.signings()), (2, 7));
    advance(seconds(31)).await;
    stage.fake.script(|_| None);
    stage.sign().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn failures_of_a_login_are_tried_again() {
    for (status, expected) in [
        (400, Retry::Soon),
        (403, Retry::Soon),
        (404, Retry::Slowly),
        (429, Retry::After(seconds(7))),
        (500, Retry::Soon),
        (503, Retry::Soon),
    ] {
        let stage = stage();
        stage
            .fake
            .script(move |_| Some(header(errors(status, "no"), "retry-after", "7")));
        let error = stage.sign().await.unwrap_err();
        assert_eq!(error.retry(), expected, "{status}");
        assert!(error.to_string().starts_with("login at OpenBao failed"));
    }
    for junk in [
        "",
        "{}",
        r#"{"auth":null}"#,
        r#"{"auth":{"client_token":"","lease_duration":1}}"#,
    ] {
        let stage = stage();
        stage.fake.script(move |_| Some(reply(200, junk)));
        assert_eq!(stage.sign().await.unwrap_err().retry(), Retry::Soon);
    }
}

#[tokio::test(start_paused = true)]
async fn any_life_of_a_token_is_coped_with() {
    for life in [0, 1, u64::MAX] {
        let stage = stage();
        stage.fake.script(move |seen| {
            let auth = json!({ "client_token": "t", "lease_duration": life });
            let answer = json!({ "auth": auth }).to_string();
            seen.is_login().then(|| reply(200, answer))
        });
        stage.sign().await.unwrap();
        advance(seconds(3600)).await;
        stage.sign().await.unwrap();
        let logins = if life == 1 { 2 } else { 1 };
        assert_eq!(stage.fake.logins(), logins, "{life}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_other_methods() {
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| -> PathBuf {
        let path = files.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let jwt = file("jwt", JWT);
    let (role_id, secret_id) = (file("role", "r\n"), file("secret", "s\n"));
    let jwt_login = |role: Option<&str>| Login::Jwt {
        mount: "oidc/node".into(),
        role: role.map(Into::into),
        jwt: Jwt::Own(jwt.clone()),
    };
    let approle = |secret_id| Login::AppRole {
        mount: "approle".into(),
        role_id: role_id.clone(),
        secret_id,
    };
    for (login, path, body) in [
        (
            jwt_login(Some("node")),
            "oidc/node",
            json!({ "role": "node", "jwt": JWT }),
        ),
        (jwt_login(None), "oidc/node", json!({ "jwt": JWT })),
        (
            approle(Some(secret_id)),
            "approle",
            json!({ "role_id": "r", "secret_id": "s" }),
        ),
        (approle(None), "approle", json!({ "role_id": "r" })),
    ] {
        let stage = stage_with(|settings| settings.login = login);
        stage.sign().await.unwrap();
        let seen = &stage.fake.seen()[0];
        assert_eq!(seen.path, format!("/v1/auth/{path}/login"));
        assert_eq!(seen.body, body);
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_shown_is_not_repeated_even_in_part() {
    // The line of the server is cut within what it repeats.
    let repeating = |secret: &str| errors(400, &format!("{} {secret}", "-".repeat(295)));
    let stage = stage();
    stage
        .fake
        .script(move |seen| seen.is_login().then(|| repeating(JWT)));
    let error = stage.sign().await.unwrap_err().to_string();
    assert!(error.contains("---") && !error.contains("eyJ"), "{error}");
    advance(seconds(1)).await;
    stage.fake.script(move |seen| {
        let sign = seen.path.contains("/sign/");
        sign.then(|| repeating(seen.header("x-vault-token")))
    });
    let error = stage.sign().await.unwrap_err().to_string();
    assert!(error.contains("---") && !error.contains("tok"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_token_file_is_read_again_when_the_token_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "one\n").unwrap();
    let stage = stage_with(|settings| settings.login = Login::TokenFile(file.path().into()));
    stage.sign().await.unwrap();
    assert_eq!(stage.fake.seen()[0].header("x-vault-token"), "one");
    stage.fake.script(|seen| {
        let old = seen.header("x-vault-token") == "one";
        old.then(|| errors(403, "permission denied"))
    });
    stage.sign().await.unwrap_err();
    assert_eq!(
        stage.fake.signings(),
        2,
        "the same token is not shown twice"
    );
    std::fs::write(file.path(), "two\n").unwrap();
    stage.sign().await.unwrap();
    assert_eq!(stage.fake.logins(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_file_may_be_missing_or_empty_for_a_while() {
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("token");
    let login = Login::TokenFile(path.clone());
    let stage = stage_with(|settings| settings.login = login);
    for content in [None, Some(" \n"), Some("a\nb")] {
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        assert_eq!(stage.sign().await.unwrap_err().retry(), Retry::Soon);
        advance(seconds(1)).await;
    }
    std::fs::write(&path, "good").unwrap();
    stage.sign().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_sealed_server_is_asked_again_after_it_is_unsealed() {
    let stage = stage();
    let sealed = Arc::new(AtomicUsize::new(3));
    let left = Arc::clone(&sealed);
    stage.fake.script(move |_| {
        let before =
            left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |it| it.checked_sub(1));
        before.is_ok().then(|| errors(503, "Vault is sealed"))
    });
    for _ in 0..3 {
        let error = stage.sign().await.unwrap_err();
        assert!(error.to_string().contains("sealed"), "{error}");
        advance(seconds(1)).await;
    }
    stage.sign().await.unwrap();
}
