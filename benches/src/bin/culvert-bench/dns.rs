//! Names: what the proxy answers from the mesh and what it relays, next to asking the upstream itself.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use testkit::{
    Pod, ProxyOptions, dns,
    mesh::Service,
    stage::{Named, RESOLVER, UPSTREAM},
};
use tokio::{
    runtime,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    latency::Distribution,
    options::Options,
    proxy::Proxy,
    report::{Report, Row, Unit},
};

/// Whose names are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Services of the mesh, one after the other.
    Services,
    /// A name of the upstream.
    Relayed,
}

/// Figures of one load, one value per round.
#[derive(Debug, Default)]
struct Rounds {
    direct: Figures,
    culvert: Figures,
    cpu: Vec<f64>,
}

#[derive(Debug, Default)]
struct Figures {
    rate: Vec<f64>,
    p99: Vec<f64>,
}

/// Asks for names in turn, directly and through the proxy, which knows as many services as the options say.
///
/// # Errors
/// When nothing can be asked. A load that fails is named in the report, and the next one goes on.
pub(crate) async fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let stage = Named::new()?;
    let record = format!("host-record={OUTSIDE},192.0.2.7");
    let _upstream = stage.dnsmasq("up.example", &[record]).await?;
    let mut mesh = stage.mesh();
    mesh.services = (0..options.services()).map(service).collect();
    mesh.write(&ProxyOptions::mesh_file(&stage.world))?;
    let (node, pods) = (stage.world.node(0), [&*stage.web]);
    let mut proxy = Proxy::start_with(stage.options(), options, &stage.world, node, &pods).await?;
    for (kind, at_a_time) in LOADS {
        let name = format!("names: {kind} at {at_a_time}");
        if !name.contains(&options.only) {
            continue;
        }
        let mut rounds = Rounds::default();
        for round in 1..=options.rounds() {
            let load = (kind, at_a_time);
            let done = rounds.round(&stage, &mut proxy, load, options).await;
            match done {
                Ok(()) => eprintln!("round {round}: {name}: {}", rounds.last()),
                Err(error) => report.failed(format!("{name}, round {round}: {error:#}")),
            }
        }
        rounds.push(&name, report);
    }
    Ok(())
}

impl Rounds {
    async fn round(
        &mut self,
        stage: &Named,
        proxy: &mut Proxy,
        (kind, at_a_time): (Kind, usize),
        options: &Options,
    ) -> anyhow::Result<()> {
        let outside: Arc<[Vec<u8>]> = Arc::new([question(OUTSIDE)?]);
        let asked = match kind {
            Kind::Services => services(options.services())?,
            Kind::Relayed => Arc::clone(&outside),
        };
        let upstream = SocketAddr::new(UPSTREAM, RESOLVER.port());
        let length = Duration::from_secs(options.seconds());
        let load = |pod, server, names| ask(pod, server, names, at_a_time, length);
        let direct = load(&stage.desk, upstream, outside).await;
        let direct = direct.context("direct")?;
        let before = proxy.cpu()?;
        let culvert = load(&stage.web, RESOLVER, asked).await;
        let used = proxy.cpu()?.saturating_sub(before);
        proxy.check_alive()?;
        let culvert = culvert.context("culvert")?;
        self.cpu.push(used.as_secs_f64() / float(culvert.len()));
        self.direct.push(&direct, length);
        self.culvert.push(&culvert, length);
        Ok(())
    }

    fn last(&self) -> String {
        let show = |unit: Unit, values: &[f64]| {
            let last = values.last();
            last.map_or_else(String::new, |value| unit.show(*value))
        };
        format!(
            "direct {}, culvert {}, p99 {}, CPU {}",
            show(Unit::PerSecond, &self.direct.rate),
            show(Unit::PerSecond, &self.culvert.rate),
            show(Unit::Seconds, &self.culvert.p99),
            show(Unit::Seconds, &self.cpu),
        )
    }

    fn push(self, name: &str, report: &mut Report) {
        let Self {
            direct,
            culvert,
            cpu,
        } = self;
        let of = |figure| format!("{name}{figure}");
        report.push(Row::compared(
            &of(""),
            Unit::PerSecond,
            direct.rate,
            culvert.rate,
        ));
        report.push(Row::compared(
            &of(": p99"),
            Unit::Seconds,
            direct.p99,
            culvert.p99,
        ));
        report.push(Row::of(&of(": proxy CPU per query"), Unit::Seconds, cpu));
    }
}

