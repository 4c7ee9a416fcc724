//! No private key and no other secret turns up in what an agent shows. Alone in its process:
//! events of other threads would disturb how `tracing` remembers who listens.

#![expect(clippy::unwrap_used, reason = "a test may fail wherever it does")]

use std::{
    fmt::{self, Write},
    sync::Arc,
    time::{Duration, SystemTime},
};

use cert_agent::{
    Agent, AgentOptions, BoxFuture, Clock, KeyedChain, ObtainError, PrivateKey, Retry, RootPair,
    Source, SpiffeId,
};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use rcgen::{CertificateParams, DistinguishedName, Issuer, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::field::{Field, Visit};

/// Hands out keys, every other time, and remembers them.
struct Authority {
    root: RootPair,
    clock: Clock,
    calls: Mutex<usize>,
    keys: Mutex<Vec<KeyPair>>,
}

impl Authority {
    fn issue(&self, id: &SpiffeId) -> KeyedChain {
        let root = CertificateDer::from_pem_slice(self.root.certificate_pem.as_bytes()).unwrap();
        let root_key = KeyPair::from_pem(&self.root.key_pem).unwrap();
        let issuer = Issuer::from_ca_cert_der(&root, root_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
        params.not_before = self.clock.now().into();
        params.not_after = (self.clock.now() + HOUR).into();
        let leaf = params.signed_by(&key, &issuer).unwrap();
        let secret = PrivateKey::from_pkcs8_der(key.serialize_der());
        self.keys.lock().push(key);
        KeyedChain::new(secret, vec![leaf.der().clone()], vec![root])
    }
}

impl Source for Authority {
    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<KeyedChain, ObtainError>> {
        Box::pin(async move {
            *self.calls.lock() += 1;
            if self.calls.lock().is_multiple_of(2) {
                return Err(ObtainError::refused("down for tests", Retry::Soon));
            }
            Ok(self.issue(id))
        })
    }
}

/// Collects the fields of spans and events.
struct Collected(Arc<Mutex<String>>);

impl Visit for Collected {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        writeln!(self.0.lock(), "{field}={value:?}").unwrap();
    }
}

impl tracing::Subscriber for Collected {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, attributes: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        attributes.record(&mut Self(Arc::clone(&self.0)));
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, values: &tracing::span::Record<'_>) {
        values.record(&mut Self(Arc::clone(&self.0)));
    }

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        event.record(&mut Self(Arc::clone(&self.0)));
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// Everything that the agent shows, apart from the log.
fn shown(agent: &Agent, id: &SpiffeId) -> String {
    let mut shown = format!("{agent:?}{:?}{:?}", agent.current(id), agent.snapshot());
    for status in agent.snapshot() {
        let certificates = status.chain.iter().chain(&status.roots);
        shown.extend(certificates.map(|it| it.pem.as_str()));
    }
    let mut registry = Registry::default();
    agent.register_metrics(&mut registry);
    prometheus_client::encoding::text::encode(&mut shown, &registry).unwrap();
    shown
}

/// The forms in which a key might be shown.
fn forms(key: &KeyPair) -> [String; 3] {
    let der = key.serialize_der();
    // The secret number of a P-256 key in PKCS#8.
    let secret = der.get(36..68).unwrap();
    let pem = pem::encode(&pem::Pem::new("X", der.clone()));
    let hex = secret.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    });
    let numbers = format!("{secret:?}").replace([' ', '[', ']'], "");
    [pem.lines().nth(1).unwrap().to_lowercase(), hex, numbers]
}

#[tokio::test(start_paused = true)]
async fn no_private_key_appears_in_dump_log_or_metric() {
    let log = Arc::new(Mutex::new(String::new()));
    let _guard = tracing::subscriber::set_default(Collected(Arc::clone(&log)));
    let (wall, mono) = (SystemTime::now(), Instant::now());
    let clock = Clock::new(move || wall + mono.elapsed());
    let authority = Arc::new(Authority {
        root: RootPair::generate("tests").unwrap(),
        clock: clock.clone(),
        calls: Mutex::default(),
        keys: Mutex::default(),
    });
    let mut options = AgentOptions::default();
    options.clock = clock;
    let source: Arc<dyn Source> = Arc::<Authority>::clone(&authority);
    let agent = Agent::new(source, options);
    let (running, stop) = (agent.clone(), CancellationToken::new());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { running.run(stop).await });

    let id: SpiffeId = "spiffe://td/ns/shop/sa/web".parse().unwrap();
    agent.prefetch(&id);
    sleep(4 * HOUR).await;
    let mut seen = log.lock().clone();
    assert!(seen.contains("down for tests") && seen.contains("obtained a certificate"));
    seen.push_str(&shown(&agent, &id));
    let seen: String = seen.to_lowercase().split_whitespace().collect();
    assert!(seen.contains("begincertificate"));
    assert!(!seen.contains("private"), "{seen}");
    let keys = authority.keys.lock();
    assert!(keys.len() > 3);
    for form in keys.iter().flat_map(forms) {
        assert!(!seen.contains(&form), "{form}");
    }
}

const HOUR: Duration = Duration::from_secs(3600);
