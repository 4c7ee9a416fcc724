//! Handshakes: every rule of the mesh's TLS, each from both ends.

use std::io;

use rustls::{
    CipherSuite, HandshakeKind, NamedGroup, ProtocolVersion,
    client::{ResolvesClientCert, Resumption},
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, kx_group},
    },
    server::Acceptor,
    sign::SingleCertAndKey,
    version::TLS12,
};

use super::*;
use crate::{
    IdentityError, TlsOptions, peer_id,
    svid::configs::CACHED_CLIENT_CONFIGS,
    testing::{Authority, Sides, accept, handshake},
    verify::{PeerVerifier, Whom},
};

const WEB: &str = "spiffe://td/ns/shop/sa/web";
const DB: &str = "spiffe://td/ns/shop/sa/db";
const FOREIGN: &str = "spiffe://elsewhere/ns/shop/sa/web";

fn set(ids: &[&str]) -> Arc<[SpiffeId]> {
    ids.iter().map(|id| id.parse().unwrap()).collect()
}

fn options() -> TlsOptions {
    TlsOptions::default()
}

fn text<T>(result: io::Result<T>) -> String {
    result
        .err()
        .expect("the handshake went through")
        .to_string()
}

fn both_fail((server, client): Sides) -> (String, String) {
    (text(server), text(client))
}

/// `client` with `bend` applied to its configuration dials `server`.
async fn dial_bent(server: &Svid, client: &Svid, bend: impl FnOnce(&mut ClientConfig)) -> Sides {
    let mut config = (*client.client_config(&set(&[DB]))).clone();
    bend(&mut config);
    handshake(server.server_config(), Arc::new(config)).await
}

/// Another implementation's client: certificate of `svid`, any server, given versions.
fn foreign_client(svid: &Svid, provider: CryptoProvider, tls12: bool) -> Arc<ClientConfig> {
    let versions: &[_] = if tls12 {
        &[&TLS12]
    } else {
        rustls::ALL_VERSIONS
    };
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PeerVerifier {
            anchors: svid.trust.anchors(),
            algorithms: aws_lc_rs::default_provider().signature_verification_algorithms,
            revocations: crate::Revocations::off(),
            whom: Whom::Servers(set(&[DB])),
        }))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(
            &svid.certified,
        ))));
    Arc::new(config)
}

#[tokio::test]
async fn both_sides_learn_the_peer() {
    let mesh = Authority::new("mesh").with_intermediate();
    let (web, db) = (mesh.svid(WEB, &options()), mesh.svid(DB, &options()));
    let client = web.client_config(&set(&[DB]));
    let (server, client) = handshake(db.server_config(), client).await;
    let (server, client) = (server.unwrap(), client.unwrap());
    let (server, client) = (server.get_ref().1, client.get_ref().1);
    let web_seen = peer_id(server.peer_certificates().unwrap()).unwrap();
    assert_eq!(web_seen.as_str(), WEB);
    let db_chain = client.peer_certificates().unwrap();
    assert_eq!(peer_id(db_chain).unwrap().as_str(), DB);
    assert_eq!(db_chain.len(), 2, "the root does not go on the wire");
    assert_eq!(client.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    let suite = client.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, CipherSuite::TLS13_AES_256_GCM_SHA384);
    let group = client.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::X25519MLKEM768);
    assert_eq!(server.server_name(), None);
}

#[tokio::test]
async fn no_session_is_resumed_and_no_ticket_sent() {
    let mesh = Authority::new("mesh");
    let (web, db) = (mesh.svid(WEB, &options()), mesh.svid(DB, &options()));
    let resumption = Resumption::in_memory_sessions(8);
    for _ in 0..2 {
        let resuming = |config: &mut ClientConfig| config.resumption = resumption.clone();
        let (server, client) = dial_bent(&db, &web, resuming).await;
        let client = client.unwrap();
        assert_eq!(client.get_ref().1.tls13_tickets_received(), 0);
        assert_eq!(
            client.get_ref().1.handshake_kind(),
            Some(HandshakeKind::Full)
        );
        server.unwrap();
    }
}

