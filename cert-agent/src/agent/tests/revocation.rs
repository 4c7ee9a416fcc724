//! What lists do to certificates that are held.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::{Revocations, testing};

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
    let options = AgentOptions {
        revocations: Revocations::armed(),
        clock: paused_clock(),
        ..AgentOptions::default()
    };
    let agent = Agent::new(Arc::<Signing>::clone(&signing), options);
    let mut running = JoinSet::new();
    let run = agent.clone();
    running.spawn(async move { run.run(CancellationToken::new()).await });
    for which in [WEB, DB] {
        agent.prefetch(&id(which));
        agent.svid(&id(which)).await.unwrap();
    }
    sleep(2 * SECOND).await;
    (agent, signing, running)
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
