//! The stage: which pods there are, who may do what, and how the mesh is told.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use testkit::{
    Mesh, Pod, PodSpec, World,
    mesh::{Match, Policy},
};

use crate::{bank::PORT, say};

/// Name of the service in front of `api`.
pub(crate) const SERVICE: &str = "api.shop.svc.cluster.local";
const SERVICE_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 80));
const POLICY: &str = "api-callers";

/// The four pods.
#[derive(Debug, Clone)]
pub(crate) struct Pods {
    /// Node 0, in the mesh, may call `api`.
    pub(crate) web: Arc<Pod>,
    /// Node 0, in the mesh, may not.
    pub(crate) guest: Arc<Pod>,
    /// Node 0, outside the mesh, may call `api` from its address.
    pub(crate) legacy: Arc<Pod>,
    /// Node 1, in the mesh: the server.
    pub(crate) api: Arc<Pod>,
}

impl Pods {
    /// Makes them.
    ///
    /// # Errors
    /// When the system refuses.
    pub(crate) fn new(world: &World) -> anyhow::Result<Self> {
        let (near, far) = (world.node(0), world.node(1));
        Ok(Self {
            web: near.pod(&PodSpec::captured("web"))?,
            guest: near.pod(&PodSpec::captured("guest"))?,
            legacy: near.pod(&PodSpec::plain("legacy"))?,
            api: far.pod(&PodSpec::captured("api"))?,
        })
    }

    /// All, in the order of the report.
    pub(crate) fn all(&self) -> [&Arc<Pod>; 4] {
        [&self.web, &self.guest, &self.legacy, &self.api]
    }

    /// What a control plane would say of them.
    pub(crate) fn mesh(&self) -> Mesh {
        let mut mesh = Mesh::of(&self.all().map(Arc::as_ref));
        for workload in &mut mesh.workloads {
            workload.workload_name.clone_from(&workload.name);
        }
        mesh.service("api", SERVICE_IP, &[(80, PORT)], &[self.api.as_ref()]);
        let from_legacy = Match {
            source_ips: vec![format!("{}/32", self.legacy.ip4())],
            ..Match::default()
        };
        let callers = vec![Match::pod(&self.web), from_legacy];
        mesh.policy(Policy::allow(POLICY, callers).selected());
        let api = mesh.workload(&self.api);
        api.authorization_policies = vec![format!("shop/{POLICY}")];
        mesh
    }

    /// The service, as a client addresses it.
    pub(crate) fn service(&self) -> SocketAddr {
        SocketAddr::new(SERVICE_IP, 80)
    }

    /// Prints what there is.
    pub(crate) fn introduce(&self) {
        say("");
        for pod in self.all() {
            let role = match pod.name() {
                "web" => format!("in the mesh; may call api (policy shop/{POLICY})"),
                "guest" => "in the mesh; no policy lets it call api".to_owned(),
                "legacy" => "outside the mesh: no redirection, no identity".to_owned(),
                _ => format!("in the mesh; HTTP on port {PORT}, service {SERVICE_IP}:80"),
            };
            let (node, name, ip) = (pod.node(), pod.name(), pod.ip4());
            say(format_args!("  {node}  {name:<6}  {ip:<10}  {role}"));
        }
        say("");
    }
}
