//! The last known good: what istiod told an earlier process of this node, served until istiod answers.

use std::{error::Error, io, sync::Arc, time::Duration};

use cert_agent::Agent;
use prometheus_client::registry::Registry;
use tokio::{sync::watch, task::spawn_blocking, time::sleep};
use xds_client::{
    Client,
    journal::{self, Journal, JournalMetrics, Keeper, Recalled},
};

use super::source;
use crate::{config::Config, flow::Shared, mesh::Mesh};

/// Puts what was kept in force, if something is to be kept, and tells how to keep what comes. Nothing that is wrong with it keeps
/// the proxy from starting.
pub(super) async fn open(
    config: &Config,
    shared: &Arc<Shared>,
    registry: &mut Registry,
) -> Option<(Journal, Keeper)> {
    let settings = settings(config)?;
    let directory = settings.directory.display().to_string();
    let metrics = JournalMetrics::register(registry);
    let (mesh, agent) = (shared.mesh.clone(), shared.agent.clone());
    let opened = spawn_blocking(move || recall(settings, metrics, &mesh, &agent));
    let (journal, keeper, recalled) = match opened.await {
        Ok(Ok(opened)) => opened,
        Ok(Err(error)) => {
            let error = &error as &dyn Error;
            tracing::warn!(
                error,
                directory,
                "STATE_DIR cannot be used: the state of the mesh is neither read nor kept"
            );
            return None;
        }
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    };
    if let Some(Recalled { told, bytes, .. }) = recalled {
        let age = told.elapsed().unwrap_or_default();
        tracing::info!(
            ?age,
            bytes,
            directory,
            "the last known state of the mesh is read; it counts until the control plane answers"
        );
    }
    Some((journal, keeper))
}

/// Opens the journal, and puts what it holds in force, with reservation.
pub(super) fn recall(
    settings: journal::Settings,
    metrics: JournalMetrics,
    mesh: &Mesh,
    agent: &Agent,
) -> io::Result<(Journal, Keeper, Option<Recalled>)> {
    let opened = journal::open(settings, metrics, &mut |batch| {
        let report = mesh.apply(&batch);
        source::follow_identities(agent, &report);
    })?;
    if let (.., Some(recalled)) = &opened {
        mesh.recall(recalled.told);
    }
    Ok(opened)
}

fn settings(config: &Config) -> Option<journal::Settings> {
    let kept = config.control.last_known.as_ref()?;
    let identity = &config.identity;
    let on_demand = config.control.on_demand;
    let node = identity.node_name.as_deref().unwrap_or_default();
    let view = if on_demand { "in part" } else { "in full" };
    Some(journal::Settings {
        directory: kept.directory.clone(),
        max_bytes: kept.max_bytes,
        owner: format!("{} {node} {view}", identity.cluster_id),
        on_demand,
    })
}

/// Ends once there is enough to begin with: what istiod tells, or, where it does not answer, what was known last.
pub(super) fn enough(client: &Client, mesh: &Mesh) -> impl Future<Output = ()> + use<> {
    let (mut synced, mut tried) = (client.synced(), client.tried());
    let mesh = mesh.clone();
    async move {
        // The client outlives whoever waits here.
        let synced = synced.wait_for(|synced| *synced);
        if mesh.read().recalled().is_none() {
            let _synced = synced.await;
            return;
        }
        tokio::select! {
            _ = synced => return,
            _ = tried.wait_for(|tried| *tried) => {}
            () = sleep(PATIENCE) => {}
        }
        tracing::warn!(
            "the control plane does not answer: the last known state of the mesh is served"
        );
    }
}

/// Ends the reservation about a state that was recalled, once istiod has answered.
pub(super) async fn confirm(mut synced: watch::Receiver<bool>, mesh: Mesh) {
    // Without a client nothing will be confirmed.
    if synced.wait_for(|synced| *synced).await.is_ok() && mesh.read().recalled().is_some() {
        // An update may be under way that it waits for.
        if let Err(error) = spawn_blocking(move || mesh.confirm()).await {
            std::panic::resume_unwind(error.into_panic());
        }
        tracing::info!(
            "the control plane has answered: the state of the mesh is no longer the recalled one"
        );
    }
}

/// How long istiod may take before what was known last is served.
const PATIENCE: Duration = Duration::from_secs(2);
