//! Who may reach whom: authorization, at the start of a connection and while it lasts.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use testkit::{
    Cluster, Mesh, Pod, PodSpec, World,
    mesh::{Match, Policy, StringMatch},
    stage::ForeignClient,
    traffic::{self, Behaviour, Server},
    wait,
};

/// `web` and `intruder` are captured, `outside` is not; all call `api`.
struct Stage {
    world: World,
    web: Arc<Pod>,
    intruder: Arc<Pod>,
    outside: Arc<Pod>,
    api: Arc<Pod>,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
        let intruder = world
            .node(0)
            .pod(&PodSpec::captured("intruder").namespace("dark"))
            .unwrap();
        let outside = world.node(0).pod(&PodSpec::plain("outside")).unwrap();
        let api = world.node(1).pod(&PodSpec::captured("api")).unwrap();
        Self {
            world,
            web,
            intruder,
            outside,
            api,
        }
    }

    fn mesh(&self) -> Mesh {
        Mesh::of(&[&self.web, &self.intruder, &self.api])
    }

    async fn start(&self, mesh: &Mesh) -> Cluster<'_> {
        let env = BTreeMap::from([("AUTHZ_POLICY_INFO_LOGGING", "true")]);
        Cluster::start_with(
            &self.world,
            mesh,
            &[&self.web, &self.intruder, &self.api],
            &env,
        )
        .await
        .unwrap()
    }

    /// Whether `web`, `intruder` and `outside` get an answer.
    async fn admitted(&self, to: SocketAddr) -> [bool; 3] {
        let mut answers = [false; 3];
        for (answer, pod) in answers
            .iter_mut()
            .zip([&self.web, &self.intruder, &self.outside])
        {
            *answer = pod
                .ask(to, b"hello")
                .await
                .is_ok_and(|echo| echo == b"hello");
        }
        answers
    }
}

/// One policy set, and who it lets in.
struct Case {
    what: &'static str,
    policies: Vec<Policy>,
    admitted: [bool; 3],
}

fn case(what: &'static str, policies: Vec<Policy>, admitted: [bool; 3]) -> Case {
    Case {
        what,
        policies,
        admitted,
    }
}

/// What the levels of a policy mean when they are empty, and how several combine.
fn structure(stage: &Stage) -> Vec<Case> {
    let none = |action| Policy::new("none", action, vec![]);
    let any = || Policy::new("any", "Allow", vec![vec![]]);
    let web = || Policy::deny("web", vec![Match::pod(&stage.web)]);
    let elsewhere = Policy {
        namespace: "elsewhere".to_owned(),
        ..none("Allow")
    };
    let global = Policy {
        namespace: "istio-system".to_owned(),
        scope: "Global".to_owned(),
        ..Policy::deny("global", vec![Match::pod(&stage.intruder)])
    };
    let clauses = vec![vec![Match::pod(&stage.web)], vec![Match::port(8080)]];
    let both = Policy::new("both", "Allow", vec![clauses]);
    let empty = Policy::deny("empty-match", vec![Match::default()]);
    vec![
        case("no policy", vec![], [true, true, true]),
        case(
            "ALLOW without rules",
            vec![none("Allow")],
            [false, false, false],
        ),
        case("DENY without rules", vec![none("Deny")], [true, true, true]),
        case("ALLOW with an empty rule", vec![any()], [true, true, true]),
        case("DENY one pod", vec![web()], [false, true, true]),
        case("a match without fields", vec![empty], [true, true, true]),
        case("DENY beats ALLOW", vec![any(), web()], [false, true, true]),
        case("ALLOW pod and port", vec![both], [true, false, false]),
        case(
            "another namespace's policy",
            vec![elsewhere],
            [true, true, true],
        ),
        case("a global policy", vec![global], [true, false, true]),
        case(
            "an unselected policy",
            vec![none("Allow").selected()],
            [true, true, true],
        ),
    ]
}

