//! A service behind real waypoints.

use std::{net::SocketAddr, sync::Arc};

use crate::{
    cluster::Cluster,
    envoy::{Envoy, Waypoint},
    mesh::Mesh,
    stage::{vip, web_port},
    world::{Pod, PodSpec, World},
};

/// Two nodes. `web` and `stranger` on the first call service `app`, whose pods `one` and `two` are on the second. The service has two waypoints, one
/// on each node, which no proxy serves; they run [`Guarded::waypoint`].
#[derive(Debug)]
pub struct Guarded {
    /// Two nodes.
    pub world: World,
    /// Captured.
    pub web: Arc<Pod>,
    /// Captured.
    pub stranger: Arc<Pod>,
    /// Captured.
    pub one: Arc<Pod>,
    /// Captured.
    pub two: Arc<Pod>,
    /// Envoy's home, on each node.
    pub waypoints: [Arc<Pod>; 2],
}

/// Port of the service that takes any bytes, and leads to port 8081 of pod `one`.
pub const BYTES: u16 = 81;

impl Guarded {
    /// Builds the world.
    ///
    /// # Errors
    /// When namespaces cannot be made.
    pub fn new() -> anyhow::Result<Self> {
        let world = World::new(2)?;
        let pod = |node: usize, spec: PodSpec| world.node(node).pod(&spec);
        let waypoint = |name| PodSpec::plain(name).service_account("waypoint");
        Ok(Self {
            web: pod(0, PodSpec::captured("web"))?,
            stranger: pod(0, PodSpec::captured("stranger"))?,
            one: pod(1, PodSpec::captured("one"))?,
            two: pod(1, PodSpec::captured("two"))?,
            waypoints: [pod(0, waypoint("way-0"))?, pod(1, waypoint("way-1"))?],
            world,
        })
    }

    /// All pods, the service and its waypoints. HTTP is at port 80, which is port 8080 of both pods.
    #[must_use]
    pub fn mesh(&self) -> Mesh {
        let [way, other] = &self.waypoints;
        let [web, stranger, one, two] = self.captured();
        let mut mesh = Mesh::of(&[web, stranger, one, two, way, other]);
        for way in [way, other] {
            "HBONE".clone_into(&mut mesh.workload(way).protocol);
        }
        mesh.service("waypoint", vip(9), &[(15008, 15008)], &[way, other]);
        let ports = [(80, 8080), (BYTES, 8081)];
        mesh.service("app", vip(1), &ports, &[one, two]).set(
            "waypoint",
            "{destination: 'shop/waypoint.shop.svc.cluster.local', hboneMtlsPort: 15008}",
        );
        mesh
    }

    /// Proxies that serve the captured pods.
    ///
    /// # Errors
    /// When they do not start.
    pub async fn start(&self, mesh: &Mesh) -> anyhow::Result<Cluster<'_>> {
        Cluster::start(&self.world, mesh, &self.captured()).await
    }

    fn captured(&self) -> [&Arc<Pod>; 4] {
        [&self.web, &self.stranger, &self.one, &self.two]
    }

    /// What waypoints do: nine of ten requests go to pod `one`, and so does every connection to [`BYTES`].
    #[must_use]
    pub fn waypoint(&self) -> Waypoint {
        let split = [(90, self.one.at(8080)), (10, self.two.at(8080))];
        Waypoint::default()
            .http(self.http(), &split)
            .tcp(self.bytes(), &[(1, self.one.at(8081))])
    }

    /// Starts the waypoint of a node.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn waypoint_of(&self, node: usize) -> anyhow::Result<Envoy> {
        let home = &self.waypoints[node];
        self.waypoint().start(&self.world, home).await
    }

    /// The service's port for HTTP.
    #[must_use]
    pub fn http(&self) -> SocketAddr {
        web_port(1)
    }

    /// The service's port for any bytes.
    #[must_use]
    pub fn bytes(&self) -> SocketAddr {
        SocketAddr::new(vip(1), BYTES)
    }
}
