use std::net::Ipv4Addr;

use hickory_proto::{
    op::{Message, Query as Question, ResponseCode},
    rr::{Name, RecordType},
};
use tokio::net::{TcpListener, UdpSocket};

use super::{super::wire::Request, *};
use crate::listen::{Netns, testing::sockets};

fn query() -> (Vec<u8>, usize) {
    let mut message = Message::query();
    message.metadata.id = 0x4242;
    message.add_query(Question::query(
        Name::from_ascii("example.com.").unwrap(),
        RecordType::TXT,
    ));
    let bytes = message.to_vec().unwrap();
    let end = Request::read(&bytes).unwrap().question_end();
    (bytes, end)
}

fn upstreams(servers: &[SocketAddr], limit: Duration) -> Upstreams {
    let upstreams = Upstreams::new("/nonexistent");
    let mut held = upstreams.held.lock();
    held.looked = Some(Instant::now() + Duration::from_secs(3600));
    held.plan = Arc::new(Plan {
        servers: servers.into(),
        search: Vec::new(),
        attempts: 1,
        limit,
    });
    drop(held);
    upstreams
}

async fn ask(upstreams: &Upstreams, transport: Transport) -> Result<Vec<u8>, RelayError> {
    let origin = Origin::new(Netns::current().unwrap(), sockets());
    ask_from(&origin, upstreams, transport).await
}

async fn ask_from(
    origin: &Origin,
    upstreams: &Upstreams,
    transport: Transport,
) -> Result<Vec<u8>, RelayError> {
    let (bytes, question_end) = query();
    let query = Query {
        bytes: &bytes,
        question_end,
        transport,
    };
    upstreams.ask(origin, query).await
}

/// A server whose answers to a query, in turn, `reply` makes.
async fn server(reply: fn(Vec<u8>) -> Vec<Vec<u8>>) -> (SocketAddr, tokio::task::JoinSet<()>) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    let mut serving = tokio::task::JoinSet::new();
    serving.spawn(async move {
        let mut room = [0; 600];
        loop {
            let (length, client) = socket.recv_from(&mut room).await.unwrap();
            for answer in reply(room[..length].to_vec()) {
                socket.send_to(&answer, client).await.unwrap();
            }
        }
    });
    (address, serving)
}

fn respond(mut query: Vec<u8>, code: ResponseCode) -> Vec<u8> {
    query[2] |= 0x80;
    query[3] = 0x80 | code.low();
    query
}

fn good(query: Vec<u8>) -> Vec<Vec<u8>> {
    vec![respond(query, ResponseCode::NoError)]
}

fn refusing(query: Vec<u8>) -> Vec<Vec<u8>> {
    vec![respond(query, ResponseCode::ServFail)]
}

fn silent(_: Vec<u8>) -> Vec<Vec<u8>> {
    Vec::new()
}

/// Answers under other identifiers and to other questions, before the right one.
fn lying(query: Vec<u8>) -> Vec<Vec<u8>> {
    let mut other_id = respond(query.clone(), ResponseCode::NXDomain);
    other_id[0] ^= 1;
    let mut other_question = respond(query.clone(), ResponseCode::NXDomain);
    other_question[14] ^= 1;
    vec![
        other_id,
        other_question,
        respond(query, ResponseCode::NoError),
    ]
}

#[test]
fn reads_what_resolvers_read() {
    let plan = Plan::of(
        b"search Shop.svc.cluster.local. svc.cluster.local\nnameserver 10.96.0.10\nnonsense\n\
          nameserver fd00::a\noptions ndots:5 timeout:2 attempts:3\n",
    );
    assert_eq!(
        plan.servers,
        [
            "10.96.0.10:53".parse().unwrap(),
            "[fd00::a]:53".parse().unwrap()
        ]
    );
    assert_eq!(plan.search, ["shop.svc.cluster.local", "svc.cluster.local"]);
    assert_eq!((plan.attempts, plan.limit.as_secs()), (3, 6));
    assert_eq!(Plan::of(b"options timeout:30 attempts:5").limit, LONGEST);
}

#[tokio::test]
async fn a_changed_file_is_seen_and_a_missing_one_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    let upstreams = Upstreams::new(&path);
    let look_again = || upstreams.held.lock().looked = None;
    assert!(upstreams.plan().servers.is_empty());
    assert!(matches!(
        ask(&upstreams, Transport::Udp).await,
        Err(RelayError::NoServer(_))
    ));
    std::fs::write(&path, "nameserver 10.0.0.1\n").unwrap();
    look_again();
    assert_eq!(upstreams.plan().servers.len(), 1);
    std::fs::remove_file(&path).unwrap();
    look_again();
    assert_eq!(upstreams.plan().servers.len(), 1);
}

#[tokio::test]
async fn the_answer_comes_back_as_it_was_under_the_clients_identifier() {
    let (server, _serving) = server(good).await;
    let answer = ask(&upstreams(&[server], LONGEST), Transport::Udp)
        .await
        .unwrap();
    assert_eq!(answer, respond(query().0, ResponseCode::NoError));
}

