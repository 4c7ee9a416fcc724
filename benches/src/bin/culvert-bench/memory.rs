//! Memory of the proxy: idle, with connections held open, and after they closed.

use std::{net::SocketAddr, sync::Arc};

use anyhow::{Context as _, ensure};
use testkit::{
    Mesh, Pod, PodSpec, ProxyOptions, World,
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
    report.push(Row::of(
        "RssAnon per held connection, both ends",
        Unit::Bytes,
        vec![per_connection(held.anonymous, idle.anonymous)],
    ));
    let seconds = options.after_close().as_secs();
    let name = format!("RSS {seconds} s after all closed (ratio: to idle)");
    report.push(
        Row::of(&name, Unit::Megabytes, all(after))
            .ratio(float(after.all) / float(idle.all))
            .target("≤ 1.30"),
    );
    let name = format!("RssAnon {seconds} s after all closed");
    report.push(Row::of(&name, Unit::Megabytes, anonymous(after)));
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

/// All of it, as the one value of a figure.
pub(crate) fn all(resident: Resident) -> Vec<f64> {
    vec![float(resident.all)]
}

fn anonymous(resident: Resident) -> Vec<f64> {
    vec![float(resident.anonymous)]
}

/// How much more, or below nought less.
pub(crate) fn difference(more: u64, less: u64) -> f64 {
    float(more) - float(less)
}

/// As a figure.
#[expect(
    clippy::cast_precision_loss,
    reason = "bytes of memory are far below 2^53"
)]
pub(crate) fn float(bytes: u64) -> f64 {
    bytes as f64
}
