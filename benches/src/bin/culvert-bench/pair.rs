//! A client and a server of one node, between which small requests go.

use std::sync::Arc;

use testkit::{Mesh, Node, Pod, PodSpec};

use crate::latency::Echo;

/// Two pods, outside the mesh or behind the proxy.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) client: Arc<Pod>,
    pub(crate) server: Arc<Pod>,
    /// In the server.
    pub(crate) echo: Echo,
}

impl Pair {
    /// Two pods of that kind.
    ///
    /// # Errors
    /// When their namespaces cannot be made.
    pub(crate) fn new(node: &Node, spec: fn(&str) -> PodSpec) -> anyhow::Result<Self> {
        let (client, server) = (node.pod(&spec("client"))?, node.pod(&spec("server"))?);
        let echo = Echo::start(&server)?;
        Ok(Self {
            client,
            server,
            echo,
        })
    }

    /// Both, as a mesh.
    pub(crate) fn mesh(&self) -> Mesh {
        Mesh::of(&[&self.client, &self.server])
    }
}
