//! Two pods of one process, `web` and `api`, of which the first calls an application of the second.

use std::net::{Ipv4Addr, SocketAddr};

use rand::{SeedableRng as _, rngs::SmallRng};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    budget::Owner,
    config::{NodePath, SameNode},
    flow::{
        Shared,
        tests::{enter, pod_of, shared, tell, told},
    },
    route::{LoopGuard, Outbound, OutboundQuery, outbound},
};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 7, 7, 7);
const API: Ipv4Addr = Ipv4Addr::LOCALHOST;

struct House {
    shared: Arc<Shared>,
    web: Arc<Pod>,
    api: Arc<Pod>,
    source: Arc<Workload>,
    hop: Hop,
    _application: TcpListener,
    _tasks: JoinSet<()>,
}

impl House {
    /// Whose pods may have so many flows.
    async fn with_limit(flows_per_pod: usize) -> Self {
        let mut shared = shared(None);
        shared.settings.limits.flows_per_pod = flows_per_pod;
        shared.settings.same_node = SameNode {
            path: NodePath::Direct,
            ..SameNode::default()
        };
        let both = [("web", WEB), ("api", API)];
        let told = both.map(|(name, ip)| told(name, ip.octets(), "cluster.local"));
        tell(&shared, told.into());
        let shared = Arc::new(shared);
        let mut tasks = JoinSet::new();
        let agent = shared.agent.clone();
        tasks.spawn(async move { agent.run(CancellationToken::new()).await });
        let [web, api] = ["web", "api"].map(|name| pod_of(&shared, name));
        for pod in [&web, &api] {
            let known = pod.known_workload().expect("told");
            let fetched = shared.agent.svid(known.identity().expect("told")).await;
            fetched.expect("a certificate");
        }
        let application = TcpListener::bind((API, 0)).await.expect("bind");
        let source = web.known_workload().expect("told");
        let ask = OutboundQuery {
            source: &source,
            source_ip: WEB.into(),
            destination: application.local_addr().expect("address"),
            avoid: &[],
        };
        let rng = &mut SmallRng::seed_from_u64(1);
        let decided = outbound(&shared.mesh.read(), &LoopGuard::default(), &ask, rng);
        let Outbound::Hbone(hop) = decided else {
            panic!("{decided:?}")
        };
        let host = Arc::clone(&api);
        tasks.spawn(async move { host.shared().neighbours.host(&host, &Stop::new()).await });
        tokio::task::yield_now().await;
        Self {
            shared,
            web,
            api,
            source,
            hop,
            _application: application,
            _tasks: tasks,
        }
    }

    fn find(&self, from: IpAddr) -> Option<Arc<Neighbour>> {
        let client = (&*self.source, from);
        self.shared.neighbours.find(&self.web, client, &self.hop)
    }

    /// What comes of a flow; `None` if a tunnel is asked.
    async fn visit(&self) -> Option<Result<Visit, crate::flow::failure::Failure>> {
        let neighbour = self.find(WEB.into()).expect("a neighbour");
        let errand = Errand {
            source: &self.source,
            from: SocketAddr::from((WEB, 40000)),
            hop: &self.hop,
            service: None,
            trace: None,
        };
        visit(&self.web, &neighbour, errand).await
    }
}

#[tokio::test]
async fn who_is_not_at_an_address_of_its_pod_gets_a_tunnel() {
    let house = House::with_limit(10).await;
    assert!(house.find(WEB.into()).is_some());
    let by_socks5 = IpAddr::from(Ipv4Addr::LOCALHOST);
    assert!(house.find(by_socks5).is_none());
}

#[tokio::test]
async fn a_visit_counts_for_its_host_and_a_full_one_is_asked_by_a_tunnel() {
    let house = House::with_limit(2).await;
    let held = || house.shared.shares.bytes(Owner::Flow);
    let visit = house.visit().await.expect("no tunnel");
    let visit = visit.unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!((house.api.flows().len(), held()), (1, Owner::Flow.bytes()));
    let other = enter(&house.api, None);
    assert!(house.visit().await.is_none(), "there is no room");
    drop(visit);
    assert_eq!(held(), 0);
    drop(other);
    assert!(house.visit().await.is_some());
}
