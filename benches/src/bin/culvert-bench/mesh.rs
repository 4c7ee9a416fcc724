//! What the mesh costs the proxy, as a stand-in istiod tells it: memory, processor time, and latency of traffic meanwhile.

use std::{mem::take, time::Duration};

use anyhow::{Context as _, ensure};
use testkit::{Pod, PodSpec, Population, ProxyOptions, World};
use tokio::time::{Instant, sleep};
use xds_client::{local::Document, proto::workload::WorkloadStatus};

use crate::{
    control_plane::ControlPlane,
    lab::Path,
    latency::{self, Distribution, Flow},
    memory::{difference, float},
    options::Options,
    pair::Pair,
    proxy::Proxy,
    report::{Report, Row, Unit},
};

/// Endpoints whose health changes in one push.
const CHANGED: u32 = 1_000;

/// Memory and processor time for meshes of all sizes, and latency during resyncs of the largest.
///
/// # Errors
/// When the proxy does not start, follow, or carry traffic.
pub(crate) async fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let sizes = options.mesh_sizes();
    for size in sizes {
        let mut steered = Steered::new(options, *size).await?;
        steered.load(report).await?;
        steered.change(report).await?;
        steered.reconnect(report).await?;
        if Some(size) == sizes.last() {
            for flow in [Flow::Kept, Flow::New] {
                steered.resync(flow, report).await?;
            }
        }
        steered.proxy.check_alive()?;
    }
    Ok(())
}

/// A proxy that follows the stand-in, with two pods outside the mesh and two behind it.
#[derive(Debug)]
struct Steered<'a> {
    options: &'a Options,
    name: String,
    population: Population,
    /// So many full resyncs there were.
    resyncs: u32,
    proxy: Proxy,
    istiod: ControlPlane,
    direct: Pair,
    culvert: Pair,
    world: World,
}

impl<'a> Steered<'a> {
    /// The proxy knows its pods and nothing else.
    async fn new(options: &'a Options, size: u32) -> anyhow::Result<Self> {
        let world = World::new(1)?;
        let node = world.node(0);
        let istiod = ControlPlane::start(&world, &*node.pod(&PodSpec::plain("istiod"))?)?;
        let direct = Pair::new(node, PodSpec::plain)?;
        let culvert = Pair::new(node, PodSpec::captured)?;
        istiod.set(&culvert.mesh());
        let settings = ProxyOptions::new(&world, node).follow(&istiod);
        let pods: [&Pod; 2] = [&culvert.client, &culvert.server];
        let proxy = Proxy::start_with(settings, options, &world, node, &pods).await?;
        istiod.synced().await;
        Ok(Self {
            options,
            name: format!("mesh of {size}"),
            population: Population::new(size),
            resyncs: 0,
            proxy,
            istiod,
            direct,
            culvert,
            world,
        })
    }

    /// The pods of the node, and the population.
    fn document(&self) -> Document {
        let mut document = Document::from(&self.culvert.mesh());
        let all = self.population.document();
        document.addresses.extend(all.addresses);
        document
    }

    fn push(&self, report: &mut Report, figure: &str, unit: Unit, value: f64) {
        let (name, shown) = (&self.name, unit.show(value));
        eprintln!("{name}: {figure}: {shown}");
        report.push(self.row(figure, unit, value));
    }

    fn row(&self, figure: &str, unit: Unit, value: f64) -> Row {
        Row::of(&format!("{}: {figure}", self.name), unit, vec![value])
    }

    /// From almost nothing to everything, by the first answer of a new stream.
    async fn load(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let empty = self.proxy.settled(self.options).await?;
        let document = self.document();
        let known = document.addresses.len();
        let prepare = |istiod: &testkit::Istiod| istiod.set(document);
        self.istiod.reconnect_and_hold(prepare).await;
        self.proxy.forget_peak()?;
        let before = self.proxy.threads()?;
        self.istiod.answer().await;
        sleep(AFTERMATH).await;
        let used = self.proxy.threads()?.since(&before);
        let peak = self.proxy.peak()?;
        let (sent, message) = self.istiod.first_answer()?;
        ensure!(
            sent + 2 >= known,
            "{sent} of {known} resources were sent at once"
        );
        let full = self.proxy.settled(self.options).await?;

        let megabytes = Unit::Megabytes;
        self.push(
            report,
            "full answer, one message",
            megabytes,
            float(message),
        );
        self.push(report, "RSS before", megabytes, float(empty.all));
        self.push(report, "RSS", megabytes, float(full.all));
        let count = float(self.population.pods().count().try_into()?);
        for (kind, bytes) in [
            ("RSS", difference(full.all, empty.all)),
            ("RssAnon", difference(full.anonymous, empty.anonymous)),
        ] {
            let figure = format!("{kind} per workload");
            let row = self.row(&figure, Unit::Bytes, bytes / count);
            eprintln!("{}: {figure}: {:.0} B", self.name, bytes / count);
            report.push(row.target("≤ 400 B"));
        }
        let row = self.row(
            "RSS at most while it loads (ratio: to RSS)",
            megabytes,
            float(peak),
        );
        report.push(row.ratio(float(peak) / float(full.all)));
        let figure = "proxy CPU to load the full answer";
        self.push(report, figure, Unit::Milliseconds, used.as_secs_f64());

        // The client keeps the buffer of the largest message for as long as its stream lives.
        self.istiod.reconnect_and_hold(|_| {}).await;
        let bare = self.proxy.settled(self.options).await?;
        let figure = "RSS per workload on a new stream, before its first answer";
        let bytes = difference(bare.all, empty.all) / count;
        self.push(report, figure, Unit::Bytes, bytes);
        self.istiod.answer().await;
        Ok(())
    }

