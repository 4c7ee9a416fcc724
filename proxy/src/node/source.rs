//! Mesh state from a local description instead of a control plane.

use std::sync::Arc;

use cert_agent::Agent;
use tokio_util::sync::CancellationToken;
use xds_client::local::{self, Document, LocalFile};

use super::StartError;
use crate::{admin::Rejections, config::MeshSource, flow::Shared, mesh::Report};

/// A local description that is in force, and followed if it is a file.
pub(super) struct MeshFile {
    file: Option<LocalFile>,
    shared: Arc<Shared>,
    rejections: Rejections,
}

impl MeshFile {
    /// Loads the description and puts it in force. One with a misshapen record is refused now, when somebody looks;
    /// later, and with one whose values make no sense, the other records are used.
    pub(super) async fn load(
        source: &MeshSource,
        shared: &Arc<Shared>,
        rejections: Rejections,
    ) -> Result<Self, StartError> {
        let (file, document) = match source {
            MeshSource::Text(text) => (None, local::parse(text).map_err(StartError::Mesh)?),
            MeshSource::File(path) => {
                let mut file = LocalFile::new(path.as_path());
                let document = file.load().await.map_err(StartError::Mesh)?;
                (Some(file), document)
            }
        };
        if !document.misshapen.is_empty() {
            return Err(StartError::MeshRecords(document.misshapen));
        }
        put_in_force(shared, &rejections, &document);
        Ok(Self {
            file,
            shared: Arc::clone(shared),
            rejections,
        })
    }

    /// Loads the file again whenever it changes, until told to stop. A file that cannot be used
    /// changes nothing.
    pub(super) async fn follow(self, stop: CancellationToken) {
        let Self {
            file,
            shared,
            rejections,
        } = self;
        let following = async {
            let Some(mut file) = file else {
                return std::future::pending().await;
            };
            loop {
                match file.changed().await {
                    Ok(document) => put_in_force(&shared, &rejections, &document),
                    Err(error) => {
                        let error = &error as &dyn std::error::Error;
                        tracing::error!(
                            error,
                            "the changed mesh file is not usable; the mesh stays as it was"
                        );
                    }
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = following => {}
        }
    }
}

/// Makes the mesh what `document` says, and asks for the certificates it needs.
fn put_in_force(shared: &Shared, rejections: &Rejections, document: &Document) {
    for rejected in document.unusable() {
        tracing::warn!(name = %rejected.name, reason = %rejected.reason, "a record of the mesh file is not usable");
    }
    let report = shared.mesh.load(document);
    for rejection in &report.rejected {
        tracing::warn!(name = %rejection.name, reason = %rejection.reason, "a resource of the mesh file is refused");
    }
    let unreadable = document.unusable();
    let unreadable = unreadable.map(|one| (one.name.clone(), one.reason.clone()));
    let unusable = report.rejected.iter();
    let unusable = unusable.map(|one| (one.name.clone(), one.reason.to_string()));
    rejections.file(unreadable.chain(unusable));
    tracing::info!(
        workloads = report.workloads,
        services = report.services,
        policies = report.policies,
        "mesh file loaded: changed resources"
    );
    follow_identities(&shared.agent, &report);
}

/// Asks for the certificates that this node needs now, and lets go of those that it needs no longer.
pub(super) fn follow_identities(agent: &Agent, report: &Report) {
    for identity in &report.identities_appeared {
        agent.prefetch(identity);
    }
    for identity in &report.identities_departed {
        agent.forget(identity);
    }
}