#[tokio::test]
async fn answers_to_other_questions_are_passed_over() {
    let (server, _serving) = server(lying).await;
    let answer = ask(&upstreams(&[server], LONGEST), Transport::Udp)
        .await
        .unwrap();
    assert_eq!(answer, respond(query().0, ResponseCode::NoError));
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_costs_its_head_start_once() {
    let (dead, _serving) = server(silent).await;
    let (alive, _serving_too) = server(good).await;
    let upstreams = upstreams(&[dead, alive], LONGEST);
    let began = Instant::now();
    ask(&upstreams, Transport::Udp).await.unwrap();
    assert!(began.elapsed() >= HEAD_START && began.elapsed() < 2 * HEAD_START);
    let began = Instant::now();
    ask(&upstreams, Transport::Udp).await.unwrap();
    assert!(began.elapsed() < HEAD_START, "who helped goes first");
}

#[tokio::test]
async fn an_unhelpful_answer_is_the_last_resort() {
    let (refuses, _serving) = server(refusing).await;
    let (alive, _serving_too) = server(good).await;
    let helped = ask(&upstreams(&[refuses, alive], LONGEST), Transport::Udp)
        .await
        .unwrap();
    assert!(!wire::is_unhelpful(&helped));
    let alone = ask(&upstreams(&[refuses], LONGEST), Transport::Udp)
        .await
        .unwrap();
    assert!(wire::is_unhelpful(&alone));
}

#[tokio::test(start_paused = true)]
async fn an_unhelpful_answer_outlives_the_silence_of_others() {
    let (refuses, _serving) = server(refusing).await;
    let (dead, _serving_too) = server(silent).await;
    let upstreams = upstreams(&[refuses, dead], Duration::from_secs(3));
    let answer = ask(&upstreams, Transport::Udp).await.unwrap();
    assert!(wire::is_unhelpful(&answer));
}

#[tokio::test(start_paused = true)]
async fn silence_has_a_limit() {
    let (dead, _serving) = server(silent).await;
    let limit = Duration::from_secs(3);
    let began = Instant::now();
    let error = ask(&upstreams(&[dead], limit), Transport::Udp)
        .await
        .unwrap_err();
    assert_eq!((error.reason(), began.elapsed()), ("timeout", limit));
}

#[tokio::test]
async fn connections_are_relayed_over_connections() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let server = listener.local_addr().unwrap();
    let serving = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let length = stream.read_u16().await.unwrap();
        let mut bytes = vec![0; length.into()];
        stream.read_exact(&mut bytes).await.unwrap();
        let mut answer = respond(bytes, ResponseCode::NoError);
        answer.resize(20_000, 7);
        stream.write_u16(20_000).await.unwrap();
        stream.write_all(&answer).await.unwrap();
    };
    let upstreams = upstreams(&[server], LONGEST);
    let (answer, ()) = tokio::join!(ask(&upstreams, Transport::Tcp), serving);
    assert_eq!(answer.unwrap().len(), 20_000);
}

#[tokio::test]
async fn each_query_has_a_port_of_its_own_even_on_a_socket_that_is_used_again() {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let upstreams = upstreams(&[socket.local_addr().unwrap()], LONGEST);
    let origin = Origin::new(Netns::current().unwrap(), sockets());
    let mut ports = std::collections::BTreeSet::new();
    for _ in 0..20 {
        let serve = async {
            let mut room = [0; 600];
            let (length, client) = socket.recv_from(&mut room).await.unwrap();
            let answer = respond(room[..length].to_vec(), ResponseCode::NoError);
            // What comes twice must not be found by the next query.
            socket.send_to(&answer, client).await.unwrap();
            socket.send_to(&answer, client).await.unwrap();
            client.port()
        };
        let (answer, port) = tokio::join!(ask_from(&origin, &upstreams, Transport::Udp), serve);
        assert_eq!(answer.unwrap(), respond(query().0, ResponseCode::NoError));
        assert_eq!(origin.resting(), 1);
        ports.insert(port);
    }
    // The kernel draws out of 28,000.
    assert!(ports.len() > 15, "{ports:?}");
}

#[tokio::test]
async fn a_resting_socket_can_be_sent_nothing() {
    let origin = Origin::new(Netns::current().unwrap(), sockets());
    let (one, two) = (
        UdpSocket::bind("127.0.0.1:0"),
        UdpSocket::bind("127.0.0.1:0"),
    );
    let (one, two) = (one.await.unwrap(), two.await.unwrap());
    let used = origin.dial(one.local_addr().unwrap()).await.unwrap();
    let port = used.local_addr().unwrap();
    one.send_to(b"too early", port).await.unwrap();
    origin.rest(used);
    let _ = one.send_to(b"too late", port).await;
    let again = origin.dial(two.local_addr().unwrap()).await.unwrap();
    assert_eq!(origin.resting(), 0);
    two.send_to(b"in time", again.local_addr().unwrap())
        .await
        .unwrap();
    let mut room = [0; 16];
    let length = again.recv(&mut room).await.unwrap();
    assert_eq!(&room[..length], b"in time");
}

#[tokio::test]
async fn sockets_rest_in_a_small_number_and_serve_their_own_family() {
    let origin = Origin::new(Netns::current().unwrap(), sockets());
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = server.local_addr().unwrap();
    let mut used = Vec::new();
    for _ in 0..4 {
        used.push(origin.dial(at).await.unwrap());
    }
    used.into_iter().for_each(|socket| origin.rest(socket));
    assert_eq!(origin.resting(), 2);
    let six = UdpSocket::bind("[::1]:0").await.unwrap();
    let _other = origin.dial(six.local_addr().unwrap()).await.unwrap();
    assert_eq!(origin.resting(), 2);
}

#[tokio::test]
async fn datagrams_of_any_size_come_whole() {
    let (server, _serving) = server(|query| {
        let mut answer = respond(query, ResponseCode::NoError);
        answer.resize(65_507, 7);
        vec![answer]
    })
    .await;
    let answer = ask(&upstreams(&[server], LONGEST), Transport::Udp).await;
    assert_eq!(answer.unwrap().len(), 65_507);
}