/// What the fields of a match mean, with and without an identity.
fn fields(stage: &Stage) -> Vec<Case> {
    let somebody = || vec![StringMatch::Presence(vec![])];
    let any_principal = Match {
        principals: somebody(),
        ..Match::default()
    };
    let no_principal = Match {
        not_principals: somebody(),
        ..Match::default()
    };
    let suffix = vec![StringMatch::Suffix("/sa/web".to_owned())];
    let suffix = Match {
        principals: suffix,
        ..Match::default()
    };
    let shop = vec![StringMatch::Exact("shop".to_owned())];
    let not_shop = Match {
        not_namespaces: shop,
        ..Match::default()
    };
    let source = Match {
        source_ips: vec![format!("{}/32", stage.outside.ip4())],
        ..Match::default()
    };
    let deny = |what, rule| {
        case(
            what,
            vec![Policy::deny("deny", vec![rule])],
            [true, true, false],
        )
    };
    let allow =
        |what, rule, admitted| case(what, vec![Policy::allow("allow", vec![rule])], admitted);
    vec![
        deny("DENY plaintext", no_principal),
        deny("DENY a source address", source),
        case(
            "DENY other namespaces",
            vec![Policy::deny("not-shop", vec![not_shop])],
            [true, false, false],
        ),
        allow("ALLOW any principal", any_principal, [true, true, false]),
        allow("ALLOW a suffix", suffix, [true, false, false]),
        allow(
            "ALLOW one pod",
            Match::pod(&stage.web),
            [true, false, false],
        ),
        allow(
            "ALLOW another port",
            Match::port(9090),
            [false, false, false],
        ),
    ]
}

#[tokio::test]
async fn policies_admit_whom_they_should() {
    let stage = Stage::new();
    let cluster = stage.start(&stage.mesh()).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    for case in structure(&stage).into_iter().chain(fields(&stage)) {
        let mesh = Mesh {
            policies: case.policies,
            ..stage.mesh()
        };
        mesh.write(&cluster.mesh_file).unwrap();
        let mut last = [false; 3];
        let settles = async || {
            last = stage.admitted(app.address).await;
            (last == case.admitted).then_some(())
        };
        let what = format!(
            "{}: web, intruder, outside admitted {:?}",
            case.what, case.admitted
        );
        wait::until(wait::SOON, &what, settles).await;
    }
}

#[tokio::test]
async fn denials_are_flagged_logged_and_never_reach_the_application() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.policy(Policy::deny("web", vec![Match::pod(&stage.web)]));
    mesh.policy(Policy::allow(
        "some",
        vec![Match::pod(&stage.web), Match::port(9999)],
    ));
    let cluster = stage.start(&mesh).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    assert_eq!(stage.admitted(app.address).await, [false; 3]);
    assert!(app.peers().is_empty());
    let log = cluster.proxy(1).log();
    for reason in [
        "explicitly denied by: shop/web",
        "allow policies exist, but none allowed",
    ] {
        let text = format!("connection closed due to policy rejection: {reason}");
        let line = log
            .wait(reason, |line| {
                line.is_access("connection complete") && line.field("error") == text
            })
            .await;
        assert_eq!(line.level, "error");
    }
    let note = log
        .wait("authorization log", |line| {
            line.message == "deny policy match"
        })
        .await;
    assert_eq!(
        (note.level.as_str(), note.field("policy")),
        ("info", "shop/web")
    );
    let denied = [("response_flags", "DENY"), ("reporter", "destination")];
    cluster
        .proxy(1)
        .metric("istio_tcp_connections_failed_total", &denied, |count| {
            count == 3.0
        })
        .await;
    // The calling side only learns the status.
    let refusal = cluster
        .proxy(0)
        .log()
        .wait("401", |line| {
            line.field("error")
                .contains("http status: 401 Unauthorized")
        })
        .await;
    assert_eq!(refusal.field("direction"), "outbound");
    let flags = [("response_flags", "CONNECT"), ("reporter", "source")];
    cluster
        .proxy(0)
        .metric("istio_tcp_connections_failed_total", &flags, |count| {
            count == 2.0
        })
        .await;
}

