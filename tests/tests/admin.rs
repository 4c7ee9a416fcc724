//! The admin server: log levels, open flows, refusals, the end of the process.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use testkit::{
    http,
    mesh::{Match, Policy},
    proxy::ADMIN_PORT,
    stage::Pair,
    traffic::{self, Behaviour},
    wait,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

#[tokio::test]
async fn log_levels_change_while_the_process_runs() {
    let stage = Pair::new().unwrap();
    let cluster = stage
        .start(&stage.mesh(), &[("RUST_LOG", "info")])
        .await
        .unwrap();
    let proxy = cluster.proxy(0);
    let said = |filter: &str| format!("current log level is hickory_server::server=off,{filter}\n");
    for (path, filter) in [
        ("/logging", "info"),
        ("/logging?level=", "info"),
        ("/logging?level=debug", "debug"),
        ("/logging", "debug"),
        ("/logging?level=access=debug", "access=debug,debug"),
        ("/logging?reset", "info"),
        ("/logging?level=access:debug", "access=debug,info"),
        (
            "/logging?level=access%3Aoff%2Cwarning&reset",
            "access=off,warn",
        ),
        (
            "/logging?level=ztunnel::proxy:critical&reset",
            "ztunnel::proxy=error,info",
        ),
        ("/logging?level=&reset", "info"),
    ] {
        let answer = proxy.post(path).await.unwrap();
        assert_eq!((answer.status, answer.body), (200, said(filter)), "{path}");
        assert_eq!(
            answer
                .headers
                .iter()
                .find(|(name, _)| name == "content-type")
                .unwrap()
                .1,
            "text/plain"
        );
    }
    let refused = proxy.post("/logging?level=nonsense").await.unwrap();
    assert_eq!(refused.status, 400);
    assert!(
        refused.body.contains("nonsense") && refused.body.contains("usage:"),
        "{}",
        refused.body
    );
    assert_eq!(proxy.post("/logging").await.unwrap().body, said("info"));
    let wrong = proxy.get(ADMIN_PORT, "/logging").await.unwrap();
    assert_eq!(wrong.status, 405);
    assert!(wrong.body.starts_with("usage:"), "{}", wrong.body);
}

#[tokio::test]
async fn whoever_is_asked_to_quit_drains() {
    let stage = Pair::new().unwrap();
    let mut cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut stream = stage.web.connect(Pair::SERVICE).await.unwrap();
    traffic::ping(&mut stream, b"before").await.unwrap();
    let mut run = cluster.nodes.remove(0);
    let wrong = run.proxy.get(ADMIN_PORT, "/quitquitquit").await.unwrap();
    assert_eq!((wrong.status, wrong.body.as_str()), (405, ""));
    let answer = run.proxy.post("/quitquitquit").await.unwrap();
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (200, "shutdown now\n")
    );
    traffic::ping(&mut stream, b"while it drains")
        .await
        .unwrap();
    drop(stream);
    assert_eq!(
        run.proxy
            .exit(Duration::from_secs(10))
            .await
            .unwrap()
            .code(),
        Some(0)
    );
}

#[tokio::test]
async fn only_loopback_is_served() {
    let stage = Pair::new().unwrap();
    let cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    let node = stage.world.node(0);
    let v6 = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), ADMIN_PORT);
    let answer = http::request(node.proxy_netns(), v6, "GET /config_dump", &[])
        .await
        .unwrap();
    assert_eq!(answer.status, 200);
    for (path, status) in [("/", 200), ("/nothing", 404), ("/stats", 404)] {
        assert_eq!(
            cluster.proxy(0).get(ADMIN_PORT, path).await.unwrap().status,
            status,
            "{path}"
        );
    }
    // From another namespace, by the address at which metrics are served to everyone.
    let outside = SocketAddr::new(IpAddr::from([10, 20, 0, 2]), ADMIN_PORT);
    let refused = http::request(stage.world.node(1).proxy_netns(), outside, "GET /", &[]).await;
    let refused = refused.unwrap_err();
    let kind = refused
        .chain()
        .find_map(|cause| cause.downcast_ref::<std::io::Error>())
        .map(std::io::Error::kind);
    assert_eq!(
        kind,
        Some(std::io::ErrorKind::ConnectionRefused),
        "{refused:#}"
    );
    let foreign = ["Origin: http://evil.example"];
    let loopback = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), ADMIN_PORT);
    let post = http::request(node.proxy_netns(), loopback, "POST /quitquitquit", &foreign)
        .await
        .unwrap();
    assert_eq!(post.status, 403);
}

