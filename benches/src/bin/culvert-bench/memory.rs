//! Memory of the proxy: idle, with connections held open, after they closed, and by size of the mesh.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use testkit::{
    Mesh, Pod, PodSpec, ProxyOptions, World,
    mesh::{Service, Workload},
    traffic::{self, Behaviour},
};
use tokio::{net::TcpStream, task::JoinSet, time::sleep};

use crate::{
    options::Options,
    proxy::{Proxy, Resident},
    report::{Report, Row, Unit},
};

/// Connections held open through the proxy, which is both ends of each.
const HELD: u32 = 2_000;
/// How many of them are opened at a time.
const AT_A_TIME: u32 = 50;

/// Memory idle, with [`HELD`] connections, and after they closed.
///
/// # Errors
/// When the proxy does not start or does not carry the connections.
pub(crate) async fn held(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let world = World::new(1)?;
    let node = world.node(0);
    let client = node.pod(&PodSpec::captured("client"))?;
    let server = node.pod(&PodSpec::captured("server"))?;
    Mesh::of(&[&client, &server]).write(&ProxyOptions::mesh_file(&world))?;
    let mut proxy = Proxy::start(options, &world, node, &[&client, &server]).await?;
    let echo = server.serve(0, Behaviour::Echo)?;

    let idle = proxy.settled(options).await?;
    let connections = open(&client, echo.address).await?;
    let held = proxy.settled(options).await?;
    let carried = proxy.connections(node).await?;
    ensure!(
        carried >= f64::from(HELD),
        "only {carried} connections went through the proxy over mutual TLS"
    );
    drop(connections);
    sleep(options.after_close()).await;
    let after = proxy.resident()?;
    proxy.check_alive()?;

    let per_connection = |held: u64, idle: u64| difference(held, idle) / f64::from(HELD);
    let name = format!("RSS with {HELD} connections held");
    report.push(Row::of("RSS idle, two pods", Unit::Megabytes, all(idle)).target("≤ 11 MB"));
    report.push(Row::of("RssAnon idle", Unit::Megabytes, anonymous(idle)));
    report.push(Row::of(&name, Unit::Megabytes, all(held)));
    report.push(
        Row::of(
            "RSS per held connection, both ends",
            Unit::Bytes,
            vec![per_connection(held.all, idle.all)],
        )
        .target("≤ 6000 B"),
    );
    let name = format!(
        "RSS {} s after all closed (ratio: to idle)",
        options.after_close().as_secs()
    );
    report.push(
        Row::of(&name, Unit::Megabytes, all(after))
            .ratio(float(after.all) / float(idle.all))
            .target("≤ 1.30"),
    );
    Ok(())
}

/// Opens the connections, and has a byte go to the server and back on each, so that all of the way is there.
async fn open(client: &Arc<Pod>, to: SocketAddr) -> anyhow::Result<Vec<TcpStream>> {
    let mut streams = Vec::new();
    for _ in 0..HELD / AT_A_TIME {
        let mut opening = JoinSet::new();
        for _ in 0..AT_A_TIME {
            let client = Arc::clone(client);
            opening.spawn(async move {
                let mut stream = client.connect(to).await?;
                traffic::ping(&mut stream, b"x").await?;
                Ok::<_, std::io::Error>(stream)
            });
        }
        while let Some(opened) = opening.join_next().await {
            let count = streams.len();
            streams.push(opened?.with_context(|| format!("after {count} connections"))?);
        }
    }
    Ok(streams)
}

/// Memory per workload of meshes of several sizes, above that of an almost empty one.
///
/// # Errors
/// When the proxy does not start.
pub(crate) async fn mesh(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let small = with_mesh(options, 0).await?;
    report.push(Row::of("RSS, empty mesh", Unit::Megabytes, all(small)));
    for size in options.mesh_sizes() {
        let large = with_mesh(options, *size).await?;
        let name = format!("RSS, mesh of {size} workloads");
        report.push(Row::of(&name, Unit::Megabytes, all(large)));
        let count = float(u64::try_from(*size)?);
        let target = if *size == 10_000 { "< 400 B" } else { "" };
        for (kind, bytes, target) in [
            ("RSS", difference(large.all, small.all), target),
            (
                "RssAnon",
                difference(large.anonymous, small.anonymous),
                target,
            ),
        ] {
            let name = format!("{kind} per workload at {size}");
            report.push(Row::of(&name, Unit::Bytes, vec![bytes / count]).target(target));
        }
    }
    Ok(())
}