#[tokio::test]
async fn client_hello_names_no_server() {
    let mesh = Authority::new("mesh");
    let client = mesh.svid(WEB, &options()).client_config(&set(&[DB]));
    let name = "ignored.example".try_into().unwrap();
    let mut hello = Vec::new();
    let mut client = rustls::ClientConnection::new(client, name).unwrap();
    client.write_tls(&mut hello).unwrap();
    let mut acceptor = Acceptor::default();
    acceptor.read_tls(&mut hello.as_slice()).unwrap();
    let accepted = acceptor.accept().unwrap().unwrap();
    let hello = accepted.client_hello();
    assert_eq!(hello.server_name(), None);
    assert_eq!(hello.alpn().unwrap().collect::<Vec<_>>(), [b"h2"]);
    assert!(
        hello
            .cipher_suites()
            .iter()
            .all(|suite| *suite != CipherSuite::TLS13_CHACHA20_POLY1305_SHA256)
    );
}

#[tokio::test]
async fn server_ignores_the_server_name() {
    let mesh = Authority::new("mesh");
    let (web, db) = (mesh.svid(WEB, &options()), mesh.svid(DB, &options()));
    let (server, client) = dial_bent(&db, &web, |config| config.enable_sni = true).await;
    client.unwrap();
    let server = server.unwrap();
    assert_eq!(server.get_ref().1.server_name(), Some("ignored.example"));
}

#[tokio::test]
async fn client_without_certificate_is_refused() {
    let mesh = Authority::new("mesh");
    let (web, db) = (mesh.svid(WEB, &options()), mesh.svid(DB, &options()));
    let (server, _) = both_fail(
        dial_bent(&db, &web, |config| {
            config.client_auth_cert_resolver = Arc::new(Anonymous);
        })
        .await,
    );
    assert!(server.contains("no certificates"), "{server}");
}

/// A client that has no certificate to offer.
#[derive(Debug)]
struct Anonymous;