    /// Endpoints that turn unhealthy, in one push.
    async fn change(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let changed = (0..CHANGED).map(|number| {
            let mut pod = self.population.pod(number);
            pod.set_status(WorkloadStatus::Unhealthy);
            pod.into()
        });
        let document = Document {
            addresses: changed.collect(),
            ..Document::default()
        };
        let before = self.proxy.threads()?;
        self.istiod.put(document);
        self.istiod.synced().await;
        sleep(AFTERMATH).await;
        let used = self.proxy.threads()?.since(&before);
        let pushed = self.istiod.newest().sent.pop();
        let pushed = pushed.context("nothing was pushed")?.resources.len();
        ensure!(pushed == CHANGED as usize, "one push of {pushed} resources");
        let figure = format!("proxy CPU for {CHANGED} changed endpoints");
        self.push(report, &figure, Unit::Milliseconds, used.as_secs_f64());
        Ok(())
    }

    /// A new stream, and nothing new to say.
    async fn reconnect(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let before = self.proxy.threads()?;
        self.istiod.reconnect_and_hold(|_| {}).await;
        self.istiod.answer().await;
        sleep(AFTERMATH).await;
        let used = self.proxy.threads()?.since(&before);
        let (sent, _) = self.istiod.first_answer()?;
        let how = match (self.istiod.claimed(), sent) {
            (0, _) => "all is sent again",
            (_, 0) => "versions claimed",
            (claimed, sent) => anyhow::bail!("{claimed} resources claimed, {sent} sent"),
        };
        let figure = format!("proxy CPU to reconnect unchanged, {how}");
        self.push(report, &figure, Unit::Milliseconds, used.as_secs_f64());
        Ok(())
    }

    /// Traffic while nothing happens, and while every workload of the mesh changes.
    async fn resync(&mut self, flow: Flow, report: &mut Report) -> anyhow::Result<()> {
        let (mut direct, mut culvert) = (Figures::default(), Figures::default());
        for _ in 0..self.options.rounds() {
            for (path, figures) in [(Path::Direct, &mut direct), (Path::Culvert, &mut culvert)] {
                self.round(path, flow, figures).await?;
            }
        }
        let name = |when: &str, what: &str| format!("{}: {flow}, {when}, {what}", self.name);
        for (when, direct, culvert) in [
            ("quiet", &direct.quiet, &culvert.quiet),
            ("resync", &direct.resync, &culvert.resync),
        ] {
            for (what, permille) in [("p50", 500), ("p99", 990), ("p99.9", 999), ("max", 1000)] {
                let [direct, culvert] = [direct, culvert].map(|all| vec![all.permille(permille)]);
                let name = name(when, what);
                report.push(Row::compared(&name, Unit::Seconds, direct, culvert));
            }
        }
        let added = |figures: &Figures| vec![figures.worst_added()];
        let name = name("resync", "max above quiet p50");
        let row = Row::compared(&name, Unit::Milliseconds, added(&direct), added(&culvert));
        report.push(row.target("≤ 1 ms"));
        if flow == Flow::Kept {
            let figure =
                "full resync, until acknowledged (without traffic through the proxy, with)";
            let [direct, culvert] = [direct.lasted, culvert.lasted];
            let name = format!("{}: {figure}", self.name);
            report.push(Row::compared(&name, Unit::Milliseconds, direct, culvert));
        }
        Ok(())
    }

    async fn round(&mut self, path: Path, flow: Flow, figures: &mut Figures) -> anyhow::Result<()> {
        self.resyncs += 1;
        let revision = format!("v{}", self.resyncs + 1);
        self.population = self.population.clone().revision(&revision);
        let document = self.document();
        let prepare = |istiod: &testkit::Istiod| istiod.set(document);
        self.istiod.reconnect_and_hold(prepare).await;
        let carried = self.proxy.connections(self.world.node(0)).await?;
        let pair = match path {
            Path::Direct => &self.direct,
            Path::Culvert => &self.culvert,
        };
        let server = (pair.server.ip4(), &pair.echo);
        let seconds = Duration::from_secs(self.options.seconds());
        let quiet = async { sleep(seconds).await };
        let ((), quiet) = latency::during(flow, &pair.client, server, quiet).await?;
        let resync = async {
            let start = Instant::now();
            self.istiod.answer().await;
            let lasted = start.elapsed();
            sleep(AFTERMATH).await;
            lasted
        };
        let (lasted, resync) = latency::during(flow, &pair.client, server, resync).await?;
        let through = self.proxy.connections(self.world.node(0)).await? > carried;
        ensure!(
            through == (path == Path::Culvert),
            "{path} traffic takes the other way"
        );
        self.proxy.empty_log()?;
        eprintln!(
            "{}: {flow}, {path}, {revision}: {lasted:.2?}, {} quiet up to {}, {} in the resync up to {}",
            self.name,
            quiet.len(),
            Unit::Seconds.show(quiet.permille(1000)),
            resync.len(),
            Unit::Seconds.show(resync.permille(1000)),
        );
        figures.lasted.push(lasted.as_secs_f64());
        figures.quiet = take(&mut figures.quiet).join(quiet);
        figures.resync = take(&mut figures.resync).join(resync);
        Ok(())
    }
}

/// Latencies of all rounds together, and how long each resync lasted in seconds.
#[derive(Debug, Default)]
struct Figures {
    quiet: Distribution,
    resync: Distribution,
    lasted: Vec<f64>,
}

impl Figures {
    /// The slowest request of all resyncs, without what half of the requests take anyway, in seconds.
    fn worst_added(&self) -> f64 {
        self.resync.permille(1000) - self.quiet.permille(500)
    }
}

/// What the proxy still does after it has acknowledged counts, too.
const AFTERMATH: Duration = Duration::from_millis(300);