/// Starts a proxy without pods on a mesh of this size; its memory once it has settled.
async fn with_mesh(options: &Options, size: usize) -> anyhow::Result<Resident> {
    let world = World::new(1)?;
    generated(size)?.write(&ProxyOptions::mesh_file(&world))?;
    eprintln!("mesh of {size} workloads: written");
    let mut proxy = Proxy::start(options, &world, world.node(0), &[]).await?;
    let resident = proxy.settled(options).await?;
    proxy.check_alive()?;
    eprintln!("mesh of {size} workloads: {resident:?}");
    Ok(resident)
}

/// A mesh as a cluster has it: deployments of ten pods behind a service each, a hundred pods to a namespace, thirty to a node, both
/// address families.
fn generated(size: usize) -> anyhow::Result<Mesh> {
    Ok(Mesh {
        workloads: (0..u32::try_from(size)?).map(workload).collect(),
        services: (0..u32::try_from(size.div_ceil(10))?)
            .map(service)
            .collect(),
        policies: Vec::new(),
    })
}

fn workload(index: u32) -> Workload {
    let (app, namespace) = (index / 10, index / 100);
    let name = format!(
        "app-{app}-{:08x}-{:05x}",
        app.wrapping_mul(0x9e37_79b9),
        index
    );
    let ip4 = Ipv4Addr::from_bits(Ipv4Addr::new(10, 64, 0, 0).to_bits() + index);
    let ip6 = Ipv6Addr::from_bits((0xfd40_u128 << 112) + u128::from(index));
    Workload {
        uid: format!("Kubernetes//Pod/team-{namespace}/{name}"),
        name,
        namespace: format!("team-{namespace}"),
        service_account: format!("app-{app}"),
        trust_domain: "cluster.local".to_owned(),
        workload_ips: vec![IpAddr::V4(ip4), IpAddr::V6(ip6)],
        protocol: "HBONE".to_owned(),
        node: format!("worker-{}", index / 30),
        cluster_id: "Kubernetes".to_owned(),
        canonical_name: format!("app-{app}"),
        canonical_revision: "v1".to_owned(),
        workload_name: format!("app-{app}"),
        workload_type: "deployment".to_owned(),
        status: "Healthy".to_owned(),
        capacity: 1,
        services: [(format!("team-{namespace}/{}", hostname(app)), ports())].into(),
        ..Workload::default()
    }
}

fn service(app: u32) -> Service {
    let vip = Ipv4Addr::from_bits(Ipv4Addr::new(10, 240, 0, 0).to_bits() + app);
    Service {
        name: format!("app-{app}"),
        namespace: format!("team-{}", app / 10),
        hostname: hostname(app),
        vips: vec![format!("/{vip}")],
        ports: ports(),
        canonical: true,
        ..Service::default()
    }
}

fn hostname(app: u32) -> String {
    format!("app-{app}.team-{}.svc.cluster.local", app / 10)
}

fn ports() -> testkit::mesh::Ports {
    [(80, 8080)].into()
}

fn all(resident: Resident) -> Vec<f64> {
    vec![float(resident.all)]
}

fn anonymous(resident: Resident) -> Vec<f64> {
    vec![float(resident.anonymous)]
}

fn difference(more: u64, less: u64) -> f64 {
    float(more) - float(less)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "bytes of memory are far below 2^53"
)]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn generated_workloads_are_distinct_and_their_services_exist() {
        let mesh = generated(1_234).unwrap();
        let unique = |key: fn(&Workload) -> String| {
            let keys: BTreeSet<String> = mesh.workloads.iter().map(key).collect();
            keys.len()
        };
        assert_eq!(unique(|workload| workload.uid.clone()), 1_234);
        assert_eq!(
            unique(|workload| workload.workload_ips[0].to_string()),
            1_234
        );
        let services: BTreeSet<String> = mesh
            .services
            .iter()
            .map(|service| format!("{}/{}", service.namespace, service.hostname))
            .collect();
        assert_eq!(services.len(), 124);
        for workload in &mesh.workloads {
            assert!(
                workload.services.keys().all(|key| services.contains(key)),
                "{workload:?}"
            );
        }
    }
}