impl Figures {
    fn push(&mut self, answers: &Distribution, length: Duration) {
        self.rate.push(float(answers.len()) / length.as_secs_f64());
        self.p99.push(answers.permille(990));
    }
}

/// Asks a server from inside a pod, so many queries at a time from as many ports, by one thread. How long each took.
///
/// # Errors
/// When more than one in a hundred is lost, or an answer has no address.
async fn ask(
    pod: &Arc<Pod>,
    server: SocketAddr,
    queries: Arc<[Vec<u8>]>,
    at_a_time: usize,
    length: Duration,
) -> anyhow::Result<Distribution> {
    // What the load before has left behind shall not be counted here.
    sleep(Duration::from_millis(300)).await;
    let (done_tx, done) = tokio::sync::oneshot::channel();
    let pod = Arc::clone(pod);
    let asking = async move {
        let mut clients = JoinSet::new();
        for client in 0..at_a_time {
            let (pod, queries) = (Arc::clone(&pod), Arc::clone(&queries));
            // Clients begin at different names.
            let first = client * queries.len() / at_a_time;
            clients.spawn(async move { client_of(&pod, server, (&queries, first), length).await });
        }
        let mut all = Distribution::default();
        while let Some(taken) = clients.join_next().await {
            all = all.join(Distribution::new(taken??));
        }
        Ok(all)
    };
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Nobody waits for it when the bench was interrupted: it ends by itself.
    thread::Builder::new()
        .name("asking".to_owned())
        .spawn(move || {
            let _ = done_tx.send(runtime.block_on(asking));
        })?;
    done.await?
}

async fn client_of(
    pod: &Pod,
    server: SocketAddr,
    (queries, first): (&[Vec<u8>], usize),
    length: Duration,
) -> anyhow::Result<Vec<Duration>> {
    let socket = pod.udp((Ipv4Addr::UNSPECIFIED, 0).into())?;
    socket.connect(server).await?;
    let (mut taken, mut lost, mut room) = (Vec::new(), 0, [0; 1500]);
    let end = Instant::now() + length;
    for query in queries.iter().cycle().skip(first) {
        let began = Instant::now();
        if began >= end {
            break;
        }
        socket.send(query).await?;
        let Ok(answered) = timeout(PATIENCE, socket.recv(&mut room)).await else {
            lost += 1;
            continue;
        };
        let answer = room.get(..answered?).unwrap_or_default();
        ensure!(has_records(answer), "no address in the answer {answer:?}");
        taken.push(began.elapsed());
    }
    ensure!(
        lost * 100 <= taken.len(),
        "{lost} of {} queries were lost",
        taken.len() + lost
    );
    Ok(taken)
}

/// Whether a header says NOERROR, and that there is an answer.
fn has_records(answer: &[u8]) -> bool {
    matches!(answer, [_, _, _, flags, _, _, high, low, ..] if flags & 0x0f == 0 && high | low != 0)
}

fn service(index: u32) -> Service {
    let ip = IpAddr::from(Ipv4Addr::from(FIRST_VIP + index));
    Service {
        name: format!("svc-{index}"),
        namespace: namespace(index),
        hostname: host(index),
        vips: vec![format!("/{ip}")],
        ports: BTreeMap::from([(80, 8080)]),
        ..Service::default()
    }
}

fn namespace(index: u32) -> String {
    format!("ns-{}", index % 100)
}

fn host(index: u32) -> String {
    format!("svc-{index}.{}.svc.cluster.local", namespace(index))
}

/// Questions for services from all over the mesh.
fn services(count: u32) -> anyhow::Result<Arc<[Vec<u8>]>> {
    let step = usize::try_from(count.div_ceil(10_000))?;
    let some = (0..count).step_by(step);
    some.map(|index| question(&host(index))).collect()
}

fn question(name: &str) -> anyhow::Result<Vec<u8>> {
    Ok(dns::address_query(&format!("{name}.")).to_vec()?)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "queries of a few seconds are far below 2^53"
)]
fn float(count: usize) -> f64 {
    count as f64
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Services => "services",
            Self::Relayed => "relayed",
        })
    }
}

const LOADS: [(Kind, usize); 4] = [
    (Kind::Services, 1),
    (Kind::Services, 64),
    (Kind::Relayed, 1),
    (Kind::Relayed, 64),
];
/// A name that the upstream knows.
const OUTSIDE: &str = "host.up.example";
/// 11.0.0.0
const FIRST_VIP: u32 = 0x0b00_0000;
/// A query that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(2);