#[tokio::test]
async fn strictness_is_per_port() {
    let stage = Stage::new();
    let plaintext = |ports: Match| Match {
        not_principals: vec![StringMatch::Presence(vec![])],
        ..ports
    };
    let mut mesh = stage.mesh();
    mesh.policy(Policy::deny(
        "strict-but-9090",
        vec![plaintext(Match {
            not_destination_ports: vec![9090],
            ..Match::default()
        })],
    ));
    let cluster = stage.start(&mesh).await;
    let (strict, lax) = (
        stage.api.serve(8080, Behaviour::Echo).unwrap(),
        stage.api.serve(9090, Behaviour::Echo).unwrap(),
    );
    assert_eq!(stage.admitted(strict.address).await, [true, true, false]);
    assert_eq!(stage.admitted(lax.address).await, [true; 3]);
    mesh.policies = vec![Policy::deny(
        "strict-8080",
        vec![plaintext(Match::port(8080))],
    )];
    mesh.write(&cluster.mesh_file).unwrap();
    let settles =
        async || (stage.admitted(strict.address).await == [true, true, false]).then_some(());
    wait::until(wait::SOON, "only 8080 is strict", settles).await;
    assert_eq!(stage.admitted(lax.address).await, [true; 3]);
}

#[tokio::test]
async fn a_dry_run_only_tells_and_a_missing_policy_only_warns() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.policy(Policy {
        dry_run: true,
        ..Policy::deny("trial", vec![Match::pod(&stage.web)])
    });
    mesh.policy(Policy::deny("real", vec![Match::pod(&stage.intruder)]).selected());
    mesh.workload(&stage.api).authorization_policies =
        vec!["shop/missing".to_owned(), "shop/real".to_owned()];
    let cluster = stage.start(&mesh).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    assert_eq!(stage.admitted(app.address).await, [true, false, true]);
    let log = cluster.proxy(1).log();
    let trial = |line: &testkit::Line| line.message == "dry-run: deny policy match";
    assert_eq!(
        log.wait("dry run", trial).await.field("policy"),
        "shop/trial"
    );
    assert_eq!(
        log.since(0, trial).len(),
        1,
        "one line for the one connection that matched"
    );
    log.wait("the missing policy", |line| {
        line.level == "warn" && line.raw.contains("shop/missing")
    })
    .await;
}

/// Opens a connection that stays.
async fn open(pod: &Pod, app: &Server) -> tokio::net::TcpStream {
    let mut stream = pod.connect(app.address).await.unwrap();
    traffic::ping(&mut stream, b"open").await.unwrap();
    stream
}

#[tokio::test]
async fn a_new_policy_ends_the_connections_that_it_forbids_and_no_other() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    let cluster = stage.start(&mesh).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut web = open(&stage.web, &app).await;
    let mut intruder = open(&stage.intruder, &app).await;
    let mut outside = open(&stage.outside, &app).await;
    mesh.policy(Policy::allow("web", vec![Match::pod(&stage.web)]));
    mesh.write(&cluster.mesh_file).unwrap();
    for stream in [&mut intruder, &mut outside] {
        traffic::closed(stream, wait::SOON).await.unwrap();
    }
    traffic::ping(&mut web, b"allowed").await.unwrap();
    let log = cluster.proxy(1).log();
    let closed = |line: &testkit::Line| {
        line.field("error")
            == "connection closed due to policy change: allow policies exist, but none allowed"
    };
    log.wait("the reason", closed).await;
    let flags = [("response_flags", "DENY")];
    cluster
        .proxy(1)
        .metric("istio_tcp_connections_failed_total", &flags, |count| {
            count == 2.0
        })
        .await;
    mesh.policies.clear();
    mesh.write(&cluster.mesh_file).unwrap();
    let again = async || (stage.admitted(app.address).await == [true; 3]).then_some(());
    wait::until(wait::SOON, "all are admitted again", again).await;
    traffic::ping(&mut web, b"never touched").await.unwrap();
}