#[tokio::test]
async fn open_flows_and_refusals_are_told_with_what_decided() {
    let stage = Pair::new().unwrap();
    let mut mesh = stage.mesh();
    mesh.policies.push(Policy::new(
        "only-web",
        "Allow",
        vec![vec![vec![Match::pod(&stage.web)]]],
    ));
    let cluster = stage.start(&mesh, &[]).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut stream = stage.web.connect(Pair::SERVICE).await.unwrap();
    traffic::ping(&mut stream, b"hello").await.unwrap();

    let flows = cluster.proxy(1).document("/debug/flows").await.unwrap();
    assert_eq!(flows["total"], 1);
    let flow = &flows["flows"][0];
    assert_eq!(flow["policy"], "allow policy match: shop/only-web");
    assert_eq!(
        (&flow["bytesReceived"], &flow["bytesSent"]),
        (&5.into(), &5.into())
    );
    assert_eq!(flow["source"]["identity"], stage.web.spiffe_id());
    assert_eq!(
        (&flow["direction"], &flow["pod"]["name"]),
        (&"inbound".into(), &"api".into())
    );
    let flows = cluster.proxy(0).document("/debug/flows").await.unwrap();
    let flow = &flows["flows"][0];
    assert_eq!(
        (&flow["route"], &flow["service"]),
        (&"HBONE".into(), &"api.shop.svc.cluster.local".into())
    );
    assert_eq!(flow["dialled"], stage.api.at(15008).to_string());
    assert_eq!(
        cluster
            .proxy(0)
            .document("/debug/flows?limit=0")
            .await
            .unwrap()["flows"],
        serde_json::json!([])
    );

    let unserved = SocketAddr::new(Pair::SERVICE.ip(), 81);
    stage.web.turned_away(unserved).await.unwrap();
    let refusals = cluster.proxy(0).document("/debug/refusals").await.unwrap();
    let refusal = &refusals["refusals"][0];
    assert_eq!(
        (&refusal["reason"], &refusal["opened"]),
        (&"no-healthy-upstream".into(), &false.into())
    );
    assert_eq!(refusal["destination"], unserved.to_string());
}

#[tokio::test]
async fn what_the_mesh_told_in_vain_is_named_until_it_is_told_right() {
    let stage = Pair::new().unwrap();
    let mut mesh = stage.mesh();
    mesh.workload(&stage.web).set(
        "waypoint",
        "{destination: 'nonsense', hboneMtlsPort: 15008}",
    );
    let cluster = stage.start(&mesh, &[]).await.unwrap();
    let rejected = async || {
        let dump = cluster.proxy(0).document("/config_dump").await.unwrap();
        dump["controlPlane"]["rejected"].as_array().unwrap().clone()
    };
    let told = rejected().await;
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0]["name"].as_str().unwrap().contains("web") && told[0]["reason"].is_string(),
        "{told:?}"
    );
    stage.mesh().write(&cluster.mesh_file).unwrap();
    wait::until(wait::SOON, "the fault is gone", async || {
        rejected().await.is_empty().then_some(())
    })
    .await;
}

/// The head of the answer, and its body.
async fn raw(stage: &Pair, path: &str) -> (String, Vec<u8>) {
    let admin = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), ADMIN_PORT);
    let netns = stage.world.node(0).proxy_netns();
    let mut stream = traffic::connect(netns, admin).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let reading = stream.read_to_end(&mut answer);
    wait::within(6 * wait::SOON, path, reading).await.unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let body = answer.split_off(end.expect("a head") + 4);
    (String::from_utf8(answer).unwrap().to_lowercase(), body)
}

#[tokio::test]
async fn processor_time_is_profiled_one_at_a_time() {
    let stage = Pair::new().unwrap();
    // A root file system that cannot be written to, and no place for temporary files.
    let cluster = stage
        .start(&stage.mesh(), &[("TMPDIR", "/nonexistent")])
        .await
        .unwrap();
    for query in [
        "seconds=0",
        "seconds=301",
        "seconds=x",
        "frequency=0",
        "frequency=1001",
    ] {
        let path = format!("/debug/pprof/profile?{query}");
        let answer = cluster.proxy(0).get(ADMIN_PORT, &path).await.unwrap();
        assert_eq!(answer.status, 400, "{query}");
        assert!(answer.body.starts_with(query.split('=').next().unwrap()));
    }
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let busy = async {
        loop {
            stage.web.ask(Pair::SERVICE, b"hello").await.unwrap();
        }
    };
    let second = async {
        let path = "/debug/pprof/profile?seconds=1";
        wait::until(wait::SOON, "one is busy", async || {
            let (head, _) = raw(&stage, path).await;
            head.contains(" 409 ").then_some(())
        })
        .await;
    };
    let profiling = async {
        loop {
            let path = "/debug/pprof/profile?seconds=5&frequency=500";
            let (head, body) = raw(&stage, path).await;
            // The other one may have come first.
            if !head.contains(" 409 ") {
                return (head, body);
            }
        }
    };
    let both = async { tokio::join!(profiling, second).0 };
    let (head, body) = tokio::select! {
        answer = both => answer,
        () = busy => unreachable!("it never ends"),
    };
    let body = String::from_utf8_lossy(&body);
    if head.contains(" 200 ") {
        assert!(!head.contains("content-type"), "{head}");
        // The names of functions are in it as they are.
        for name in ["culvert::flow::", "tokio::runtime::", "nanoseconds"] {
            assert!(body.contains(name), "{name}: {} bytes", body.len());
        }
    } else {
        // Not everybody who runs tests may sample.
        assert!(body.contains("perf_event_paranoid"), "{head}\n{body}");
        let users = std::fs::read_to_string("/proc/self/uid_map").unwrap();
        assert!(!users.contains("4294967295"), "root may sample: {body}");
    }
}

#[tokio::test]
async fn a_profile_of_memory_that_was_not_built_in_is_refused_with_the_way_to_it() {
    let stage = Pair::new().unwrap();
    let cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    for path in [
        "/debug/pprof/heap",
        "/debug/pprof/heap/profiling?activate=true",
    ] {
        let answer = cluster.proxy(0).get(ADMIN_PORT, path).await.unwrap();
        assert_eq!(answer.status, 500, "{path}");
        assert!(
            answer.body.contains("--features heap-profile"),
            "{}",
            answer.body
        );
    }
    let path = "/debug/pprof/heap/profiling?activate=maybe";
    let answer = cluster.proxy(0).get(ADMIN_PORT, path).await.unwrap();
    assert_eq!(answer.status, 400);
}
