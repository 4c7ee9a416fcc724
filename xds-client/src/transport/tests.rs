//! Over loopback where a socket matters, over a pipe with a paused clock where time does.

mod frames;
mod server;

use std::{error::Error, time::Duration};

use futures_util::stream;
use rustls::version::TLS12;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    net::{TcpListener, TcpSocket, TcpStream},
    time::{Instant, timeout},
};
use tonic::{Code, Request, Status, transport::Channel};

use super::*;
use crate::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use server::{Authority, Server};

fn target(host: &str, port: u16, roots: Roots) -> Target {
    let uri = format!("https://{host}:{port}/ignored").parse().unwrap();
    Target::new(uri, roots, "c1")
}

fn target_of(server: &Server, authority: &Authority) -> Target {
    let roots = Roots::Pem(authority.pem());
    target("localhost", server.address.port(), roots)
}

async fn request(target: &Target, channel: Channel) -> Result<(), Status> {
    let mut request = Request::new(stream::empty());
    *request.metadata_mut() = target.metadata().await.unwrap();
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    client.delta_aggregated_resources(request).await?;
    Ok(())
}

/// The whole chain, as an operator reads it.
fn told(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |error| (*error).source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

async fn refusal(target: &Target) -> ConnectError {
    let outcome = timeout(Duration::from_secs(5), target.connect()).await;
    outcome.unwrap().unwrap_err()
}

#[tokio::test]
async fn connects_and_shows_who_it_is() {
    let authority = Authority::new();
    let server = Server::start(authority.config("localhost")).await;
    let mut target = target_of(&server, &authority);
    target.token = Some(Token::Literal("secret".to_owned()));
    target
        .headers
        .insert("x-foo", HeaderValue::from_static("bar"));
    request(&target, target.connect().await.unwrap())
        .await
        .unwrap();

    let hello = (Some("localhost".to_owned()), Some(b"h2".to_vec()));
    assert_eq!(server.only_hello(), hello);
    let shown = server.shown.lock();
    let metadata = &shown.metadata[0];
    assert_eq!(metadata.get("authorization").unwrap(), "Bearer secret");
    assert_eq!(metadata.get("clusterid").unwrap(), "c1");
    assert_eq!(metadata.get("x-foo").unwrap(), "bar");
    assert_eq!(metadata.get("te").unwrap(), "trailers");
    assert_eq!(metadata.get("content-type").unwrap(), "application/grpc");
}

#[tokio::test]
async fn the_host_may_be_an_address() {
    let authority = Authority::new();
    let server = Server::start(authority.config("127.0.0.1")).await;
    let roots = Roots::Pem(authority.pem());
    let target = target("127.0.0.1", server.address.port(), roots);
    target.connect().await.unwrap();
    assert_eq!(server.only_hello().0, None);
}

#[test]
fn brackets_are_no_part_of_an_address() {
    let target = target("[2001:db8::1]", 1, Roots::System);
    let name = ServerName::try_from("2001:db8::1").unwrap();
    assert_eq!(target.server_name().unwrap(), name);
}

#[tokio::test]
async fn each_connection_reads_the_roots_again() {
    let (old, new) = (Authority::new(), Authority::new());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root-cert.pem");
    old.write(&path);
    let server = Server::start(new.config("localhost")).await;
    let roots = Roots::File(path.clone());
    let target = target("localhost", server.address.port(), roots);

    let error = refusal(&target).await;
    assert!(matches!(error, ConnectError::Handshake { .. }), "{error:?}");
    new.write(&path);
    target.connect().await.unwrap();
}

#[tokio::test]
async fn the_alternative_name_is_accepted_and_never_asked_for() {
    let authority = Authority::new();
    let server = Server::start(authority.config("istiod.example.org")).await;
    let mut target = target_of(&server, &authority);
    target.alternative_host = Some("istiod.example.org".to_owned());
    target.connect().await.unwrap();
    assert_eq!(server.only_hello().0.as_deref(), Some("localhost"));
}

#[tokio::test]
async fn a_certificate_for_other_names_is_refused() {
    let authority = Authority::new();
    let server = Server::start(authority.config("istiod.example.org")).await;
    let mut target = target_of(&server, &authority);
    for alternative in [None, Some("other.example.org".to_owned())] {
        target.alternative_host = alternative;
        let error = refusal(&target).await;
        assert!(matches!(error, ConnectError::Handshake { .. }), "{error:?}");
        let told = told(&error);
        assert!(told.contains("not valid for name \"localhost\""), "{told}");
    }
    assert!(server.shown.lock().hellos.is_empty());
}

#[tokio::test]
async fn the_alternative_name_saves_no_foreign_certificate() {
    let server = Server::start(Authority::new().config("istiod.example.org")).await;
    let mut target = target_of(&server, &Authority::new());
    target.alternative_host = Some("istiod.example.org".to_owned());
    let error = refusal(&target).await;
    assert!(told(&error).contains("UnknownIssuer"), "{error:?}");
    assert!(!error.is_local());
}

#[tokio::test]
async fn tls_1_2_has_to_be_allowed() {
    let authority = Authority::new();
    let server = Server::start(authority.config_with("localhost", &TLS12)).await;
    let mut target = target_of(&server, &authority);
    let error = refusal(&target).await;
    assert!(matches!(error, ConnectError::Handshake { .. }), "{error:?}");
    target.versions = TlsVersions::From12;
    target.connect().await.unwrap();
}

#[tokio::test]
async fn a_server_without_alpn_is_taken_to_speak_http2() {
    let authority = Authority::new();
    let mut config = authority.config("localhost");
    config.alpn_protocols.clear();
    let server = Server::start(config).await;
    let target = target_of(&server, &authority);
    request(&target, target.connect().await.unwrap())
        .await
        .unwrap();
}

#[tokio::test]
async fn an_ended_connection_is_not_made_again_by_itself() {
    let authority = Authority::new();
    let server = Server::start(authority.config("localhost")).await;
    let target = target_of(&server, &authority);
    let channel = target.connect().await.unwrap();
    server.cut().await;
    // The first may still be on its way into the connection.
    request(&target, channel.clone()).await.unwrap_err();
    let status = request(&target, channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    server.only_hello();
    target.connect().await.unwrap();
}

#[tokio::test]
async fn plain_http_is_refused() {
    let uri = "http://localhost:15012".parse().unwrap();
    let target = Target::new(uri, Roots::Pem(Authority::new().pem()), "c1");
    let error = refusal(&target).await;
    assert!(matches!(error, ConnectError::NotHttps { .. }), "{error:?}");
    assert!(error.to_string().contains("https://"), "{error}");
    assert!(error.is_local());
}

#[tokio::test]
async fn nobody_listening_is_told_with_the_address() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = closed.local_addr().unwrap().port();
    drop(closed);
    let target = target("localhost", port, Roots::Pem(Authority::new().pem()));
    let told = told(&refusal(&target).await);
    assert!(told.contains(&format!("localhost:{port}")), "{told}");
    assert!(told.contains("refused"), "{told}");
}

#[tokio::test]
async fn a_server_without_tls_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let target = target("localhost", port, Roots::Pem(Authority::new().pem()));
    let garbage = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        socket
            .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .await
            .unwrap();
        socket.read_to_end(&mut Vec::new()).await
    };
    let (error, _) = tokio::join!(refusal(&target), garbage);
    assert!(matches!(error, ConnectError::Handshake { .. }), "{error:?}");
}

