//! Pods whose names are captured.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use crate::{
    cluster::Cluster,
    dns::{Dnsmasq, Scripted},
    mesh::Mesh,
    proxy::ProxyOptions,
    redirect::Redirect,
    world::{Pod, PodSpec, World},
};

/// One node: `web` and `shopper` in namespace `shop` and `teller` in `bank` ask; `desk`, outside the mesh, asks for comparison.
/// Pods believe in a resolver that does not exist: what answers is the proxy.
#[derive(Debug)]
pub struct Named {
    /// One node.
    pub world: World,
    /// Captured.
    pub web: Arc<Pod>,
    /// Captured.
    pub shopper: Arc<Pod>,
    /// Captured.
    pub teller: Arc<Pod>,
    /// Outside the mesh.
    pub desk: Arc<Pod>,
}

impl Named {
    /// Builds the world. The proxy's upstream is [`UPSTREAM`].
    ///
    /// # Errors
    /// When namespaces cannot be made.
    pub fn new() -> anyhow::Result<Self> {
        let world = World::new(1)?;
        let pod = |spec: PodSpec| world.node(0).pod(&spec);
        let captured = |name| PodSpec::captured(name).redirect(Redirect::default().with_dns());
        let stage = Self {
            web: pod(captured("web"))?,
            shopper: pod(captured("shopper"))?,
            teller: pod(captured("teller").namespace("bank"))?,
            desk: pod(PodSpec::plain("desk"))?,
            world,
        };
        stage.upstreams(&format!("nameserver {UPSTREAM}\n"))?;
        Ok(stage)
    }

    /// The pods, and nothing else.
    #[must_use]
    pub fn mesh(&self) -> Mesh {
        Mesh::of(&[&self.web, &self.shopper, &self.teller, &self.desk])
    }

    /// What the proxy is shown as `/etc/resolv.conf`.
    #[must_use]
    pub fn resolv_conf(&self) -> PathBuf {
        self.world.file("resolv.conf")
    }

    /// Writes the proxy's `/etc/resolv.conf`, in place.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn upstreams(&self, text: &str) -> anyhow::Result<()> {
        Ok(std::fs::write(self.resolv_conf(), text)?)
    }

    /// How the proxy is started: names are captured, and each query is logged.
    #[must_use]
    pub fn options(&self) -> ProxyOptions {
        ProxyOptions::new(&self.world, self.world.node(0))
            .env("ISTIO_META_DNS_CAPTURE", "true")
            .env("RUST_LOG", "info,dns=debug")
            .resolv_conf(self.resolv_conf())
    }

    /// A proxy that serves the captured pods.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start(&self, mesh: &Mesh) -> anyhow::Result<Cluster<'_>> {
        self.start_with(mesh, &self.options()).await
    }

    /// As [`Named::start`], with other options.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start_with(
        &self,
        mesh: &Mesh,
        options: &ProxyOptions,
    ) -> anyhow::Result<Cluster<'_>> {
        mesh.write(&ProxyOptions::mesh_file(&self.world))?;
        let pods = [&self.web, &self.shopper, &self.teller];
        Cluster::run(&self.world, |_| options.clone(), &pods).await
    }

    /// A real server at the address that the proxy asks.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn dnsmasq(&self, zone: &str, records: &[String]) -> anyhow::Result<Dnsmasq> {
        let netns = self.world.node(0).netns();
        Dnsmasq::start(netns, &[UPSTREAM, UPSTREAM6], zone, records).await
    }

    /// A server at the address that the proxy asks, which behaves as the first label of each name says.
    ///
    /// # Errors
    /// When it does not start.
    pub fn scripted(&self) -> std::io::Result<Scripted> {
        let at = SocketAddr::new(UPSTREAM, 53);
        Scripted::by_first_label(self.world.node(0).netns(), at)
    }

    /// What pods have as `/etc/resolv.conf`, in a cluster.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn pod_resolv_conf(&self, namespace: &str) -> anyhow::Result<PathBuf> {
        let file = self.world.file(&format!("{namespace}.resolv.conf"));
        let text = format!(
            "search {namespace}.svc.cluster.local svc.cluster.local cluster.local\n\
             nameserver {}\noptions ndots:5\n",
            RESOLVER.ip()
        );
        std::fs::write(&file, text)?;
        Ok(file)
    }
}

/// Where pods believe their resolver to be.
pub const RESOLVER: SocketAddr =
    SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 10)), 53);
/// As [`RESOLVER`], by IPv6.
pub const RESOLVER6: SocketAddr = SocketAddr::new(
    IpAddr::V6(std::net::Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0x10)),
    53,
);
/// Where the proxy's resolver is: on the node.
pub const UPSTREAM: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 20, 0, 1));
/// As [`UPSTREAM`], by IPv6.
pub const UPSTREAM6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0xfd20, 0, 0, 0, 0, 0, 0, 1));