impl ResolvesClientCert for Anonymous {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn client_must_offer_h2_or_nothing() {
    let mesh = Authority::new("mesh");
    let (web, db) = (mesh.svid(WEB, &options()), mesh.svid(DB, &options()));
    let other = |config: &mut ClientConfig| config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let (server, client) = both_fail(dial_bent(&db, &web, other).await);
    assert!(server.contains("protocol"), "{server}");
    assert!(client.contains("NoApplicationProtocol"), "{client}");
    let nothing = |config: &mut ClientConfig| config.alpn_protocols.clear();
    let (server, client) = dial_bent(&db, &web, nothing).await;
    client.unwrap();
    assert_eq!(server.unwrap().get_ref().1.alpn_protocol(), None);
}

#[tokio::test]
async fn foreign_trust_domain_is_refused_unless_listed() {
    let mesh = Authority::new("mesh");
    let foreigner = mesh.svid(FOREIGN, &options());
    let db = mesh.svid(DB, &options());
    let (server, _) = handshake(db.server_config(), foreigner.client_config(&set(&[DB]))).await;
    let server = server.err().unwrap();
    let error = server.get_ref().unwrap().downcast_ref().unwrap();
    let Some(IdentityError::TrustDomain { accepted, .. }) = IdentityError::find(error) else {
        panic!("another reason: {server}");
    };
    assert_eq!(**accepted, ["td".into()]);

    let mut options = options();
    options.trust_domains = Arc::new(["elsewhere".into()]);
    let db = mesh.svid(DB, &options);
    let (server, client) =
        handshake(db.server_config(), foreigner.client_config(&set(&[DB]))).await;
    client.unwrap();
    server.unwrap();
}

#[tokio::test]
async fn client_of_a_foreign_root_is_refused() {
    let (mesh, other) = (Authority::new("mesh"), Authority::new("other"));
    let db = mesh.svid(DB, &options());
    let mut answer = other.issue(WEB);
    answer.roots.push(mesh.root());
    let stranger = accept(WEB, answer, &options());
    let config = stranger.client_config(&set(&[DB]));
    let (server, client) = both_fail(handshake(db.server_config(), config).await);
    assert!(server.contains("UnknownIssuer"), "{server}");
    assert!(client.contains("UnknownCA"), "{client}");
}

#[tokio::test]
async fn server_of_a_foreign_root_is_refused() {
    let (mesh, other) = (Authority::new("mesh"), Authority::new("other"));
    let (web, db) = (mesh.svid(WEB, &options()), other.svid(DB, &options()));
    let config = web.client_config(&set(&[DB]));
    let (_, client) = both_fail(handshake(db.server_config(), config).await);
    assert!(client.contains("UnknownIssuer"), "{client}");
}

#[tokio::test]
async fn peers_under_different_roots_that_both_trust_talk() {
    let (one, two) = (Authority::new("one"), Authority::new("two"));
    let both = |mut answer: KeyedChain| {
        answer.roots = vec![one.root(), two.root()];
        answer
    };
    let web = accept(WEB, both(one.issue(WEB)), &options());
    let db = accept(DB, both(two.issue(DB)), &options());
    let (server, client) = handshake(db.server_config(), web.client_config(&set(&[DB]))).await;
    client.unwrap();
    server.unwrap();
}

/// What is said of a handshake that is not held is what becomes of one that is.
#[tokio::test]
async fn a_meeting_is_judged_as_its_handshake_would_end() {
    let (mesh, other) = (Authority::new("mesh"), Authority::new("other"));
    let mut newcomer = other.issue(WEB);
    newcomer.roots.push(mesh.root());
    let web = mesh.svid(WEB, &options());
    let clients = [
        &web,
        &mesh.svid(FOREIGN, &options()),
        &accept(WEB, newcomer, &options()),
    ];
    let servers = [
        &web,
        &mesh.svid(DB, &options()),
        &other.svid(DB, &options()),
    ];
    let mut good = 0;
    for client in clients {
        for server in servers {
            for expected in [set(&[DB]), set(&[FOREIGN, WEB]), set(&[])] {
                let (theirs, ours) =
                    handshake(server.server_config(), client.client_config(&expected)).await;
                let held = theirs.is_ok() && ours.is_ok();
                let judged = client.would_meet(server, &expected);
                assert_eq!(judged.is_ok(), held, "{client:?} {server:?}: {judged:?}");
                good += usize::from(held);
            }
        }
    }
    assert_eq!(good, 3);
}

#[tokio::test]
async fn server_must_be_one_of_the_expected() {
    let mesh = Authority::new("mesh");
    let (web, db) = (mesh.svid(WEB, &options()), mesh.svid(DB, &options()));
    for (expected, listed) in [
        (
            set(&[WEB, FOREIGN]),
            "spiffe://td/ns/shop/sa/web, spiffe://elsewhere/ns/shop/sa/web",
        ),
        (set(&[]), "nothing"),
    ] {
        let config = web.client_config(&expected);
        let (_, client) = both_fail(handshake(db.server_config(), config).await);
        let wanted = format!(
            "identity verification error: peer did not present the expected SAN ({listed}), got {DB}"
        );
        assert!(client.contains(&wanted), "{client}");
    }
    let config = web.client_config(&set(&[WEB, DB]));
    let (server, client) = handshake(db.server_config(), config).await;
    client.unwrap();
    server.unwrap();
}

#[tokio::test]
async fn tls12_works_only_when_enabled() {
    let mesh = Authority::new("mesh");
    let web = mesh.svid(WEB, &options());
    let old = || foreign_client(&web, aws_lc_rs::default_provider(), true);
    let db = mesh.svid(DB, &options());
    let (server, client) = both_fail(handshake(db.server_config(), old()).await);
    assert!(server.contains("Tls12"), "{server}");
    assert!(client.contains("ProtocolVersion"), "{client}");

    let mut with_tls12 = options();
    with_tls12.tls12 = true;
    let db = mesh.svid(DB, &with_tls12);
    let (server, client) = handshake(db.server_config(), old()).await;
    client.unwrap();
    let server = server.unwrap();
    let suite = server
        .get_ref()
        .1
        .negotiated_cipher_suite()
        .unwrap()
        .suite();
    assert_eq!(suite, CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384);
}

#[tokio::test]
async fn pqc_only_speaks_one_group() {
    let mesh = Authority::new("mesh");
    let mut pqc = options();
    pqc.pqc_only = true;
    pqc.tls12 = true;
    let (web, db) = (mesh.svid(WEB, &pqc), mesh.svid(DB, &pqc));
    let (server, client) = handshake(db.server_config(), web.client_config(&set(&[DB]))).await;
    let client = client.unwrap();
    let group = client.get_ref().1.negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), NamedGroup::X25519MLKEM768);
    server.unwrap();

    let p256 = CryptoProvider {
        kx_groups: vec![kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    };
    let (server, _) = both_fail(
        handshake(
            db.server_config(),
            foreign_client(&web, p256.clone(), false),
        )
        .await,
    );
    assert!(server.contains("NoKxGroupsInCommon"), "{server}");
    let plain = mesh.svid(DB, &options());
    let config = foreign_client(&web, p256, false);
    let (server, client) = handshake(plain.server_config(), config).await;
    client.unwrap();
    server.unwrap();
}

