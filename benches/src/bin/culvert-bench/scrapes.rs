//! What a scrape of many series costs the traffic that goes on meanwhile.

use std::{
    io::{self, Read as _, Write as _},
    mem::take,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::Context as _;
use futures_util::future::try_join_all;
use testkit::{
    Node, Pod, PodSpec, ProxyOptions, proxy::STATS_PORT, raw::RawClient, stage::ForeignClient,
    traffic::Behaviour,
};
use tokio::time::{Instant, sleep};

use crate::{
    latency::{self, Distribution, Flow},
    memory::float,
    options::Options,
    pair::Pair,
    proxy::Proxy,
    report::{Report, Row, Unit},
};

/// Label sets of four samples each: 50,000 series.
const LABEL_SETS: usize = 12_500;
/// How many flows make them at a time.
const AT_A_TIME: usize = 50;

/// Latency of small requests while nobody scrapes, and while somebody scrapes without a pause.
///
/// # Errors
/// When the proxy does not start, or does not carry traffic.
pub(crate) async fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let foreign = ForeignClient::new()?;
    let node = foreign.world.node(0);
    let direct = Pair::new(node, PodSpec::plain)?;
    let culvert = Pair::new(node, PodSpec::captured)?;
    let mut mesh = culvert.mesh();
    mesh.pod(&foreign.api);
    mesh.pod(&foreign.peer);
    mesh.write(&ProxyOptions::mesh_file(&foreign.world))?;
    let settings = ProxyOptions::new(&foreign.world, node).env("METRICS_MAX_SERIES", "20000");
    let pods: [&Pod; 3] = [&foreign.api, &culvert.client, &culvert.server];
    let mut proxy = Proxy::start_with(settings, options, &foreign.world, node, &pods).await?;
    fill(&foreign).await?;
    for flow in [Flow::Kept, Flow::New] {
        let (mut without, mut with) = (Figures::default(), Figures::default());
        for _ in 0..options.rounds() {
            proxy.empty_log()?;
            without.round(options, node, &direct, flow).await?;
            with.round(options, node, &culvert, flow).await?;
        }
        push(report, flow, &without, &with);
    }
    proxy.check_alive()
}

/// Has the proxy count a flow under each of so many label sets: those of workloads of another network.
async fn fill(foreign: &ForeignClient) -> anyhow::Result<()> {
    let _app = foreign.api.serve(8080, Behaviour::Sink)?;
    let hello = foreign.hello();
    let (client, target) = (foreign.try_client(&hello).await?, foreign.target(8080));
    for first in (0..LABEL_SETS).step_by(AT_A_TIME) {
        let flows = (first..first + AT_A_TIME).map(|name| counted(&client, &target, name));
        try_join_all(flows).await?;
    }
    Ok(())
}

async fn counted(client: &RawClient, target: &str, name: usize) -> anyhow::Result<()> {
    let baggage = format!(
        "k8s.namespace.name=shop,k8s.deployment.name=worker-{name},service.name=worker-{name},\
         service.version=v1,k8s.cluster.name=elsewhere"
    );
    let headers = [("baggage", &*baggage), ("x-forwarded-network", "elsewhere")];
    let mut tunnel = client.tunnel_with(target, &headers).await?;
    tunnel.finish()?;
    tunnel.read_to_end().await?;
    Ok(())
}

/// Latencies of all rounds together, and what was scraped.
#[derive(Debug, Default)]
struct Figures {
    quiet: Distribution,
    scraped: Distribution,
    /// Seconds that each scrape took.
    lasted: Vec<f64>,
    /// Bytes of the last one, as they travel.
    bytes: u64,
}

impl Figures {
    async fn round(
        &mut self,
        options: &Options,
        node: &Node,
        pair: &Pair,
        flow: Flow,
    ) -> anyhow::Result<()> {
        let server = (pair.server.ip4(), &pair.echo);
        let length = Duration::from_secs(options.seconds());
        let quiet = async { sleep(length).await };
        let ((), quiet) = latency::during(flow, &pair.client, server, quiet).await?;
        let scrapes = async {
            let end = Instant::now() + length;
            while Instant::now() < end {
                let began = Instant::now();
                let netns = node.proxy_netns().duplicate()?;
                let scrape = tokio::task::spawn_blocking(move || netns.run(scrape));
                self.bytes = scrape.await??;
                self.lasted.push(began.elapsed().as_secs_f64());
            }
            anyhow::Ok(())
        };
        let (done, scraped) = latency::during(flow, &pair.client, server, scrapes).await?;
        done.context("a scrape")?;
        eprintln!(
            "scrapes: {flow}: up to {} quiet, up to {} beside {} scrapes of {} bytes",
            Unit::Seconds.show(quiet.permille(1000)),
            Unit::Seconds.show(scraped.permille(1000)),
            self.lasted.len(),
            self.bytes,
        );
        self.quiet = take(&mut self.quiet).join(quiet);
        self.scraped = take(&mut self.scraped).join(scraped);
        Ok(())
    }

    /// What the scrapes add to so many thousandths of the requests, in seconds.
    fn added(&self, permille: usize) -> Vec<f64> {
        vec![self.scraped.permille(permille) - self.quiet.permille(permille)]
    }
}

/// Scrapes as Prometheus does, and tells how many bytes came.
fn scrape() -> io::Result<u64> {
    let mut stream = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, STATS_PORT)))?;
    stream.write_all(
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept-Encoding: gzip\r\n\
          Accept: application/openmetrics-text;version=1.0.0\r\n\r\n",
    )?;
    let (mut buffer, mut count, mut start) = (vec![0; 64 << 10], 0, true);
    loop {
        let read = stream.read(&mut buffer)?;
        if start && !buffer.starts_with(b"HTTP/1.1 200 ") {
            return Err(io::Error::other("not the answer to a scrape"));
        }
        if read == 0 {
            return Ok(count);
        }
        start = false;
        count += u64::try_from(read).unwrap_or(u64::MAX);
    }
}

fn push(report: &mut Report, flow: Flow, direct: &Figures, culvert: &Figures) {
    let name = |what: &str| format!("scrapes: {flow}, {what}");
    for (when, direct, culvert) in [
        ("quiet", &direct.quiet, &culvert.quiet),
        ("scraped", &direct.scraped, &culvert.scraped),
    ] {
        for (what, permille) in [("p50", 500), ("p99", 990), ("p99.9", 999), ("max", 1000)] {
            let [direct, culvert] = [direct, culvert].map(|all| vec![all.permille(permille)]);
            let name = name(&format!("{when}, {what}"));
            report.push(Row::compared(&name, Unit::Seconds, direct, culvert));
        }
    }
    for (what, permille) in [("p99", 990), ("p99.9", 999), ("max", 1000)] {
        let name = name(&format!("added at {what}"));
        let (direct, culvert) = (direct.added(permille), culvert.added(permille));
        let row = Row::compared(&name, Unit::Milliseconds, direct, culvert);
        report.push(row.target("≤ 1 ms"));
    }
    if flow == Flow::Kept {
        let unit = Unit::Milliseconds;
        let lasted = culvert.lasted.clone();
        report.push(Row::of(&name("one of 50,000 series"), unit, lasted));
        let bytes = vec![float(culvert.bytes)];
        report.push(Row::of(&name("bytes with gzip"), Unit::Megabytes, bytes));
    }
}
