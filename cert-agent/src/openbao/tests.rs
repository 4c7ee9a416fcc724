//! Against an OpenBao in memory, on a paused clock.

mod login;
mod server;
mod trust;
mod workload;

use std::time::{Duration, SystemTime};

use http::{Method, Uri};
use serde_json::json;
use tokio::time::{Instant, advance};

use super::{dial::TlsDialler, *};
use crate::{
    Agent, AgentOptions, CsrSource, ObtainError, Rejection, Retry, SanRule, Svid, TlsOptions,
    svid::TlsContext,
    testing::{self, paused_clock},
};
use server::{HOME, JWT, WEB, errors, header, ok, pem_text, reply, stage, stage_with};

fn accept(chain: crate::KeyedChain) -> Result<Svid, Rejection> {
    let context = TlsContext::new(TlsOptions::default(), SanRule::Requested);
    Svid::accept(&WEB.parse().unwrap(), chain, &context, SystemTime::now())
}

#[tokio::test(start_paused = true)]
async fn logs_in_once_and_signs() {
    let stage = stage_with(|settings| {
        settings.namespace = Some("platform/mesh".into());
        settings.ttl = Duration::from_secs(3600);
    });
    for _ in 0..2 {
        accept(stage.sign().await.unwrap()).unwrap();
    }
    let seen = stage.fake.seen();
    assert_eq!(seen.len(), 3, "one login, two signatures");
    let login = &seen[0];
    assert_eq!(
        (&login.method, login.path.as_str()),
        (&Method::POST, "/v1/auth/kubernetes/login")
    );
    assert_eq!(login.body, json!({ "role": "node", "jwt": JWT }));
    assert_eq!(login.header("x-vault-token"), "");
    for sign in &seen[1..] {
        assert_eq!(sign.path, "/v1/pki-mesh/sign/workload");
        assert_eq!(sign.header("x-vault-token"), "token-1");
        assert_eq!(sign.header("x-vault-namespace"), "platform/mesh");
        assert_eq!(sign.header("host"), "bao.example:8200");
        assert_eq!(sign.body["ttl"], "3600s");
        assert_eq!(sign.body["format"], "pem");
    }
    assert_ne!(seen[1].body["csr"], seen[2].body["csr"], "a key each");
}