/// A listener that takes no more connections leaves those that come unanswered.
#[tokio::test(start_paused = true)]
async fn a_host_that_does_not_answer_is_given_up() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let full = socket.listen(0).unwrap();
    let address = full.local_addr().unwrap();
    let _waits_for_accept = TcpStream::connect(address).await.unwrap();

    let roots = Roots::Pem(Authority::new().pem());
    let target = target("127.0.0.1", address.port(), roots);
    let start = Instant::now();
    let error = target.connect().await.unwrap_err();
    assert!(matches!(error, ConnectError::Tcp { .. }), "{error:?}");
    assert_eq!(start.elapsed().as_secs(), 5);
}

/// Connects through a pipe, and hands its other end to `peer`.
async fn through_pipe(
    target: &Target,
    peer: impl AsyncFnOnce(DuplexStream),
) -> (Result<Channel, ConnectError>, Duration) {
    let (near, far) = tokio::io::duplex(65_536);
    let start = Instant::now();
    let connected = async {
        (
            target.connect_over(async { Ok(near) }).await,
            start.elapsed(),
        )
    };
    tokio::join!(connected, peer(far)).0
}

#[track_caller]
fn assert_gave_up(outcome: (Result<Channel, ConnectError>, Duration), at: Step) {
    let (outcome, after) = outcome;
    let error = outcome.unwrap_err();
    assert!(
        matches!(error, ConnectError::Timeout { step, .. } if step == at),
        "{error:?}"
    );
    assert_eq!(after, Duration::from_secs(10));
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_given_up() {
    let target = target("localhost", 1, Roots::Pem(Authority::new().pem()));
    let silence = async |mut pipe: DuplexStream| {
        pipe.read_to_end(&mut Vec::new()).await.unwrap();
    };
    assert_gave_up(through_pipe(&target, silence).await, Step::Tls);
}

#[tokio::test(start_paused = true)]
async fn a_dial_without_end_is_given_up() {
    let target = target("localhost", 1, Roots::Pem(Authority::new().pem()));
    let start = Instant::now();
    let never = std::future::pending::<Result<DuplexStream, ConnectError>>();
    let outcome = target.connect_over(never).await;
    assert_gave_up((outcome, start.elapsed()), Step::Tcp);
}

#[tokio::test]
async fn a_root_file_may_be_missing_and_appear() {
    let authority = Authority::new();
    let server = Server::start(authority.config("localhost")).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root-cert.pem");
    let roots = Roots::File(path.clone());
    let target = target("localhost", server.address.port(), roots);
    let error = refusal(&target).await;
    assert!(
        matches!(error, ConnectError::NoRootFile { .. }),
        "{error:?}"
    );
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
    assert!(error.is_local());

    let appear = async { authority.write(&path) };
    tokio::join!(target.roots_changed(), appear);
    target.connect().await.unwrap();
}

#[tokio::test]
async fn roots_outlive_a_file_that_becomes_unusable() {
    let (authority, next) = (Authority::new(), Authority::new());
    let server = Server::start(authority.config("localhost")).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root-cert.pem");
    authority.write(&path);
    let roots = Roots::File(path.clone());
    let target = target("localhost", server.address.port(), roots);
    assert!(!target.is_current().await, "nothing was read yet");
    target.connect().await.unwrap();
    assert!(target.is_current().await);

    std::fs::write(&path, "garbage").unwrap();
    assert!(!target.is_current().await);
    target.connect().await.unwrap();
    std::fs::remove_file(&path).unwrap();
    target.connect().await.unwrap();
    assert!(target.is_current().await, "what is known to be missing");

    next.write(&path);
    let error = refusal(&target).await;
    assert!(matches!(error, ConnectError::Handshake { .. }), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn only_a_change_of_the_roots_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root-cert.pem");
    let authority = Authority::new();
    authority.write(&path);
    let of_file = target("localhost", 1, Roots::File(path.clone()));
    let refused = async || {
        Err::<DuplexStream, _>(ConnectError::Closed {
            uri: Uri::default(),
        })
    };
    of_file.connect_over(refused()).await.unwrap_err();
    let of_text = target("localhost", 1, Roots::Pem(authority.pem()));
    for unchanged in [&of_file, &of_text] {
        let quiet = timeout(Duration::from_secs(10), unchanged.roots_changed()).await;
        assert!(quiet.is_err());
    }

    Authority::new().write(&path);
    // Told as long as nobody read it.
    of_file.roots_changed().await;
    of_file.roots_changed().await;
    of_file.connect_over(refused()).await.unwrap_err();
    let quiet = timeout(Duration::from_secs(10), of_file.roots_changed()).await;
    assert!(quiet.is_err());
}

#[tokio::test]
async fn unusable_roots_are_left_out() {
    let authority = Authority::new();
    let server = Server::start(authority.config("localhost")).await;
    let mut target = target_of(&server, &authority);
    let block =
        |text: &str| format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n");
    let unusable = format!("{}{}", block("AAAA"), block("?"));

    target.roots = Roots::Pem(format!("{unusable}{}", authority.pem()));
    target.connect().await.unwrap();
    target.roots = Roots::Pem(unusable);
    let error = refusal(&target).await;
    assert!(
        matches!(
            error,
            ConnectError::NoRoots {
                source: Some(_),
                ..
            }
        ),
        "{error:?}"
    );
    target.roots = Roots::Pem(String::new());
    let error = refusal(&target).await;
    assert!(
        matches!(error, ConnectError::NoRoots { source: None, .. }),
        "{error:?}"
    );
}

/// Whether or not this machine trusts anybody.
#[tokio::test]
async fn the_system_does_not_trust_a_stranger() {
    let server = Server::start(Authority::new().config("localhost")).await;
    let target = target("localhost", server.address.port(), Roots::System);
    let error = refusal(&target).await;
    let told = told(&error);
    if let ConnectError::NoRoots { origin, .. } = error {
        assert!(origin.contains("system"), "{told}");
    } else {
        assert!(told.contains("UnknownIssuer"), "{told}");
    }
}

#[tokio::test]
async fn the_token_file_is_read_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("istio-token");
    let mut target = target("localhost", 1, Roots::System);
    target.token = Some(Token::File(path.clone()));

    let error = target.metadata().await.unwrap_err();
    assert!(matches!(error, TokenError::Unreadable { .. }), "{error:?}");
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
    for token in ["first", "second"] {
        std::fs::write(&path, format!("{token}\n")).unwrap();
        let headers = target.metadata().await.unwrap().into_headers();
        assert_eq!(headers["authorization"], format!("Bearer {token}"));
        assert!(headers["authorization"].is_sensitive());
    }
    std::fs::write(&path, " \n").unwrap();
    let error = target.metadata().await.unwrap_err();
    assert!(matches!(error, TokenError::Empty { .. }), "{error:?}");
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
    std::fs::write(&path, "sec\nret").unwrap();
    let error = target.metadata().await.unwrap_err();
    assert!(matches!(error, TokenError::Malformed { .. }), "{error:?}");
    assert!(
        !format!("{} {error:?}", told(&error)).contains("ret"),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_token_wins_over_extra_headers() {
    let mut target = target("localhost", 1, Roots::System);
    for (name, value) in [("authorization", "mine"), ("clusterid", "c2")] {
        target.headers.append(name, HeaderValue::from_static(value));
        target.headers.append(name, HeaderValue::from_static(value));
    }
    let headers = target.metadata().await.unwrap().into_headers();
    assert_eq!(headers["authorization"], "mine");
    assert_eq!(headers["clusterid"], "c2");

    target.token = Some(Token::Literal("token".to_owned()));
    let headers = target.metadata().await.unwrap().into_headers();
    let all = |name| headers.get_all(name).iter().collect::<Vec<_>>();
    assert_eq!(all("authorization"), ["Bearer token"]);
    assert_eq!(all("clusterid"), ["c1"]);
}

#[tokio::test]
async fn nothing_but_the_cluster_is_shown_without_a_token() {
    let target = target("localhost", 1, Roots::System);
    let headers = target.metadata().await.unwrap().into_headers();
    assert_eq!(headers.len(), 1);
    assert_eq!(headers["clusterid"], "c1");
}

#[test]
fn debug_hides_secrets() {
    let mut target = target("localhost", 1, Roots::System);
    target.token = Some(Token::Literal("hunter2".to_owned()));
    target
        .headers
        .insert("x-key", HeaderValue::from_static("hunter2"));
    let text = format!("{target:?}");
    assert!(text.contains("x-key"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}
