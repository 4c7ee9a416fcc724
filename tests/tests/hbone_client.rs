//! The wire protocol, as a foreign server sees the proxy's outbound side.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use http::StatusCode;
use testkit::{
    Authority, Cluster, Identity, Mesh, Pod, PodSpec, World,
    logs::Line,
    raw::{RawServer, ServerConnection, frames::setting},
    traffic::{self, End},
    wait,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

/// `web` is captured; `peer` claims to speak HBONE and is served by the test.
struct Foreign {
    world: World,
    web: Arc<Pod>,
    peer: Arc<Pod>,
}

impl Foreign {
    fn new() -> Self {
        let world = World::new(1).unwrap();
        let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
        let peer = world.node(0).pod(&PodSpec::plain("peer")).unwrap();
        Self { world, web, peer }
    }

    fn mesh(&self) -> Mesh {
        let mut mesh = Mesh::of(&[&self.web]);
        mesh.pod(&self.peer).protocol = "HBONE".to_owned();
        mesh
    }

    async fn cluster(&self) -> Cluster<'_> {
        Cluster::start(&self.world, &self.mesh(), &[&self.web])
            .await
            .unwrap()
    }

    fn server(&self) -> RawServer {
        let identity = self
            .world
            .authority()
            .issue(&self.peer.spiffe_id())
            .unwrap();
        self.server_as(&identity)
    }

    fn server_as(&self, identity: &Identity) -> RawServer {
        RawServer::listen(&self.peer, identity, self.world.authority().root()).unwrap()
    }

    /// An application connection of `web` to `peer`.
    async fn call(&self) -> TcpStream {
        self.web.connect(self.peer.at(8080)).await.unwrap()
    }

    /// An application connection, and the HBONE connection that it makes the proxy open.
    async fn call_through(&self, server: &RawServer) -> (TcpStream, ServerConnection) {
        let (call, connection) = tokio::join!(self.call(), server.accept());
        (call, connection.unwrap())
    }

    /// Starts the proxy and the server, and makes the first call.
    async fn talk(&self) -> Talk<'_> {
        self.talk_over(self.cluster().await).await
    }

    async fn talk_over<'a>(&self, cluster: Cluster<'a>) -> Talk<'a> {
        let server = self.server();
        let (call, connection) = self.call_through(&server).await;
        Talk {
            cluster,
            server,
            call,
            connection,
            echoes: JoinSet::new(),
        }
    }
}

/// A running proxy, the server that it has a connection with, and the call on whose behalf.
struct Talk<'a> {
    cluster: Cluster<'a>,
    server: RawServer,
    call: TcpStream,
    connection: ServerConnection,
    echoes: JoinSet<anyhow::Result<()>>,
}

impl Talk<'_> {
    /// Answers the next request by an echo.
    async fn echo(&mut self) {
        let incoming = self.connection.next().await;
        let incoming = incoming.expect("a request on this connection");
        self.echoes.spawn(incoming.echo());
    }

    /// Checks that the call carries bytes.
    async fn ping(&mut self, bytes: &[u8]) {
        traffic::ping(&mut self.call, bytes).await.unwrap();
    }
}

/// Answers every request by an echo, until the connection ends.
fn echo_all(mut connection: ServerConnection) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut streams = JoinSet::new();
        loop {
            match connection.next().await {
                Ok(incoming) => {
                    streams.spawn(incoming.echo());
                }
                Err(_) => std::future::pending().await,
            }
        }
    });
    tasks
}

#[tokio::test]
async fn the_client_announces_its_limits() {
    let foreign = Foreign::new();
    let talk = foreign.talk().await;
    let expected = [
        (setting::ENABLE_PUSH, Some(0)),
        (setting::MAX_CONCURRENT_STREAMS, None),
        (setting::INITIAL_WINDOW_SIZE, Some(4 << 20)),
        (setting::MAX_FRAME_SIZE, Some(1 << 20)),
        (setting::MAX_HEADER_LIST_SIZE, Some(16_384)),
    ];
    talk.connection
        .frames
        .announces(&expected, 16_711_681)
        .await;
}