#[tokio::test(start_paused = true)]
async fn each_status_has_its_pace() {
    let after = |seconds| Retry::After(Duration::from_secs(seconds));
    for (status, retry_after, expected) in [
        (400, "", Retry::Slowly),
        (403, "", Retry::Soon),
        (404, "", Retry::Slowly),
        (405, "", Retry::Slowly),
        (429, "4", after(4)),
        (429, "", after(1)),
        (429, "Fri, 31 Dec 1999 23:59:59 GMT", after(1)),
        (429, "99999999999", after(150)),
        (500, "", Retry::Soon),
        (503, "9", Retry::Soon),
        (204, "", Retry::Soon),
        (302, "", Retry::Soon),
    ] {
        let stage = stage();
        stage.fake.script(move |seen| {
            let answer = errors(status, "the words of\n the server");
            let refusal = header(answer, "retry-after", retry_after);
            seen.path.contains("/sign/").then_some(refusal)
        });
        let error = stage.sign().await.unwrap_err();
        assert_eq!(error.retry(), expected, "{status}");
        let text = error.to_string();
        if status >= 400 {
            let words = format!("status {status}");
            assert!(
                text.contains(&words) && text.ends_with(": the words of the server"),
                "{text}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_rate_limit_holds_back_every_call() {
    let stage = stage();
    stage.fake.script(|seen| {
        let limit = || header(errors(429, "quota exceeded"), "retry-after", "4");
        seen.path.contains("/sign/").then(limit)
    });
    stage.sign().await.unwrap_err();
    stage.fake.script(|_| None);
    advance(Duration::from_millis(2500)).await;
    let early = stage.sign().await.unwrap_err();
    assert_eq!(early.retry(), Retry::After(Duration::from_millis(1500)));
    assert_eq!(stage.fake.signings(), 1, "nothing was sent");
    advance(Duration::from_millis(1500)).await;
    stage.sign().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_agent_waits_as_long_as_it_is_told() {
    let stage = stage();
    let start = Instant::now();
    stage.fake.script(move |seen| {
        let limit = || header(errors(429, "quota exceeded"), "retry-after", "4");
        let early = start.elapsed() < Duration::from_millis(3900);
        (early && seen.path.contains("/sign/")).then(limit)
    });
    let options = AgentOptions {
        clock: paused_clock(),
        ..AgentOptions::default()
    };
    let agent = Agent::new(Arc::new(CsrSource::new(stage.authority.clone())), options);
    let stop = CancellationToken::new();
    let wait = async {
        agent.svid(&WEB.parse().unwrap()).await.unwrap();
        stop.cancel();
    };
    tokio::join!(agent.run(stop.clone()), wait);
    assert!(
        start.elapsed() >= Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(stage.fake.signings(), 2);
}

#[tokio::test(start_paused = true)]
async fn follows_a_standby_with_method_body_and_token() {
    let stage = stage();
    stage.fake.script(|seen| {
        let location = format!("https://active.example:8200{}", seen.path);
        (seen.host == "bao.example:8200").then(|| header(reply(307, ""), "location", &location))
    });
    accept(stage.sign().await.unwrap()).unwrap();
    let seen = stage.fake.seen();
    let hosts: Vec<_> = seen.iter().map(|seen| seen.host.as_str()).collect();
    let (standby, active) = ("bao.example:8200", "active.example:8200");
    assert_eq!(hosts, [standby, active, standby, active]);
    let [.., first, second] = seen.as_slice() else {
        panic!("too few calls")
    };
    assert_eq!(second.method, Method::POST);
    assert_eq!((&first.body, &first.path), (&second.body, &second.path));
    assert_eq!(second.header("x-vault-token"), "token-1");
    assert_eq!(second.header("host"), active);
}

#[tokio::test(start_paused = true)]
async fn carries_nothing_out_of_the_cluster() {
    for location in [
        "http://bao.example:8200/v1/auth/kubernetes/login",
        "https://elsewhere/v1/auth/kubernetes/login",
        "https://bao.example:8200/v1/auth/other/login",
        "https://bao.example:8200/",
        "https://user@bao.example:8200/v1/auth/kubernetes/login",
        "/v1/auth/kubernetes/login",
        "",
        "\u{7f}",
    ] {
        let stage = stage();
        let location = location.to_owned();
        stage.fake.script(move |_| {
            let mut response = reply(307, "")?;
            if let Ok(location) = location.parse() {
                response.headers_mut().insert("location", location);
            }
            Some(Some(response))
        });
        let error = stage.sign().await.unwrap_err();
        assert_eq!(error.retry(), Retry::Soon);
        assert_eq!(stage.fake.seen().len(), 1, "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn redirections_end() {
    let stage = stage();
    stage.fake.script(|seen| {
        Some(header(
            reply(307, ""),
            "location",
            &format!("{HOME}{}", seen.path),
        ))
    });
    let error = stage.sign().await.unwrap_err();
    assert!(error.to_string().contains("without end"), "{error}");
    assert_eq!(stage.fake.seen().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn junk_is_refused() {
    let junk: [fn() -> server::Reply; 8] = [
        || reply(200, ""),
        || reply(200, "<html>s3cret</html>"),
        || reply(200, "{}"),
        || reply(200, r#"{"data":null}"#),
        || reply(200, r#"{"data":{"certificate":7}}"#),
        || {
            reply(
                200,
                r#"{"data":{"certificate":"-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----"}}"#,
            )
        },
        || reply(200, vec![b'['; 100_000]),
        || reply(200, vec![0xff; 1000]),
    ];
    for junk in junk {
        let error = stage().refusal(junk).await;
        assert_eq!(error.retry(), Retry::Soon);
        assert!(!error.to_string().contains("s3cret"), "{error}");
    }
    // Nothing in it: what the agent refuses.
    let stage = stage();
    stage.fake.script(|seen| {
        let empty = || ok(&json!({ "data": { "certificate": "" } }));
        seen.path.contains("/sign/").then(empty)
    });
    let nothing = accept(stage.sign().await.unwrap()).unwrap_err();
    assert!(matches!(nothing, Rejection::EmptyChain(_)), "{nothing}");
}

#[tokio::test(start_paused = true)]
async fn answers_are_bounded_in_size_and_time() {
    let long = || reply(200, vec![b' '; 1024 * 1024 + 1]);
    let error = stage().refusal(long).await;
    assert!(error.to_string().contains("longer than"), "{error}");
    let start = Instant::now();
    let error = stage().refusal(|| None).await;
    assert!(error.to_string().contains("within 30s"), "{error}");
    assert_eq!(start.elapsed(), Duration::from_secs(30));
}

#[tokio::test(start_paused = true)]
async fn a_certificate_without_the_name_is_refused() {
    let stage = stage();
    let mesh = testing::Authority::new("mesh");
    let certificate = pem_text(&mesh.issue_with(&[], |_| {}).chain[0]);
    let root = pem_text(&mesh.root());
    stage.fake.script(move |seen| {
        let data = json!({ "certificate": certificate, "ca_chain": [root] });
        seen.path
            .contains("/sign/")
            .then(|| ok(&json!({ "data": data })))
    });
    let refused = accept(stage.sign().await.unwrap()).unwrap_err();
    assert!(matches!(refused, Rejection::WrongIdentity { .. }));
}

#[tokio::test(start_paused = true)]
async fn the_issuer_stands_in_for_a_missing_chain() {
    let stage = stage();
    let mesh = testing::Authority::new("mesh");
    let (leaf, root) = (mesh.issue(WEB).chain[0].clone(), pem_text(&mesh.root()));
    stage.fake.script(move |seen| {
        let data = json!({ "certificate": pem_text(&leaf), "issuing_ca": root });
        seen.path
            .contains("/sign/")
            .then(|| ok(&json!({ "data": data })))
    });
    let chain = stage.sign().await.unwrap();
    assert_eq!(chain.roots, [mesh.root()]);
    assert_eq!(chain.chain.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn no_secret_is_told() {
    let stage = stage();
    stage.fake.script(|seen| {
        let words = format!("cannot verify {}", seen.body["jwt"].as_str().unwrap_or(""));
        seen.is_login().then(|| errors(400, &words))
    });
    let error = stage.sign().await.unwrap_err();
    let text = format!("{error} {error:?} {:?}", stage.authority);
    assert!(text.contains("cannot verify <redacted>"), "{text}");
    assert!(!text.contains(JWT), "{text}");
    let token = wire::token_value("hvs.s3cret\n").unwrap();
    assert!(!format!("{token:?}").contains("s3cret"));
    assert!(wire::token_value(" \n").is_none() && wire::token_value("a\nb").is_none());
}

#[test]
fn settings_are_held_against_the_rules_of_paths() {
    for good in ["pki", "pki-mesh", "a/b_c/d.e"] {
        assert!(is_path(good), "{good}");
    }
    for bad in [
        "", "/a", "a/", "a//b", "a/../b", ".", "a?b", "a b", "a%2fb", "ä",
    ] {
        assert!(!is_path(bad), "{bad}");
    }
    let login = || Login::TokenFile("/t".into());
    let settings =
        |uri: &'static str| Settings::new(Uri::from_static(uri), Roots::System, "role", login());
    Authority::new(settings(HOME)).unwrap();
    for address in ["http://bao.example:8200", "bao.example:8200", "/"] {
        let error = Authority::new(settings(address)).unwrap_err();
        assert!(matches!(error, SettingsError::Address(_)), "{address}");
    }
    for bend in [
        (|it| it.mount = "../sys".into()) as fn(&mut Settings),
        |it| it.role = "a?b".into(),
        |it| it.root_mounts = vec![String::new()],
        |it| it.namespace = Some("a\nb".into()),
    ] {
        let mut bent = settings(HOME);
        bend(&mut bent);
        assert!(matches!(Authority::new(bent), Err(SettingsError::Path(_))));
    }
}

#[tokio::test]
async fn trust_roots_of_the_server_are_read_anew_and_never_lost() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ca.crt");
    let dialler = TlsDialler::new(Roots::File(path.clone()), TlsOptions::default());
    assert!(dialler.config().await.is_err(), "no file yet");
    std::fs::write(&path, "garbage").unwrap();
    assert!(dialler.config().await.is_err());
    std::fs::write(&path, pem_text(&testing::Authority::new("one").root())).unwrap();
    let first = dialler.config().await.unwrap();
    assert!(Arc::ptr_eq(&first, &dialler.config().await.unwrap()));
    std::fs::write(&path, "garbage").unwrap();
    assert!(Arc::ptr_eq(&first, &dialler.config().await.unwrap()));
    std::fs::write(&path, pem_text(&testing::Authority::new("two").root())).unwrap();
    assert!(!Arc::ptr_eq(&first, &dialler.config().await.unwrap()));
    assert!(
        dialler.same_cluster("a", "b"),
        "roots of the operator's own"
    );
    let public = TlsDialler::new(Roots::System, TlsOptions::default());
    assert!(!public.same_cluster("a", "b") && public.same_cluster("a", "A"));
}

#[test]
fn an_obtain_error_keeps_the_reason() {
    let failure = Failure::without_answer(Step::Sign, "why");
    let error = ObtainError::from(failure);
    assert_eq!(error.to_string(), "signing by OpenBao failed: why");
}