#[tokio::test]
async fn a_policy_attached_to_a_live_workload_ends_what_it_forbids_and_no_other() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.policy(Policy::deny("not-you", vec![Match::pod(&stage.intruder)]).selected());
    let cluster = stage.start(&mesh).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut web = open(&stage.web, &app).await;
    let mut intruder = open(&stage.intruder, &app).await;
    // The policy is known all along; only the record of the workload changes.
    mesh.workload(&stage.api).authorization_policies = vec!["shop/not-you".to_owned()];
    mesh.write(&cluster.mesh_file).unwrap();
    traffic::closed(&mut intruder, wait::SOON).await.unwrap();
    traffic::ping(&mut web, b"allowed").await.unwrap();
    let closed = |line: &testkit::Line| {
        line.field("error")
            == "connection closed due to policy change: explicitly denied by: shop/not-you"
    };
    let log = cluster.proxy(1).log();
    log.wait("the reason", closed).await;
    assert_eq!(log.since(0, closed).len(), 1, "one connection was cut");
}

#[tokio::test]
async fn a_revoked_stream_is_cancelled_and_its_siblings_live_on() {
    let foreign = ForeignClient::new().unwrap();
    let mut mesh = foreign.mesh();
    let cluster = Cluster::start(&foreign.world, &mesh, &[&foreign.api])
        .await
        .unwrap();
    let talk = foreign.talk_over(cluster, Behaviour::Echo).await;
    let _two = foreign.api.serve(8081, Behaviour::Echo).unwrap();
    let second = foreign.target(8081);
    let mut revoked = talk.tunnel().await;
    let mut sibling = talk.client.tunnel(&second).await.unwrap();
    revoked.ping(b"one").await.unwrap();
    sibling.ping(b"two").await.unwrap();
    mesh.policy(Policy::deny("no-8080", vec![Match::port(8080)]));
    mesh.write(&talk.cluster.mesh_file).unwrap();
    assert_eq!(revoked.reset().await.unwrap(), h2::Reason::CANCEL);
    sibling.ping(b"lives on").await.unwrap();
    assert_eq!(talk.client.status(&talk.target).await.unwrap(), 401);
    assert_eq!(talk.client.status(&second).await.unwrap(), 200);
}

/// What istiod makes of a mesh-wide STRICT.
const STATIC_STRICT: &str = "istio-system/istio_converted_static_strict";

fn static_strict() -> Policy {
    let nobody = Match {
        not_principals: vec![StringMatch::Presence(vec![])],
        ..Match::default()
    };
    Policy {
        namespace: "istio-system".to_owned(),
        ..Policy::deny("istio_converted_static_strict", vec![nobody]).selected()
    }
}

#[tokio::test]
async fn mutual_tls_made_mandatory_ends_plaintext_that_is_open_and_nothing_else() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.policy(static_strict());
    let cluster = stage.start(&mesh).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut web = open(&stage.web, &app).await;
    let mut outside = open(&stage.outside, &app).await;
    mesh.workload(&stage.api).authorization_policies = vec![STATIC_STRICT.to_owned()];
    mesh.write(&cluster.mesh_file).unwrap();
    traffic::closed(&mut outside, wait::SOON).await.unwrap();
    traffic::ping(&mut web, b"mutual").await.unwrap();
    assert_eq!(stage.admitted(app.address).await, [true, true, false]);
}

#[tokio::test]
async fn mandatory_mutual_tls_needs_no_more_than_its_name() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.workload(&stage.api).authorization_policies = vec![STATIC_STRICT.to_owned()];
    let cluster = stage.start(&mesh).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    assert_eq!(stage.admitted(app.address).await, [true, true, false]);
    let log = cluster.proxy(1).log();
    let denied = |line: &testkit::Line| line.field("error").ends_with(STATIC_STRICT);
    let line = log.wait("the denial", denied).await;
    let millis: u32 = line
        .field("duration")
        .trim_end_matches("ms")
        .parse()
        .unwrap();
    assert!(millis < 4_000, "it was waited for, {millis} ms");
}

