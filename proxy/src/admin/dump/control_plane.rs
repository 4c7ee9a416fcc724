//! How the control plane is followed, and what it told in vain. Our own: no other tool reads it.

use serde::Serialize;

use crate::{
    admin::{self, RejectedResource, when},
    mesh::Mesh,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::admin) struct ControlPlane {
    address: Option<String>,
    connected: bool,
    last_response: Option<String>,
    /// When what is in force was told, if that was before the process started.
    #[serde(skip_serializing_if = "Option::is_none")]
    recalled_from: Option<String>,
    rejected: Vec<Rejected>,
}

impl ControlPlane {
    pub(in crate::admin) fn of(source: &admin::ControlPlane, mesh: &Mesh) -> Self {
        let rejected = source.rejections.all();
        Self {
            address: source.address.clone(),
            connected: source.is_connected(),
            last_response: source.last_response().map(when::rfc3339),
            recalled_from: mesh.read().recalled().map(when::rfc3339),
            rejected: rejected.into_iter().map(Rejected::of).collect(),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Rejected {
    at: String,
    name: String,
    reason: String,
    #[serde(rename = "type")]
    kind: &'static str,
}

impl Rejected {
    fn of(resource: RejectedResource) -> Self {
        Self {
            at: when::rfc3339(resource.at),
            name: resource.name,
            reason: resource.reason,
            kind: resource.kind,
        }
    }
}
