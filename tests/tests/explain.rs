//! `culvert explain`: what it says about a connection is what the connection then does.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    net::{IpAddr, SocketAddr},
    process::Stdio,
};

use serde_json::Value;
use testkit::{
    Cluster, Istiod, Mesh, Pod, PodSpec, Proxy, ProxyOptions,
    mesh::{Match, Policy, StringMatch},
    proxy,
    raw::{Hello, RawClient},
    stage::Pair,
    traffic::{self, Behaviour},
    wait,
    world::Node,
};
use tonic::Status;

/// Runs `culvert explain` beside a proxy; its standard output.
async fn explain(stage: &Pair, from: &str, to: &str, output: &str) -> anyhow::Result<String> {
    let mut command = std::process::Command::new(proxy::binary()?);
    command.args(["explain", "--from", from, "--to", to, "--output", output]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let running = stage.world.node(0).proxy_netns().spawn(command)?;
    let done = running.child.wait_with_output().await?;
    let error = String::from_utf8(done.stderr)?;
    anyhow::ensure!(done.status.success(), "{error}");
    Ok(String::from_utf8(done.stdout)?)
}

async fn explained(stage: &Pair, from: &str, to: &str) -> Value {
    let text = explain(stage, from, to, "json").await.unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Makes the connection that is explained; whether it got an answer.
async fn admitted(from: &Pod, to: SocketAddr) -> bool {
    from.ask(to, b"hello")
        .await
        .is_ok_and(|echo| echo == b"hello")
}

/// The `dst.addr` of the last connection that the source's proxy tells of.
async fn dialled(proxy: &Proxy<'_>, mark: usize) -> String {
    let log = proxy.log();
    let line = log
        .wait_from(mark, "a route", |line| line.is_access("connection opened"))
        .await;
    line.field("dst.addr").to_owned()
}

async fn reason(proxy: &Proxy<'_>, message: &str, mark: usize) -> String {
    let line = proxy
        .log()
        .wait_from(mark, message, |line| line.is_access(message))
        .await;
    line.fields.get("reason").cloned().unwrap_or_default()
}

/// The reason of the last refusal, which early refusals have nowhere else.
async fn last_refusal(proxy: &Proxy<'_>) -> String {
    let told = proxy.document("/debug/refusals").await.unwrap();
    told["refusals"][0]["reason"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_allowed_connection_goes_where_it_is_said_to_go() {
    let stage = Pair::new().unwrap();
    let mut mesh = stage.mesh();
    let other = Match {
        principals: vec![StringMatch::Exact(
            "cluster.local/ns/shop/sa/other".to_owned(),
        )],
        ..Match::default()
    };
    mesh.policy(Policy::deny("no-other", vec![other]));
    mesh.policy(Policy::new(
        "web",
        "Allow",
        vec![vec![vec![Match::pod(&stage.web)]]],
    ));
    let cluster = stage.start(&mesh, &[]).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let told = explained(&stage, "shop/web", "api:80").await;
    assert_eq!(told["to"], Pair::SERVICE.to_string());
    assert_eq!(told["owner"], "service shop/api.shop.svc.cluster.local");
    assert_eq!(told["endpoints"][0]["eligible"], true);
    assert_eq!(told["endpoints"][0]["because"], "port 8080");
    assert_eq!(told["route"]["kind"], "hbone");
    assert_eq!(told["route"]["authority"], stage.api.at(8080).to_string());
    assert_eq!(told["route"]["expected"][0], stage.api.spiffe_id());
    assert_eq!(told["from"]["certificate"], "Available");
    let policies = told["policy"]["policies"].as_array().unwrap();
    let of = |key: &str| policies.iter().find(|one| one["key"] == key).unwrap();
    assert_eq!(of("shop/web")["because"], "rule 1 matches");
    let why = of("shop/no-other")["because"].as_str().unwrap();
    let identity = stage.web.spiffe_id();
    assert_eq!(why, format!("rule 1, clause 1: principals (is {identity})"));
    assert_eq!(told["outcome"]["allowed"], true);

    let mark = cluster.proxy(0).log().mark();
    assert!(admitted(&stage.web, Pair::SERVICE).await);
    assert_eq!(
        told["route"]["dialled"],
        dialled(cluster.proxy(0), mark).await
    );

    let text = explain(&stage, "web", "10.96.0.1:80", "text")
        .await
        .unwrap();
    assert!(
        text.contains("+ shop/web (ALLOW): rule 1 matches"),
        "{text}"
    );
    assert!(
        text.ends_with("outcome    allowed: allow policy match: shop/web\n"),
        "{text}"
    );
}

#[tokio::test]
async fn a_denied_connection_is_said_to_be_denied() {
    let stage = Pair::new().unwrap();
    let mut mesh = stage.mesh();
    mesh.policy(Policy::deny("not-8080", vec![Match::port(8080)]));
    let cluster = stage.start(&mesh, &[]).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let told = explained(&stage, "shop/web", &Pair::SERVICE.to_string()).await;
    let mark = cluster.proxy(0).log().mark();
    assert!(!admitted(&stage.web, Pair::SERVICE).await);
    assert_eq!(told["outcome"]["allowed"], false);
    assert_eq!(
        told["outcome"]["because"],
        "explicitly denied by: shop/not-8080"
    );
    assert_eq!(
        told["outcome"]["reason"],
        reason(cluster.proxy(0), "connection complete", mark).await
    );
    assert_eq!(
        reason(cluster.proxy(1), "connection complete", 0).await,
        "policy-denied"
    );
}

/// Each refusal in the words, and with the reason, of the connection that then fails.
#[tokio::test]
async fn refusals_are_those_of_the_data_path() {
    let stage = Pair::new().unwrap();
    let mut mesh = stage.mesh();
    mesh.workload(&stage.api).status = "Unhealthy".to_owned();
    let lost = mesh.service(
        "lost",
        IpAddr::from([10, 96, 0, 2]),
        &[(80, 8080)],
        &[&stage.api],
    );
    lost.set(
        "waypoint",
        "{destination: '/10.96.0.9', hboneMtlsPort: 15008}",
    );
    let cluster = stage.start(&mesh, &[]).await.unwrap();
    let lost = SocketAddr::from(([10, 96, 0, 2], 80));
    for (to, expected) in [
        (Pair::SERVICE, "no-healthy-upstream"),
        (lost, "unknown-waypoint"),
    ] {
        let told = explained(&stage, "shop/web", &to.to_string()).await;
        assert_eq!(told["outcome"]["reason"], expected, "{told}");
        stage.web.turned_away(to).await.unwrap();
        assert_eq!(last_refusal(cluster.proxy(0)).await, expected);
        let line = cluster.proxy(0).log();
        let because = told["outcome"]["because"].as_str().unwrap().to_owned();
        line.wait(&because, |line| {
            line.is_access("connection failed") && line.field("error") == because
        })
        .await;
    }
    let told = explained(&stage, "shop/web", &Pair::SERVICE.to_string()).await;
    assert_eq!(told["endpoints"][0]["because"], "unhealthy");
}

/// A tunnel takes a certificate of the source; without one no policy is asked.
#[tokio::test]
async fn a_certificate_that_cannot_be_had_is_the_reason() {
    let stage = Pair::new().unwrap();
    let home = stage.world.node(0).pod(&PodSpec::plain("ca")).unwrap();
    let ca = Istiod::options().start(&stage.world, &home).unwrap();
    ca.refuse_to_sign(Status::invalid_argument("not for you"));
    let mesh_file = ProxyOptions::mesh_file(&stage.world);
    stage.mesh().write(&mesh_file).unwrap();
    let options = |node: &Node| ProxyOptions::new(&stage.world, node).certified_by(&ca);
    let cluster = Cluster::run(&stage.world, options, &[&stage.web, &stage.api]).await;
    let cluster = cluster.unwrap();
    assert!(!admitted(&stage.web, Pair::SERVICE).await);
    let told = explained(&stage, "shop/web", "api:80").await;
    assert_eq!(told["route"]["kind"], "hbone");
    assert_eq!(told["outcome"]["allowed"], false);
    let certificate = told["from"]["certificate"].as_str().unwrap();
    assert!(certificate.starts_with("Unavailable: "), "{certificate}");
    let because = told["outcome"]["because"].as_str().unwrap();
    assert!(because.contains("not for you"), "{because}");
    assert_eq!(
        told["outcome"]["reason"],
        reason(cluster.proxy(0), "connection complete", 0).await
    );
}

#[tokio::test]
async fn a_waypoint_on_the_way_is_said_to_be_dialled() {
    let stage = Pair::new().unwrap();
    let way = stage.world.node(1).pod(&PodSpec::captured("way")).unwrap();
    let mut mesh = Mesh::of(&[&stage.web, &stage.api, &way]);
    mesh.service(
        "way",
        IpAddr::from([10, 96, 0, 9]),
        &[(15008, 15008)],
        &[&way],
    );
    let service = mesh.service("api", Pair::SERVICE.ip(), &[(80, 8080)], &[&stage.api]);
    service.set(
        "waypoint",
        "{destination: 'shop/way.shop.svc.cluster.local', hboneMtlsPort: 15008}",
    );
    let pods = [&stage.web, &stage.api, &way];
    let cluster = Cluster::start(&stage.world, &mesh, &pods).await.unwrap();
    let told = explained(&stage, "shop/web", "api:80").await;
    assert_eq!(told["route"]["via"], "waypoint");
    assert_eq!(told["route"]["authority"], Pair::SERVICE.to_string());
    assert_eq!(
        told["waypoints"][0],
        "shop/way.shop.svc.cluster.local:15008"
    );
    assert_eq!(told.get("around"), None);
    // By its own address the pod is reached without.
    let pod = stage.api.at(8080).to_string();
    let told = explained(&stage, "shop/web", &pod).await;
    assert_eq!(told["around"][0], "shop/api.shop.svc.cluster.local");
    assert_eq!(told["route"]["via"], "workload");
    let text = explain(&stage, "shop/web", &pod, "text").await.unwrap();
    let line = "around     the waypoint of shop/api.shop.svc.cluster.local: a pod is dialled\n";
    assert!(text.contains(line), "{text}");
    let told = explained(&stage, "shop/web", "api:80").await;

    let mark = cluster.proxy(0).log().mark();
    // Nobody serves at the waypoint; where the proxy goes is what counts.
    assert!(!admitted(&stage.web, Pair::SERVICE).await);
    assert_eq!(
        told["route"]["dialled"],
        dialled(cluster.proxy(0), mark).await
    );
}

/// Who is behind the waypoint judges the waypoint, and says so to it.
#[tokio::test]
async fn policies_behind_a_waypoint_are_asked_about_the_waypoint() {
    let stage = Pair::new().unwrap();
    let way = stage.world.node(1).pod(&PodSpec::plain("way")).unwrap();
    let mut mesh = Mesh::of(&[&stage.web, &stage.api, &way]);
    "HBONE".clone_into(&mut mesh.workload(&way).protocol);
    let reference = format!("{{destination: '/{}', hboneMtlsPort: 15008}}", way.ip4());
    mesh.workload(&stage.api).set("waypoint", &reference);
    let service = mesh.service("api", Pair::SERVICE.ip(), &[(80, 8080)], &[&stage.api]);
    service.set("waypoint", &reference);
    mesh.policy(Policy::deny("no-way", vec![Match::pod(&way)]));
    let cluster = stage.start(&mesh, &[]).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let hello = Hello::new(&stage.world.authority().issue(&way.spiffe_id()).unwrap());
    for allowed in [false, true] {
        for to in [Pair::SERVICE, stage.api.at(8080)] {
            let told = explained(&stage, "shop/web", &to.to_string()).await;
            assert_eq!(told["route"]["via"], "waypoint");
            let behind = &told["behind"][0];
            assert_eq!(behind["at"], stage.api.at(8080).to_string());
            assert_eq!(behind["policy"]["allowed"], allowed, "{told}");
            assert_eq!(told["outcome"]["allowed"], true, "the waypoint takes it");
        }
        let target = stage.api.at(8080).to_string();
        let client = RawClient::connect(way.netns(), stage.api.at(15008), &hello);
        let client = client.await.unwrap();
        // The other proxy may read the file a moment later.
        let says_so = async || {
            let status = client.status(&target).await.unwrap();
            (status == if allowed { 200 } else { 401 }).then_some(())
        };
        wait::until(wait::SOON, "the answer that was told", says_so).await;
        mesh.policies.clear();
        mesh.write(&cluster.mesh_file).unwrap();
        let gone = async || {
            let told = explained(&stage, "shop/web", "api:80").await;
            let policies = told["behind"][0]["policy"]["policies"].as_array()?.len();
            (policies == 0).then_some(())
        };
        wait::until(wait::SOON, "the policy has gone", gone).await;
    }
    let text = explain(&stage, "web", "api:80", "text").await.unwrap();
    let line = format!(
        "behind     {} (Kubernetes//Pod/shop/api): no allow policies, allow",
        stage.api.at(8080)
    );
    assert!(text.contains(&line), "{text}");
}

#[tokio::test]
async fn a_policy_that_is_waited_for_is_named() {
    let stage = Pair::new().unwrap();
    let mut mesh = stage.mesh();
    mesh.workload(&stage.api).authorization_policies = vec!["shop/late".to_owned()];
    let cluster = stage.start(&mesh, &[]).await.unwrap();
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let told = explained(&stage, "shop/web", "api:80").await;
    assert_eq!(told["policy"]["waitsFor"][0], "shop/late");
    let because = told["outcome"]["because"].as_str().unwrap();
    assert_eq!(
        because,
        "waits for policy shop/late, 5s at most; without it: no allow policies, allow"
    );
    let mut call = stage.web.connect(Pair::SERVICE).await.unwrap();
    let log = cluster.proxy(1).log();
    log.wait("the flow is held", |line| {
        line.is_access("connection opened")
    })
    .await;
    assert!(app.peers().is_empty());
    mesh.policy(Policy::deny("late", vec![Match::port(9)]).selected());
    mesh.write(&cluster.mesh_file).unwrap();
    traffic::ping(&mut call, b"waited").await.unwrap();
    // The other node is the one that held the flow: this one may hear of the policy later.
    wait::until(wait::SOON, "nothing is waited for", async || {
        let told = explained(&stage, "shop/web", "api:80").await;
        told["policy"].get("waitsFor").is_none().then_some(())
    })
    .await;
}

#[tokio::test]
async fn strangers_are_passed_through_and_unknown_pods_are_refused() {
    let stage = Pair::new().unwrap();
    let outside = stage.world.node(1).pod(&PodSpec::plain("outside")).unwrap();
    let ghost = stage
        .world
        .node(0)
        .pod(&PodSpec::captured("ghost"))
        .unwrap();
    let pods = [&stage.web, &stage.api, &ghost];
    let env = [("WORKLOAD_WAIT", "1s")].into();
    let cluster = Cluster::start_with(&stage.world, &stage.mesh(), &pods, &env)
        .await
        .unwrap();
    let _app = outside.serve(80, Behaviour::Echo).unwrap();
    let to = outside.at(80);
    let told = explained(&stage, "shop/web", &to.to_string()).await;
    assert_eq!(
        (&told["route"]["kind"], &told["owner"]),
        (&"passthrough".into(), &"nobody in the mesh".into())
    );
    let mark = cluster.proxy(0).log().mark();
    assert!(admitted(&stage.web, to).await);
    assert_eq!(
        told["route"]["dialled"],
        dialled(cluster.proxy(0), mark).await
    );

    let told = explained(&stage, "shop/ghost", &to.to_string()).await;
    assert!(!admitted(&ghost, to).await);
    assert_eq!(
        told["outcome"]["reason"],
        last_refusal(cluster.proxy(0)).await
    );
    assert_eq!(told["outcome"]["reason"], "unknown-local");
}

#[tokio::test]
async fn questions_that_make_no_sense_are_refused() {
    let stage = Pair::new().unwrap();
    let _cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    for (to, part) in [
        ("api", "is not HOST:PORT"),
        ("elsewhere.example:80", "no service of the mesh"),
    ] {
        let error = explain(&stage, "shop/web", to, "text")
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(part), "{error}");
    }
    let mut command = std::process::Command::new(proxy::binary().unwrap());
    command.args([
        "explain",
        "--from",
        "a",
        "--to",
        "b:1",
        "--admin",
        "127.0.0.1:1",
    ]);
    let output = command.output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("cannot ask the admin server at 127.0.0.1:1"),
        "{error}"
    );
    assert_eq!(output.status.code(), Some(1));
}
