//! The world under load: a client pod and a server pod outside the mesh, and the same pair behind the proxy.

use std::{fmt, sync::Arc};

use anyhow::{Context as _, ensure};
use testkit::{Mesh, Pod, PodSpec, ProxyOptions, World, sys::Running};

use crate::{
    options::{Options, Part},
    proxy::Proxy,
    tool,
};

/// How traffic goes from client to server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// No redirection, no proxy.
    Direct,
    /// Captured at both ends, HBONE between them.
    Culvert,
}

/// Pods with their servers, and the proxies of their nodes.
#[derive(Debug)]
pub(crate) struct Lab {
    proxies: Vec<Proxy>,
    direct: Pair,
    culvert: Pair,
    world: World,
}

#[derive(Debug)]
struct Pair {
    client: Arc<Pod>,
    server: Arc<Pod>,
    _servers: [Running; 2],
}

impl Lab {
    /// Builds it, and sees to it that both ways work and only the one meant for it goes through the proxy.
    ///
    /// # Errors
    /// When anything does not start or answer.
    pub(crate) async fn new(options: &Options, part: Part) -> anyhow::Result<Self> {
        let nodes = if part == Part::TwoNodes { 2 } else { 1 };
        let world = World::new(nodes)?;
        let direct = Pair::new(&world, PodSpec::plain)?;
        let culvert = Pair::new(&world, PodSpec::captured)?;
        let enrolled: [&Pod; 2] = [&culvert.client, &culvert.server];
        let mut mesh = Mesh::of(&enrolled);
        mesh.pod(&direct.client);
        mesh.pod(&direct.server);
        mesh.write(&ProxyOptions::mesh_file(&world))?;
        let mut proxies = Vec::new();
        for node in world.nodes() {
            let here: Vec<&Pod> = enrolled
                .into_iter()
                .filter(|pod| pod.node() == node.name())
                .collect();
            proxies.push(Proxy::start(options, &world, node, &here).await?);
        }
        let lab = Self {
            proxies,
            direct,
            culvert,
            world,
        };
        lab.check().await?;
        Ok(lab)
    }

    async fn check(&self) -> anyhow::Result<()> {
        let answers = |path| tool::answers(self.client(path).netns(), self.server(path).ip4());
        answers(Path::Direct).await.context("direct")?;
        ensure!(
            self.carried().await? == 0.0,
            "direct traffic passes the proxy"
        );
        let through = answers(Path::Culvert).await;
        through.with_context(|| {
            let logs: Vec<String> = self.proxies.iter().map(Proxy::log_tail).collect();
            format!(
                "no traffic through the proxy; its log ends:\n{}\n",
                logs.join("\n")
            )
        })?;
        ensure!(
            self.carried().await? > 0.0,
            "captured traffic does not pass the proxy over mutual TLS"
        );
        Ok(())
    }

    /// Connections that the proxies carried over mutual TLS.
    async fn carried(&self) -> anyhow::Result<f64> {
        let mut sum = 0.0;
        for (proxy, node) in self.proxies.iter().zip(self.world.nodes()) {
            sum += proxy.connections(node).await?;
        }
        Ok(sum)
    }

    pub(crate) fn client(&self, path: Path) -> &Pod {
        &self.pair(path).client
    }

    pub(crate) fn server(&self, path: Path) -> &Pod {
        &self.pair(path).server
    }

    /// One per node.
    pub(crate) fn proxies(&mut self) -> &mut [Proxy] {
        &mut self.proxies
    }

    fn pair(&self, path: Path) -> &Pair {
        match path {
            Path::Direct => &self.direct,
            Path::Culvert => &self.culvert,
        }
    }
}

impl Pair {
    /// The client on the first node, the server on the last.
    fn new(world: &World, spec: fn(&str) -> PodSpec) -> anyhow::Result<Self> {
        let kind = if spec("kind").redirect.is_some() {
            "culvert"
        } else {
            "direct"
        };
        let (first, last) = (world.node(0), world.node(world.nodes().len() - 1));
        let client = first.pod(&spec(&format!("{kind}-client")))?;
        let server = last.pod(&spec(&format!("{kind}-server")))?;
        for pod in [&client, &server] {
            pod.netns().sysctl("core/somaxconn", "4096")?;
        }
        let nginx = tool::nginx(server.netns(), &world.file(server.name()))?;
        let iperf3 = tool::iperf3_server(server.netns())?;
        Ok(Self {
            client,
            server,
            _servers: [nginx, iperf3],
        })
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Culvert => "culvert",
        })
    }
}
