use rustls::{ClientConfig, RootCertStore, ServerConfig, pki_types::PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::{
    handshake::{accept, connect},
    record::Content,
    stream::TlsStream,
    *,
};

struct Configs {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

fn configs() -> Configs {
    let made = rcgen::generate_simple_self_signed(["pod".to_owned()]).expect("certificate");
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).expect("root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .expect("server");
    server.enable_secret_extraction = true;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.enable_secret_extraction = true;
    Configs {
        client: Arc::new(client),
        server: Arc::new(server),
    }
}

fn name() -> ServerName<'static> {
    ServerName::try_from("pod").expect("name")
}

async fn pair(room: usize) -> (TlsStream<DuplexStream>, TlsStream<DuplexStream>) {
    let configs = configs();
    let (a, b) = duplex(room);
    let (client, server) = tokio::join!(
        connect(a, configs.client, name()),
        accept(b, configs.server)
    );
    (client.expect("connect"), server.expect("accept"))
}

/// Sends `count` bytes of a pattern in writes of many sizes and checks them on the other side.
async fn carry<A, B>(from: &mut A, to: &mut B, count: usize)
where
    A: AsyncWrite + Unpin,
    B: AsyncRead + Unpin,
{
    let data: Vec<u8> = (0..=250_u8).cycle().step_by(31).take(count).collect();
    let send = async {
        let (mut at, mut step) = (0, 1);
        while at < data.len() {
            let end = data.len().min(at + step);
            from.write_all(&data[at..end]).await.expect("write");
            (at, step) = (end, step * 3 % 70_001 + 1);
        }
        from.flush().await.expect("flush");
    };
    let receive = async {
        let mut got = vec![0; count];
        let (mut at, mut step) = (0, 1);
        while at < count {
            let end = count.min(at + step);
            let n = to.read(&mut got[at..end]).await.expect("read");
            assert_ne!(n, 0, "early end at {at}");
            (at, step) = (at + n, step * 5 % 90_001 + 1);
        }
        got
    };
    let ((), got) = tokio::join!(send, receive);
    assert!(got == data, "bytes changed on the way");
}

#[tokio::test]
async fn carries_bytes_both_ways_at_any_size() {
    for (room, count) in [(1 << 20, 700_000), (4096, 300_000), (600, 20_000)] {
        let (mut client, mut server) = pair(room).await;
        carry(&mut client, &mut server, count).await;
        carry(&mut server, &mut client, count).await;
    }
}

#[tokio::test]
async fn speaks_with_the_library_in_both_roles() {
    let configs = configs();
    let (a, b) = duplex(64 * 1024);
    let acceptor = TlsAcceptor::from(Arc::clone(&configs.server));
    let (ours, theirs) = tokio::join!(
        connect(a, Arc::clone(&configs.client), name()),
        acceptor.accept(b)
    );
    let (mut ours, mut theirs) = (ours.expect("connect"), theirs.expect("accept"));
    carry(&mut ours, &mut theirs, 300_000).await;
    carry(&mut theirs, &mut ours, 300_000).await;

    let (a, b) = duplex(64 * 1024);
    let connector = TlsConnector::from(configs.client);
    let (theirs, ours) = tokio::join!(connector.connect(name(), a), accept(b, configs.server));
    let (mut theirs, mut ours) = (theirs.expect("connect"), ours.expect("accept"));
    carry(&mut theirs, &mut ours, 300_000).await;
    carry(&mut ours, &mut theirs, 300_000).await;
}

#[tokio::test]
async fn speaks_with_a_library_that_sends_its_messages_in_pieces() {
    let mut configs = configs();
    for pieces in [32, 100, 700] {
        Arc::make_mut(&mut configs.server).max_fragment_size = Some(pieces);
        Arc::make_mut(&mut configs.client).max_fragment_size = Some(pieces);
        let (a, b) = duplex(64 * 1024);
        let acceptor = TlsAcceptor::from(Arc::clone(&configs.server));
        let client = connect(a, Arc::clone(&configs.client), name());
        let (ours, theirs) = tokio::join!(client, acceptor.accept(b));
        let (mut ours, mut theirs) = (ours.expect("connect"), theirs.expect("accept"));
        carry(&mut ours, &mut theirs, 3000).await;
        carry(&mut theirs, &mut ours, 3000).await;

        let (a, b) = duplex(64 * 1024);
        let connector = TlsConnector::from(Arc::clone(&configs.client));
        let server = accept(b, Arc::clone(&configs.server));
        let (theirs, ours) = tokio::join!(connector.connect(name(), a), server);
        let (mut theirs, mut ours) = (theirs.expect("connect"), ours.expect("accept"));
        carry(&mut ours, &mut theirs, 3000).await;
        carry(&mut theirs, &mut ours, 3000).await;
    }
}

#[tokio::test]
async fn follows_key_updates_of_the_peer_and_makes_its_own() {
    let configs = configs();
    let (a, b) = duplex(64 * 1024);
    let connector = TlsConnector::from(configs.client);
    let (theirs, ours) = tokio::join!(connector.connect(name(), a), accept(b, configs.server));
    let (mut theirs, mut ours) = (theirs.expect("connect"), ours.expect("accept"));
    for _ in 0..3 {
        theirs.get_mut().1.refresh_traffic_keys().expect("refresh");
        carry(&mut theirs, &mut ours, 50_000).await;
        carry(&mut ours, &mut theirs, 50_000).await;
        ours.update_tx().expect("update");
        carry(&mut ours, &mut theirs, 50_000).await;
    }
}

#[tokio::test]
async fn a_message_after_the_handshake_may_come_in_pieces_but_nothing_between_them() {
    const TICKET: [u8; 9] = [4, 0, 0, 5, 1, 2, 3, 4, 5];
    let (mut client, mut server) = pair(4096).await;
    for piece in TICKET.chunks(2) {
        client.seal(Content::Handshake, piece).expect("sealed");
    }
    client.write_all(b"data").await.expect("written");
    client.flush().await.expect("sent");
    let mut got = [0; 4];
    server.read_exact(&mut got).await.expect("data");
    assert_eq!(&got, b"data");

    let ticket_and_update = [&TICKET[..], &[24, 0, 0, 1, 0], &TICKET].concat();
    let refused = [
        (&TICKET[..3], "data within a message"),
        (&[4, 0, 0x40, 1], "control message too long"),
        (&ticket_and_update, "unexpected handshake message"),
    ];
    for (message, why) in refused {
        let (mut client, mut server) = pair(4096).await;
        client.seal(Content::Handshake, message).expect("sealed");
        client.write_all(b"data").await.expect("written");
        client.flush().await.expect("sent");
        let error = server.read_u8().await.expect_err(why);
        assert!(error.to_string().contains(why), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn keys_that_change_with_the_end_of_the_handshake_are_answered() {
    let configs = configs();
    let (a, b) = duplex(64 * 1024);
    // What a client says before it waits arrives together with the end of its handshake.
    let client = async {
        let mut client = connect(a, configs.client, name()).await?;
        client.seal(Content::Handshake, &[24, 0, 0, 1, 1])?;
        client.flush().await?;
        io::Result::Ok(client)
    };
    let (client, server) = tokio::join!(client, accept(b, configs.server));
    let (mut client, mut server) = (client.expect("connect"), server.expect("accept"));
    for said in [b"before", b"behind"] {
        server.write_all(said).await.expect("written");
        server.flush().await.expect("sent");
        let mut got = [0; 6];
        client
            .read_exact(&mut got)
            .await
            .expect("under the right key");
        assert_eq!(&got, said);
        let silence = timeout(Duration::from_millis(1), server.read_u8()).await;
        assert!(silence.is_err(), "{silence:?}");
    }
}

#[tokio::test]
async fn what_came_before_a_bad_record_is_read_first() {
    let (mut client, mut server) = pair(4096).await;
    client.write_all(b"data").await.expect("written");
    client.seal(Content::Alert, &[1, 90]).expect("sealed");
    client.write_all(b"more").await.expect("written");
    client.seal(Content::Alert, &[2, 40]).expect("sealed");
    client.flush().await.expect("sent");
    let mut got = [0; 64];
    assert_eq!(server.read(&mut got).await.expect("data"), 8);
    assert_eq!(&got[..8], b"datamore");
    let error = server.read(&mut got).await.expect_err("the alert");
    assert!(error.to_string().contains("alert 40"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn what_can_be_no_record_is_refused_at_once() {
    let (mut peer, far) = duplex(4096);
    peer.write_all(b"GET / HT").await.expect("written");
    let accepting = accept(far, configs().server);
    let refused = timeout(Duration::from_secs(1), accepting).await;
    let error = refused.expect("no wait").expect_err("no handshake");
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
}

#[tokio::test]
async fn a_shutdown_is_an_end_and_not_an_error() {
    let (mut client, mut server) = pair(4096).await;
    client.write_all(b"last words").await.expect("write");
    client.shutdown().await.expect("shutdown");
    let mut got = Vec::new();
    server.read_to_end(&mut got).await.expect("clean end");
    assert_eq!(got, b"last words");
}

#[tokio::test]
async fn a_cut_inside_a_record_is_an_error() {
    let (client, mut server) = pair(4096).await;
    let TlsStream { mut io, .. } = client;
    io.write_all(&[23, 3, 3, 1, 0, 9, 9]).await.expect("write");
    drop(io);
    let error = server.read_u8().await.expect_err("cut");
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn a_record_that_does_not_authenticate_is_an_error() {
    let (client, mut server) = pair(4096).await;
    let TlsStream { mut io, .. } = client;
    io.write_all(&[23, 3, 3, 0, 20]).await.expect("write");
    io.write_all(&[5; 20]).await.expect("write");
    let error = server.read_u8().await.expect_err("bad record");
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
}

#[tokio::test]
async fn a_failed_handshake_tells_the_peer_why() {
    let configs = configs();
    let (a, b) = duplex(64 * 1024);
    let stranger = ServerName::try_from("stranger").expect("name");
    let (client, server) = tokio::join!(
        connect(a, configs.client, stranger),
        accept(b, configs.server)
    );
    assert!(
        client
            .expect_err("wrong name")
            .to_string()
            .contains("not valid for name")
    );
    let server = match server {
        Err(error) => error,
        Ok(mut server) => server.read_u8().await.expect_err("alert"),
    };
    assert!(
        server.to_string().to_lowercase().contains("alert"),
        "{server}"
    );
}

#[tokio::test]
async fn what_follows_a_failure_is_not_looked_at() {
    const ALERT: [u8; 6] = [21, 3, 3, 0, 2, 2];
    let (mut peer, far) = duplex(64 * 1024);
    let nonsense = [22, 3, 1, 0, 1, 0].repeat(1000);
    peer.write_all(&nonsense).await.expect("written");
    let error = accept(far, configs().server).await.expect_err("nonsense");
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let mut told = Vec::new();
    peer.read_to_end(&mut told).await.expect("told");
    assert_eq!((told.get(..6), told.len()), (Some(&ALERT[..]), 7));
}

#[tokio::test]
async fn a_handshake_without_end_is_refused() {
    let one_record = [vec![22, 3, 1, 0xff, 0xff], vec![1; 0xffff]].concat();
    // A hello of 16 MiB, in records of 16 KiB.
    let begin = [&[22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff][..], &[0; 0x3ffc]].concat();
    let more = [&[22, 3, 1, 0x40, 0][..], &[0; 0x4000]].concat();
    let one_message = [begin, more.repeat(20)].concat();
    for endless in [one_record, one_message] {
        let (mut peer, far) = duplex(1 << 20);
        peer.write_all(&endless).await.expect("written");
        let error = accept(far, configs().server).await.expect_err("too much");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    }
}

#[tokio::test]
async fn an_idle_stream_holds_no_buffer() {
    let (mut client, mut server) = pair(1 << 20).await;
    carry(&mut client, &mut server, 2_000_000).await;
    let idle = timeout(Duration::from_millis(5), server.read_u8()).await;
    assert!(idle.is_err(), "nothing to read");
    assert_eq!(server.incoming.capacity(), 0);
    assert_eq!(client.outgoing.capacity(), 0);
}