#[test]
fn client_configs_are_kept_and_bounded() {
    let web = Authority::new("mesh").svid(WEB, &options());
    let first = set(&[DB]);
    let config = web.client_config(&first);
    assert!(Arc::ptr_eq(&config, &web.client_config(&first)));
    assert!(Arc::ptr_eq(&config, &web.client_config(&set(&[DB]))));
    for n in 0..CACHED_CLIENT_CONFIGS {
        assert!(Arc::ptr_eq(&config, &web.client_config(&first)), "in use");
        let _ = web.client_config(&set(&[&format!("spiffe://td/ns/n/sa/a{n}")]));
    }
    assert_eq!(web.tls().cached_clients(), CACHED_CLIENT_CONFIGS);
    for n in 0..CACHED_CLIENT_CONFIGS {
        let _ = web.client_config(&set(&[&format!("spiffe://td/ns/n/sa/b{n}")]));
    }
    assert!(!Arc::ptr_eq(&config, &web.client_config(&first)), "evicted");
    assert_eq!(web.tls().cached_clients(), CACHED_CLIENT_CONFIGS);
}

/// A route might expect one of the names, and policies judge another.
#[test]
fn a_peer_of_two_names_is_nobody() {
    let mesh = Authority::new("mesh");
    let db = mesh.svid(DB, &options());
    let judge = |names: &[&str]| {
        let chain = mesh.issue_with(names, |_| {}).chain;
        let expected = set(&[WEB]);
        let as_server = db.tls().server_verifier(&expected).verify_now(&chain);
        let as_client = db.tls().client_verifier().verify_now(&chain);
        assert_eq!(as_server.is_ok(), as_client.is_ok(), "{names:?}");
        as_server.map_err(|error| IdentityError::find(&error).unwrap().to_string())
    };
    for one in [&[WEB][..], &["https://x/", WEB]] {
        judge(one).unwrap();
    }
    let other_form = "spiffe://td/workload/7";
    for two in [
        [WEB, DB],
        [WEB, WEB],
        [other_form, WEB],
        [WEB, "SPIFFE://x"],
    ] {
        let error = judge(&two).unwrap_err();
        let wanted = format!(
            "identity verification error: a certificate is for one identity, this one is for {}, {}",
            two[0], two[1]
        );
        assert_eq!(error, wanted);
    }
}

#[test]
fn peer_id_is_the_one_identity() {
    let mesh = Authority::new("mesh");
    let leaf = mesh.issue_with(&["https://x/", DB], |_| {});
    assert_eq!(peer_id(&leaf.chain).unwrap().as_str(), DB);
    let leaf = mesh.issue_with(&[DB, WEB], |_| {});
    assert_eq!(peer_id(&leaf.chain), None);
    assert_eq!(peer_id(&mesh.issue_with(&[], |_| {}).chain), None);
    assert_eq!(peer_id(&[vec![1, 2, 3].into()]), None);
    assert_eq!(peer_id(&[]), None);
}

#[test]
fn debug_shows_no_key() {
    let web = Authority::new("mesh").svid(WEB, &options());
    let text = format!("{web:?}");
    assert!(
        text.contains(WEB) && !text.to_lowercase().contains("key"),
        "{text}"
    );
}
