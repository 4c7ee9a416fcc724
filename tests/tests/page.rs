//! The page of the admin server, as served and in a real browser.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{net::SocketAddr, path::Path, process::Stdio};

use testkit::{
    Cluster,
    mesh::{Match, Policy},
    proxy::ADMIN_PORT,
    stage::Pair,
    traffic::{self, Behaviour},
    wait,
};

#[tokio::test]
async fn the_page_names_everything_and_escapes_it() {
    let stage = Pair::new().unwrap();
    let mut mesh = stage.mesh();
    mesh.workload(&stage.web).workload_name = "<img src=x onerror=alert(1)>".to_owned();
    let cluster = stage.start(&mesh, &[]).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut stream = stage.web.connect(Pair::SERVICE).await.unwrap();
    traffic::ping(&mut stream, b"hello").await.unwrap();
    let page = cluster.proxy(0).get(ADMIN_PORT, "/").await.unwrap();
    assert_eq!(page.status, 200);
    assert_eq!(
        page.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'; style-src 'sha256-"),
        "{policy}"
    );
    assert!(!policy.contains("unsafe"), "{policy}");
    for link in ["config_dump", "logging", "quitquitquit", "debug/flows"] {
        assert!(page.body.contains(&format!("href=\"{link}\"")), "{link}");
    }
    assert!(page.body.contains("&lt;img src=x"), "{}", page.body);
    assert!(!page.body.contains("<img"), "{}", page.body);
    assert!(
        !page.body.contains("http://") && !page.body.contains("https://"),
        "an external asset"
    );
    assert!(page.body.contains("itself</b><span>signs certificates"));
    let tried = async || {
        let live = cluster.proxy(0).get(ADMIN_PORT, "/live").await.ok()?;
        let rules = "open</span></td><td><span class=\"good\">work for IPv4";
        live.body.contains(rules).then_some(())
    };
    wait::until(wait::SOON, "listeners and rules of the pod", tried).await;
    let live = cluster.proxy(0).get(ADMIN_PORT, "/live").await.unwrap();
    assert!(
        live.body.contains("1 of 1") && !live.body.contains("<html"),
        "{}",
        live.body
    );
}

/// Traffic of all kinds: a thousand open flows, denials, a refusal.
async fn busy(stage: &Pair, cluster: &Cluster<'_>) -> Vec<tokio::net::TcpStream> {
    let unserved = SocketAddr::new(Pair::SERVICE.ip(), 81);
    stage.web.turned_away(unserved).await.unwrap();
    let forbidden = stage.api.at(9090);
    assert!(stage.web.ask(forbidden, b"x").await.is_err());
    let mut streams = Vec::new();
    for _ in 0..1000 {
        let mut stream = stage.web.connect(Pair::SERVICE).await.unwrap();
        traffic::ping(&mut stream, &[7; 64]).await.unwrap();
        streams.push(stream);
    }
    let flows = cluster.proxy(0).document("/debug/flows").await.unwrap();
    assert_eq!(flows["total"], 1000);
    streams
}

/// Runs Chromium on the page, beside the proxy; what it prints and what it complains about.
async fn browse(stage: &Pair, arguments: &[&str]) -> (String, String) {
    let profile = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new("chromium");
    command
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--enable-logging=stderr",
            "--virtual-time-budget=7000",
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(arguments)
        .arg(format!("http://127.0.0.1:{ADMIN_PORT}/"))
        .env("HOME", profile.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let running = stage.world.node(0).proxy_netns().spawn(command).unwrap();
    let done = running.child.wait_with_output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(done.stdout), text(done.stderr))
}

#[tokio::test]
async fn a_browser_shows_a_thousand_flows_and_keeps_them_fresh() {
    let stage = Pair::new().unwrap();
    let mut mesh = stage.mesh();
    mesh.policy(Policy::deny("not-9090", vec![Match::port(9090)]));
    let cluster = stage.start(&mesh, &[]).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let _other = stage.api.serve(9090, Behaviour::Echo).unwrap();
    let _streams = busy(&stage, &cluster).await;
    let (page, complaints) = browse(&stage, &["--dump-dom"]).await;
    assert!(
        page.contains("data-refreshed=\""),
        "no live update\n{complaints}\n{page:.2000}"
    );
    assert!(page.contains("1000 of 1000"), "{page:.4000}");
    assert!(page.contains("no-healthy-upstream") && page.contains("denied-by-peer"));
    // What the other side's policy forbade is a denial on the map of this side, too.
    assert!(page.contains(", 1 denied, 0 failed"), "{page:.8000}");
    assert!(
        page.contains("culvert explain --from"),
        "no question to copy"
    );
    assert!(!complaints.contains("CONSOLE"), "{complaints}");
    let (light, dark) = ("preferredColorScheme=1", "preferredColorScheme=0");
    for (name, size, theme) in [
        ("wide", "1280,900", light),
        ("narrow", "420,900", light),
        ("dark", "1280,900", dark),
    ] {
        let file = stage.world.file(&format!("{name}.png"));
        let shot = format!("--screenshot={}", file.display());
        let size = format!("--window-size={size}");
        let theme = format!("--blink-settings={theme}");
        let (_, complaints) = browse(&stage, &[&shot, &size, &theme]).await;
        assert!(!complaints.contains("CONSOLE"), "{complaints}");
        assert!(is_png(&file), "no screenshot {name}: {complaints}");
        keep(&file, name);
    }
}

fn is_png(file: &Path) -> bool {
    std::fs::read(file).is_ok_and(|bytes| bytes.starts_with(b"\x89PNG") && bytes.len() > 10_000)
}

/// With `TESTKIT_SCREENSHOTS` set to a directory, pictures are left there for people to look at.
#[expect(
    clippy::disallowed_methods,
    reason = "test runs are steered by the environment"
)]
fn keep(file: &Path, name: &str) {
    if let Some(directory) = std::env::var_os("TESTKIT_SCREENSHOTS") {
        std::fs::copy(file, Path::new(&directory).join(format!("{name}.png"))).unwrap();
    }
}