#[tokio::test]
async fn a_policy_on_its_way_is_waited_for() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.workload(&stage.api).authorization_policies = vec!["shop/late".to_owned()];
    let cluster = stage.start(&mesh).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let log = cluster.proxy(1).log();
    let mut calls = Vec::new();
    for pod in [&stage.web, &stage.intruder, &stage.outside] {
        let call = pod.connect(app.address).await.unwrap();
        // Behind a tunnel the port is another one.
        let opened = |line: &testkit::Line| {
            line.is_access("connection opened")
                && line
                    .field("src.addr")
                    .starts_with(&format!("{}:", pod.ip4()))
        };
        log.wait("the flow is known", opened).await;
        calls.push(call);
    }
    assert!(
        app.peers().is_empty(),
        "a flow was let in before its policy"
    );
    mesh.policy(Policy::deny("late", vec![Match::pod(&stage.intruder)]).selected());
    mesh.write(&cluster.mesh_file).unwrap();
    let [web, intruder, outside] = &mut calls[..] else {
        unreachable!()
    };
    traffic::closed(intruder, wait::SOON).await.unwrap();
    traffic::ping(web, b"waited").await.unwrap();
    traffic::ping(outside, b"waited").await.unwrap();
    assert_eq!(app.peers().len(), 2);
}

#[tokio::test]
async fn a_change_of_identity_ends_what_the_pod_did_under_the_old_one() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    let cluster = stage.start(&mesh).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let plain = stage.outside.serve(8080, Behaviour::Echo).unwrap();
    let mut web = open(&stage.web, &app).await;
    let mut intruder = open(&stage.intruder, &app).await;
    let mut outwards = open(&stage.web, &plain).await;
    mesh.workload(&stage.web).trust_domain = "renamed.example".to_owned();
    mesh.write(&cluster.mesh_file).unwrap();
    traffic::closed(&mut web, wait::SOON).await.unwrap();
    let log = cluster.proxy(0).log();
    let changed = |line: &testkit::Line| line.field("reason") == "identity-changed";
    let line = log.wait("the reason", changed).await;
    assert_eq!(line.field("direction"), "outbound");
    traffic::ping(&mut intruder, b"another pod").await.unwrap();
    traffic::ping(&mut outwards, b"no identity was shown")
        .await
        .unwrap();

    // A record that is gone says nothing about who the pod is.
    mesh.workloads.retain(|workload| workload.name != "api");
    mesh.write(&cluster.mesh_file).unwrap();
    let gone = "istio_mesh_resources";
    let labels = [("kind", "workload")];
    cluster
        .proxy(1)
        .metric(gone, &labels, |count| count == 2.0)
        .await;
    traffic::ping(&mut intruder, b"goes on").await.unwrap();
}

/// A layer-7 attribute leaves a rule of which nothing is left to compare: who wrote it believes in a denial that there is not.
#[tokio::test]
async fn rules_that_can_never_match_are_warned_of() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.policy(Policy::deny("paths", vec![Match::default()]));
    let schemed = Match {
        principals: vec![StringMatch::Exact(stage.intruder.spiffe_id())],
        ..Match::default()
    };
    mesh.policy(Policy::deny("scheme", vec![schemed]));
    mesh.policy(Policy::deny("good", vec![Match::port(9)]));
    let cluster = stage.start(&mesh).await;
    let log = cluster.proxy(1).log();
    for (policy, why) in [
        ("shop/paths", "nothing to compare is left of a condition"),
        ("shop/scheme", "a principal begins with spiffe://"),
    ] {
        let line = log
            .wait(policy, |line| {
                line.field("policy") == policy && line.level == "warn"
            })
            .await;
        assert_eq!(line.message, "a rule of this policy never matches");
        assert!(line.raw.contains(why), "{line:?}");
    }
    let good = log.since(0, |line| {
        line.field("policy") == "shop/good" && line.level == "warn"
    });
    assert!(good.is_empty(), "{good:?}");
}
