//! What pods cost that do nothing: memory, and processor time while they idle.

use std::sync::Arc;

use testkit::{Mesh, Pod, PodSpec, ProxyOptions, World};
use tokio::time::sleep;

use crate::{
    memory::{all, difference},
    options::Options,
    proxy::{Proxy, Resident},
    report::{Report, Row, Unit},
};

/// As many as kubelet lets run on a node.
const FULL: u32 = 110;
/// What the other figures of memory begin with.
const FEW: u32 = 2;

/// Memory and processor time with a node full of pods, each under an identity of its own.
///
/// # Errors
/// When the proxy does not start.
pub(crate) async fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let (few, _) = idle(options, FEW).await?;
    let (full, busy) = idle(options, FULL).await?;
    let per_pod = difference(full.all, few.all) / f64::from(FULL - FEW);
    let name = |figure| format!("{FULL} pods: {figure}");
    report.push(Row::of(&name("RSS"), Unit::Megabytes, all(full)).target("≤ 31.5 MB"));
    report.push(Row::of(&name("RSS per pod"), Unit::Bytes, vec![per_pod]));
    let busy = Row::of(
        &name("proxy CPU per idle second"),
        Unit::Milliseconds,
        vec![busy],
    );
    report.push(busy.target("≤ 10 ms"));
    Ok(())
}

/// Memory once it has settled, and then the share of a core that is used.
async fn idle(options: &Options, count: u32) -> anyhow::Result<(Resident, f64)> {
    let world = World::new(1)?;
    let node = world.node(0);
    let pods: Vec<Arc<Pod>> = (0..count)
        .map(|number| node.pod(&PodSpec::captured(&format!("pod-{number}"))))
        .collect::<Result<_, _>>()?;
    let pods: Vec<&Pod> = pods.iter().map(Arc::as_ref).collect();
    Mesh::of(&pods).write(&ProxyOptions::mesh_file(&world))?;
    let mut proxy = Proxy::start(options, &world, node, &pods).await?;
    let resident = proxy.settled(options).await?;
    let before = proxy.threads()?;
    sleep(options.after_close()).await;
    let used = proxy.threads()?.since(&before);
    proxy.check_alive()?;
    Ok((resident, used.div_duration_f64(options.after_close())))
}
