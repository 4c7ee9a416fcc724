//! What lists do to certificates that are held.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::{KeptSource, Revocations, testing};

/// Signs for everybody.
struct Signing {
    authority: testing::Authority,
    calls: AtomicUsize,
}

impl Signing {
    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

impl Source for Signing {
    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<KeyedChain, ObtainError>> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Box::pin(async { Ok(self.authority.issue(id.as_str())) })
    }
}

/// An agent that holds two certificates, and checks lists.
async fn holding(authority: testing::Authority) -> (Agent, Arc<Signing>, JoinSet<()>) {
    let calls = AtomicUsize::new(0);
    let signing = Arc::new(Signing { authority, calls });
    let (agent, running) = running(Arc::<Signing>::clone(&signing), Revocations::armed());
    for which in [WEB, DB] {
        agent.prefetch(&id(which));
        agent.svid(&id(which)).await.unwrap();
    }
    sleep(2 * SECOND).await;
    (agent, signing, running)
}

fn running(source: Arc<dyn Source>, revocations: Revocations) -> (Agent, JoinSet<()>) {
    let options = AgentOptions {
        revocations,
        clock: paused_clock(),
        ..AgentOptions::default()
    };
    let agent = Agent::new(source, options);
    let mut running = JoinSet::new();
    let run = agent.clone();
    running.spawn(async move { run.run(CancellationToken::new()).await });
    (agent, running)
}

#[tokio::test(start_paused = true)]
async fn a_revoked_certificate_is_replaced_and_others_stay() {
    let (agent, signing, _running) = holding(testing::Authority::new("mesh")).await;
    let held = |which| agent.current(&id(which)).unwrap();
    let (web, db) = (held(WEB), held(DB));
    let list = signing.authority.crl(&[&web.chain()[0]]);
    agent.revocations().update("file", &list).unwrap();
    sleep(2 * SECOND).await;
    assert!(web.is_revoked() && !held(WEB).is_revoked());
    assert!(Arc::ptr_eq(&db, &held(DB)));
    // What the list names is not held any longer.
    agent.revocations().update("file", &list).unwrap();
    sleep(2 * HOUR).await;
    assert_eq!(signing.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_is_revoked_is_asked_once() {
    let authority = testing::Authority::new("mesh").with_intermediate();
    let (agent, signing, _running) = holding(authority).await;
    let web = agent.current(&id(WEB)).unwrap();
    let list = signing.authority.root_crl(&[&web.chain()[1]]);
    agent.revocations().update("file", &list).unwrap();
    sleep(2 * HOUR).await;
    assert_eq!(signing.calls(), 4, "once for each");
    assert!(
        agent.current(&id(WEB)).unwrap().is_revoked(),
        "served still: nothing better is there"
    );
}

/// How often the authority is asked for a certificate in the place of one that an earlier process held, on which it put what
/// `revoked` says; and whether what is held then is revoked.
async fn replaced(
    authority: testing::Authority,
    revoked: impl Fn(&testing::Authority, &KeyedChain) -> Vec<u8>,
) -> (usize, bool) {
    let calls = AtomicUsize::new(0);
    let signing = Arc::new(Signing { authority, calls });
    let directory = tempfile::tempdir().unwrap();
    let process = || {
        let (source, path) = (Arc::clone(&signing), directory.path().to_owned());
        Arc::new(KeptSource::new(source, path, TrustBundle::default()).unwrap())
    };
    let first = process().obtain(&id(WEB)).await.unwrap();
    let revocations = Revocations::armed();
    let list = revoked(&signing.authority, &first);
    revocations.update("file", &list).unwrap();
    let (agent, _running) = running(process(), revocations);
    agent.prefetch(&id(WEB));
    let recalled = agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(recalled.chain()[0], first.chain[0]);
    assert!(signing.calls() == 1 && recalled.is_revoked());
    sleep(2 * HOUR).await;
    let held = agent.current(&id(WEB)).unwrap();
    (signing.calls() - 1, held.is_revoked())
}

#[tokio::test(start_paused = true)]
async fn a_revoked_certificate_of_an_earlier_process_is_replaced() {
    let authority = testing::Authority::new("mesh");
    let leaf = |by: &testing::Authority, of: &KeyedChain| by.crl(&[&of.chain[0]]);
    assert_eq!(replaced(authority, leaf).await, (1, false));
    let authority = testing::Authority::new("mesh").with_intermediate();
    let all = |by: &testing::Authority, of: &KeyedChain| by.root_crl(&[&of.chain[1]]);
    assert_eq!(replaced(authority, all).await, (1, true), "asked once");
}