#[tokio::test]
async fn the_request_has_the_form_that_peers_expect() {
    let foreign = Foreign::new();
    let mut talk = foreign.talk().await;
    assert_eq!(talk.connection.client_id, Some(foreign.web.spiffe_id()));
    assert_eq!(talk.connection.peer.ip(), foreign.web.ip4());
    let incoming = talk.connection.next().await.unwrap();
    assert_eq!(incoming.request.method(), http::Method::CONNECT);
    assert_eq!(incoming.authority(), foreign.peer.at(8080).to_string());
    assert_eq!(
        incoming.header("forwarded"),
        format!("for=\"{}\"", talk.call.local_addr().unwrap())
    );
    assert_eq!(
        incoming.header("baggage"),
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=web-deploy,service.name=web-app,service.version=v1"
    );
    let trace: Vec<&str> = incoming.header("traceparent").split('-').collect();
    assert_eq!(
        trace.iter().map(|part| part.len()).collect::<Vec<_>>(),
        [2, 32, 16, 2]
    );
    let mut names: Vec<&str> = incoming
        .request
        .headers()
        .keys()
        .map(http::HeaderName::as_str)
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["baggage", "forwarded", "traceparent"]);

    talk.echoes.spawn(incoming.echo());
    talk.ping(b"through the tunnel").await;
    talk.call.shutdown().await.unwrap();
    assert_eq!(
        traffic::closed(&mut talk.call, wait::SOON).await.unwrap(),
        End::Eof
    );
}

#[tokio::test]
async fn ipv6_authorities_and_addresses_are_bracketed() {
    let foreign = Foreign::new();
    let _cluster = foreign.cluster().await;
    let server = foreign.server();
    let (call, connection) =
        tokio::join!(foreign.web.connect(foreign.peer.at6(8080)), server.accept());
    let (call, incoming) = (call.unwrap(), connection.unwrap().next().await.unwrap());
    assert_eq!(
        incoming.authority(),
        format!("[{}]:8080", foreign.peer.ip6())
    );
    assert_eq!(
        incoming.header("forwarded"),
        format!(
            "for=\"[{}]:{}\"",
            foreign.web.ip6(),
            call.local_addr().unwrap().port()
        )
    );
}

#[tokio::test]
async fn a_refused_application_sees_a_close_and_the_log_the_reason() {
    let foreign = Foreign::new();
    let mut talk = foreign.talk().await;
    let mut call = Some(talk.call);
    for status in [
        StatusCode::UNAUTHORIZED,
        StatusCode::SERVICE_UNAVAILABLE,
        StatusCode::NO_CONTENT,
    ] {
        let mut call = match call.take() {
            Some(call) => call,
            None => foreign.call().await,
        };
        let incoming = talk.connection.next().await.unwrap();
        incoming.refuse(status).unwrap();
        traffic::closed(&mut call, wait::SOON).await.unwrap();
        let reason = format!("http status: {}", status.as_u16());
        talk.cluster
            .proxy(0)
            .log()
            .wait(&reason, |line| line.field("error").contains(&reason))
            .await;
    }
    let flags = [("response_flags", "CONNECT")];
    talk.cluster
        .proxy(0)
        .metric("istio_tcp_connections_failed_total", &flags, |count| {
            count == 3.0
        })
        .await;
}

#[tokio::test]
async fn a_server_of_another_identity_is_refused() {
    let foreign = Foreign::new();
    let cluster = foreign.cluster().await;
    let authority = foreign.world.authority();
    let id = foreign.peer.spiffe_id();
    let wrong = [
        authority
            .issue("spiffe://cluster.local/ns/shop/sa/somebody-else")
            .unwrap(),
        authority
            .issue("spiffe://elsewhere.example/ns/shop/sa/peer")
            .unwrap(),
        authority.issue_expired(&id).unwrap(),
        Authority::new("other").unwrap().issue(&id).unwrap(),
    ];
    for (count, identity) in (1..).zip(&wrong) {
        let server = foreign.server_as(identity);
        let call = foreign.web.turned_away(foreign.peer.at(8080));
        let (call, connection) = tokio::join!(call, server.accept());
        call.unwrap();
        assert!(
            connection.is_err() || connection.unwrap().next().await.is_err(),
            "a request was sent to a stranger"
        );
        let counted = |failed| failed == f64::from(count);
        cluster
            .proxy(0)
            .metric("istio_tcp_connections_failed_total", &[], counted)
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_streams_share_a_connection_and_the_next_opens_another() {
    let foreign = Foreign::new();
    let talk = foreign.talk().await;
    let _echo = echo_all(talk.connection);
    let mut calls = vec![talk.call];
    while calls.len() < 100 {
        calls.push(foreign.call().await);
    }
    for call in &mut calls {
        traffic::ping(call, b"shared").await.unwrap();
    }
    assert!(
        talk.server.idle(Duration::from_millis(200)).await,
        "a second connection for a hundred streams"
    );
    let (mut next, connection) = foreign.call_through(&talk.server).await;
    let _echo_next = echo_all(connection);
    traffic::ping(&mut next, b"another").await.unwrap();
}

#[tokio::test]
async fn after_goaway_running_streams_finish_and_new_ones_go_elsewhere() {
    let foreign = Foreign::new();
    let mut talk = foreign.talk().await;
    talk.echo().await;
    talk.ping(b"before").await;
    talk.connection.goaway().await.unwrap();
    talk.ping(b"after").await;
    let (mut new, second) = foreign.call_through(&talk.server).await;
    let _echo = echo_all(second);
    traffic::ping(&mut new, b"new").await.unwrap();
    talk.ping(b"still").await;
}

#[tokio::test]
async fn an_unused_connection_is_released_with_goaway() {
    let foreign = Foreign::new();
    let env: BTreeMap<_, _> = [("POOL_UNUSED_RELEASE_TIMEOUT", "1s")].into();
    let cluster = Cluster::start_with(&foreign.world, &foreign.mesh(), &[&foreign.web], &env)
        .await
        .unwrap();
    let mut talk = foreign.talk_over(cluster).await;
    talk.echo().await;
    talk.ping(b"in use").await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    talk.ping(b"a running stream keeps it").await;
    talk.call.shutdown().await.unwrap();
    traffic::closed(&mut talk.call, wait::SOON).await.unwrap();
    talk.connection
        .frames
        .wait("GOAWAY", |frame| frame.error_code() == Some(0))
        .await;
    talk.connection.ended(wait::SOON).await.unwrap();
}

#[tokio::test]
async fn resets_of_the_peer_end_the_application_connection() {
    let foreign = Foreign::new();
    let mut talk = foreign.talk().await;
    let log = talk.cluster.proxy(0).log();
    let mut first = Some(talk.call);
    for (reason, expected, error) in [
        (h2::Reason::CANCEL, End::Eof, ""),
        (h2::Reason::NO_ERROR, End::Eof, ""),
        (h2::Reason::STREAM_CLOSED, End::Eof, ""),
        (h2::Reason::CONNECT_ERROR, End::Reset, ""),
        (h2::Reason::INTERNAL_ERROR, End::Reset, "h2 failed"),
    ] {
        let mut call = match first.take() {
            Some(call) => call,
            None => foreign.call().await,
        };
        let mark = log.mark();
        let (_recv, mut send) = talk.connection.next().await.unwrap().accept().unwrap();
        // What the library has not written yet would be lost with the reset.
        send.send_data("answered".into(), false).unwrap();
        call.read_exact(&mut [0; 8]).await.unwrap();
        send.send_reset(reason);
        let end = traffic::closed(&mut call, wait::SOON).await.unwrap();
        assert_eq!(end, expected, "{reason}");
        drop(call);
        let line = log
            .wait_from(mark, "the end", |line| {
                line.is_access("connection complete")
            })
            .await;
        assert!(line.field("error").starts_with(error), "{}", line.raw);
        assert_eq!(line.field("error").is_empty(), error.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_arrives_whole_though_the_peer_takes_no_more_of_the_question() {
    let foreign = Foreign::new();
    let mut talk = foreign.talk().await;
    let (recv, mut send) = talk.connection.next().await.unwrap().accept().unwrap();
    let (mut reader, mut writer) = talk.call.into_split();
    let mut asking = JoinSet::new();
    asking.spawn(async move { while writer.write_all(&[1; 4096]).await.is_ok() {} });
    let answer = traffic::pattern(1 << 20);
    send.send_data(answer.clone().into(), true).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    // The peer leaves; the application has not read anything yet.
    drop((recv, send));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut got = Vec::new();
    let end = wait::soon("the answer", reader.read_to_end(&mut got)).await;
    assert_eq!((end.unwrap(), got == answer), (answer.len(), true));
    // Once it was delivered, the application learns that nobody listens.
    wait::soon("the question is given up", asking.join_next()).await;
}

#[tokio::test]
async fn an_application_reset_ends_the_stream_and_not_the_connection() {
    let foreign = Foreign::new();
    let mut talk = foreign.talk().await;
    let (mut recv, _send) = talk.connection.next().await.unwrap().accept().unwrap();
    talk.call.write_all(b"last words").await.unwrap();
    traffic::reset(talk.call).unwrap();
    let last = wait::soon("the bytes before the reset", recv.data()).await;
    assert_eq!(last.unwrap().unwrap(), "last words");
    let end = wait::soon("the stream ends", recv.data()).await;
    let code = end.unwrap().unwrap_err().reason();
    assert_eq!(code, Some(h2::Reason::CONNECT_ERROR));
    talk.call = foreign.call().await;
    talk.echo().await;
    talk.ping(b"usable").await;
}

#[tokio::test]
async fn a_peer_that_answers_no_ping_loses_its_streams() {
    let foreign = Foreign::new();
    let mut talk = foreign.talk().await;
    talk.echo().await;
    talk.ping(b"alive").await;
    talk.connection.freeze().await.unwrap();
    let end = traffic::closed(&mut talk.call, Duration::from_secs(40)).await;
    assert_eq!(end.unwrap(), End::Reset, "not the end of an answer");
}

#[tokio::test]
async fn a_peer_that_says_nothing_for_long_is_kept_while_its_host_lives() {
    let foreign = Foreign::new();
    let env = [("HBONE_PEER_TIMEOUT", "4s")].into();
    let cluster = Cluster::start_with(&foreign.world, &foreign.mesh(), &[&foreign.web], &env)
        .await
        .unwrap();
    let mut talk = foreign.talk_over(cluster).await;
    let incoming = talk.connection.next().await.unwrap();
    let (mut received, _send) = incoming.accept().unwrap();
    let pause = Duration::from_secs(9);
    talk.connection.pause(pause).await.unwrap();
    talk.call.write_all(b"late").await.unwrap();
    let data = tokio::time::timeout(pause * 2, received.data()).await;
    assert_eq!(data.unwrap().unwrap().unwrap(), "late");
}

#[tokio::test]
async fn a_server_that_stays_silent_is_given_up_and_blocks_no_other() {
    let foreign = Foreign::new();
    let other = foreign.world.node(0).pod(&PodSpec::plain("other")).unwrap();
    let mut mesh = foreign.mesh();
    mesh.pod(&other).protocol = "HBONE".to_owned();
    let _cluster = Cluster::start(&foreign.world, &mesh, &[&foreign.web])
        .await
        .unwrap();
    let silent = foreign.server();
    let identity = foreign.world.authority().issue(&other.spiffe_id()).unwrap();
    let good = RawServer::listen(&other, &identity, foreign.world.authority().root()).unwrap();
    let (mut stuck, _socket) = tokio::join!(foreign.call(), silent.accept_tcp());
    let (mut call, connection) = tokio::join!(foreign.web.connect(other.at(8080)), good.accept());
    let _echo = echo_all(connection.unwrap());
    traffic::ping(call.as_mut().unwrap(), b"not blocked")
        .await
        .unwrap();
    traffic::closed(&mut stuck, Duration::from_secs(15))
        .await
        .unwrap();
}

#[tokio::test]
async fn two_pods_never_share_a_tunnel() {
    let foreign = Foreign::new();
    let twin = foreign
        .world
        .node(0)
        .pod(&PodSpec::captured("twin"))
        .unwrap();
    let mut mesh = foreign.mesh();
    mesh.pod(&twin);
    let _cluster = Cluster::start(&foreign.world, &mesh, &[&foreign.web, &twin])
        .await
        .unwrap();
    let server = foreign.server();
    for pod in [&foreign.web, &twin] {
        let (call, connection) = tokio::join!(pod.connect(foreign.peer.at(8080)), server.accept());
        let (mut call, mut connection) = (call.unwrap(), connection.unwrap());
        assert_eq!(connection.client_id, Some(pod.spiffe_id()));
        assert_eq!(connection.peer.ip(), pod.ip4());
        let mut streams = JoinSet::new();
        streams.spawn(connection.next().await.unwrap().echo());
        traffic::ping(&mut call, b"own tunnel").await.unwrap();
    }
}

#[tokio::test]
async fn endpoints_of_one_service_are_held_to_their_own_identity() {
    let foreign = Foreign::new();
    let impostor = foreign
        .world
        .node(0)
        .pod(&PodSpec::plain("impostor"))
        .unwrap();
    let mut mesh = foreign.mesh();
    mesh.pod(&impostor).protocol = "HBONE".to_owned();
    let vip = "10.96.0.9".parse().unwrap();
    mesh.service("pair", vip, &[(80, 8080)], &[&foreign.peer, &impostor]);
    let cluster = Cluster::start(&foreign.world, &mesh, &[&foreign.web])
        .await
        .unwrap();
    // Both present the certificate of `peer`: good for one of the endpoints only.
    let identity = foreign
        .world
        .authority()
        .issue(&foreign.peer.spiffe_id())
        .unwrap();
    let root = foreign.world.authority().root();
    let good = RawServer::listen(&foreign.peer, &identity, root).unwrap();
    let bad = RawServer::listen(&impostor, &identity, root).unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let _echo = echo_all(good.accept().await.unwrap());
        std::future::pending::<()>().await;
    });
    let mut refused = JoinSet::new();
    refused.spawn(async move {
        loop {
            if let Ok(mut connection) = bad.accept().await {
                assert!(
                    connection.next().await.is_err(),
                    "a request was sent to an impostor"
                );
            }
        }
    });
    // Who is refused by name gives way to the other endpoint, so every call is served.
    let refusals = || {
        let log = cluster.proxy(0).log();
        let named = |line: &Line| {
            line.field("error")
                .contains("did not present the expected SAN")
        };
        log.since(0, named).len()
    };
    let mut served = 0;
    while refusals() == 0 {
        let mut call = foreign.web.connect(SocketAddr::new(vip, 80)).await.unwrap();
        call.write_all(b"x").await.unwrap();
        let mut answer = [0; 1];
        let read = wait::soon("an answer", call.read(&mut answer)).await;
        assert_eq!(read.unwrap(), 1, "closed instead of served");
        served += 1;
        assert!(served < 60, "the impostor was never dialled");
    }
    assert!(
        refused.try_join_next().is_none(),
        "the impostor's task ended"
    );
}
