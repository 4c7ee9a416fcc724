//! The show: build up, talk, compare what was seen with what should be, tell, tear down.

use std::{pin::pin, time::Duration};

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::Signal;
use testkit::{Cluster, Metrics, Pod, World, proxy::STATS_PORT};
use tokio::time::Instant;

use crate::{
    Options,
    bank::{Bank, Client, MARKER, PORT},
    keep::{self, Files},
    report,
    rows::{self, HEADINGS, Row},
    say,
    stage::{Pods, SERVICE},
    wire::Wire,
};

const REQUESTS: usize = 200;
/// How long a proxy may take to end when told to.
const EXIT_LIMIT: Duration = Duration::from_secs(10);

/// Runs it all; `stopped` ends it early, or ends the stay.
///
/// # Errors
/// When something cannot be built up, or was not as it should be.
pub(crate) async fn run(options: Options, stopped: impl Future<Output = ()>) -> anyhow::Result<()> {
    let (start, mut stopped) = (Instant::now(), pin!(stopped));
    let world = World::new(2)?;
    let pods = Pods::new(&world)?;
    say("Two nodes and four pods, each a network namespace of this machine:");
    pods.introduce();
    let (mesh, all) = (pods.mesh(), pods.all());
    let mut files = Files::create(&world)?;
    let _bank = Bank::open(&pods.api)?;
    let wire = Wire::tap(&world)?;
    let mut cluster = tokio::select! {
        () = &mut stopped => bail!("interrupted"),
        cluster = Cluster::start(&world, &mesh, &all) => cluster?,
    };
    std::fs::copy(&cluster.mesh_file, files.directory().join("mesh.yaml"))?;
    say(format_args!(
        "Both proxies are ready after {:.1} s; now traffic.\n",
        start.elapsed().as_secs_f64()
    ));
    let mut show = Show {
        pods: &pods,
        cluster: &cluster,
        wire: &wire,
        rows: Vec::new(),
        faults: Vec::new(),
    };
    tokio::select! {
        () = &mut stopped => bail!("interrupted"),
        () = show.play(options.bulk_bytes, &files) => {}
    }
    let mut faults = show.faults;
    files.follow(&cluster)?;
    where_next(&files, options);
    if options.keep {
        keep::stay(&world, &pods, (&cluster, &mut files), stopped).await?;
    }
    if let Err(error) = end(&mut cluster).await {
        faults.push(format!("{error:#}"));
    }
    files.follow(&cluster)?;
    verdict(&faults, &files, start.elapsed())
}

/// One performance and what came of it.
#[derive(Debug)]
struct Show<'a> {
    pods: &'a Pods,
    cluster: &'a Cluster<'a>,
    wire: &'a Wire,
    rows: Vec<Row>,
    faults: Vec<String>,
}

/// Where the logs of the two proxies end before a conversation.
type Marks = (usize, usize);

impl Show<'_> {
    async fn play(&mut self, bulk_bytes: u64, files: &Files) {
        let done = self.requests().await;
        self.note("web asks api", done);
        let done = self.bulk(bulk_bytes).await;
        self.note("web uploads to api", done);
        let done = self.refused().await;
        self.note("guest asks api", done);
        let done = self.plaintext().await;
        self.note("legacy asks api", done);
        let rows: Vec<_> = self.rows.iter().map(Row::cells).collect();
        report::table(HEADINGS, &rows);
        self.listen(bulk_bytes).await;
        for node in [0, 1] {
            let done = self.scrape(node, bulk_bytes, files).await;
            self.note(&format!("metrics of node-{node}"), done);
        }
    }

    fn note(&mut self, what: &str, done: anyhow::Result<()>) {
        if let Err(error) = done {
            self.faults.push(format!("{what}: {error:#}"));
        }
    }

    /// Through the service's address, over one kept connection.
    async fn requests(&mut self) -> anyhow::Result<()> {
        let (web, api) = (&self.pods.web, &self.pods.api);
        let marks = self.marks();
        let mut client = Client::connect(web, self.pods.service(), SERVICE).await?;
        let timing = client.ask(REQUESTS, web).await?;
        drop(client);
        let latency = rows::latency(timing.median, timing.first);
        let row = self.row(marks, web, ("api.shop:80", latency)).await?;
        let service = row.source.as_ref().map(|line| line.field("dst.service"));
        let (service_matches, carried) = (service == Some(SERVICE), REQUESTS * MARKER.len());
        self.rows.push(row.clone());
        ensure!(
            service_matches,
            "dst.service is not {SERVICE}: {:?}",
            row.source
        );
        row.expect_tunnel(web, api)?;
        row.expect_carried(carried as u64)
    }

    /// To the pod's own address.
    async fn bulk(&mut self, bytes: u64) -> anyhow::Result<()> {
        let (web, api) = (&self.pods.web, &self.pods.api);
        let marks = self.marks();
        let mut client = Client::connect(web, api.at(PORT), "api").await?;
        let time = client.upload(bytes).await?.as_secs_f64();
        drop(client);
        let rate = (bytes * 8) as f64 / time / 1e9;
        let latency = format!("{time:.1} s, {rate:.1} Gbit/s");
        let row = self.row(marks, web, ("api:8080", latency)).await?;
        self.rows.push(row.clone());
        row.expect_tunnel(web, api)?;
        row.expect_carried(bytes)
    }

    async fn refused(&mut self) -> anyhow::Result<()> {
        let (guest, api) = (&self.pods.guest, &self.pods.api);
        let marks = self.marks();
        let mut client = Client::connect(guest, self.pods.service(), SERVICE).await?;
        let time = client.expect_refusal().await?;
        let latency = format!("cut after {}", report::milliseconds(time));
        let row = self.row(marks, guest, ("api.shop:80", latency)).await?;
        self.rows.push(row.clone());
        row.expect_tunnel(guest, api)?;
        row.expect_denied()
    }

    async fn plaintext(&mut self) -> anyhow::Result<()> {
        let (legacy, api) = (&self.pods.legacy, &self.pods.api);
        let marks = self.marks();
        let mut client = Client::connect(legacy, api.at(PORT), "api").await?;
        let timing = client.ask(REQUESTS, legacy).await?;
        drop(client);
        let latency = rows::latency(timing.median, timing.first);
        let row = self.row(marks, legacy, ("api:8080", latency)).await?;
        self.rows.push(row.clone());
        row.expect_plaintext(legacy)?;
        row.expect_carried((REQUESTS * MARKER.len()) as u64)
    }

    fn marks(&self) -> Marks {
        let mark = |node| self.cluster.proxy(node).log().mark();
        (mark(0), mark(1))
    }

    /// Reads what the proxies tell of the conversation that `client` has had since `marks`.
    async fn row(
        &self,
        marks: Marks,
        client: &Pod,
        (to, latency): (&str, String),
    ) -> anyhow::Result<Row> {
        let (near, far) = (self.cluster.proxy(0).log(), self.cluster.proxy(1).log());
        let who = client.name();
        let source = match client.spec().redirect {
            Some(_) => Some(rows::end_of(near, marks.0, "outbound", who).await?),
            None => None,
        };
        Ok(Row {
            who: who.to_owned(),
            to: to.to_owned(),
            source,
            target: rows::end_of(far, marks.1, "inbound", who).await?,
            latency,
        })
    }

    /// The plaintext was last on the wire: once it is heard, so is all that went before.
    async fn listen(&mut self, bulk_bytes: u64) {
        let Pods {
            web,
            guest,
            legacy,
            api,
        } = self.pods;
        say(format_args!(
            "\nA capture on the link between the nodes, searched for {MARKER:?}:"
        ));
        let control = self.wire.hears_marker(legacy, api).await;
        // The capture may miss frames of the upload while this machine is busy, never most of the requests.
        let secrets = [(web, bulk_bytes / 100), (guest, 100)];
        for (client, least) in secrets {
            let heard = self.wire.between(client, api);
            heard.tell(client.name(), api.name());
            let done = heard.expect_secret(least);
            self.note(&format!("{} on the link", client.name()), done);
        }
        let heard = self.wire.between(legacy, api);
        heard.tell(legacy.name(), api.name());
        if !control {
            self.faults
                .push("legacy on the link: the plaintext is not heard".to_owned());
        }
    }

    async fn scrape(&mut self, node: usize, bulk: u64, files: &Files) -> anyhow::Result<()> {
        let answer = self.cluster.proxy(node).get(STATS_PORT, "/metrics").await?;
        files.write(&format!("node-{node}.metrics"), &answer.body)?;
        let metrics = Metrics::parse(&answer.body)?;
        say(format_args!(
            "\nFrom /metrics of node-{node} (5 of 27 labels; received = client to server):"
        ));
        report::metrics(&metrics);
        if node == 0 {
            expect_metrics(&metrics, bulk, ("source", "CONNECT"))
        } else {
            expect_metrics(&metrics, bulk, ("destination", "DENY"))?;
            let plain = [
                ("source_workload", "legacy"),
                ("connection_security_policy", "unknown"),
            ];
            exactly(&metrics, "opened", &plain, 1.0)
        }
    }
}

fn expect_metrics(
    metrics: &Metrics,
    bulk: u64,
    (reporter, denial): (&str, &str),
) -> anyhow::Result<()> {
    let mutual = ("connection_security_policy", "mutual_tls");
    let web = [("reporter", reporter), ("source_workload", "web"), mutual];
    exactly(metrics, "opened", &web, 2.0)?;
    exactly(metrics, "closed", &web, 2.0)?;
    let received = metrics.sum("istio_tcp_received_bytes_total", &web);
    ensure!(received >= bulk as f64, "only {received} bytes received");
    let guest = [
        ("reporter", reporter),
        ("source_workload", "guest"),
        ("response_flags", denial),
    ];
    exactly(metrics, "failed", &guest, 1.0)
}

fn exactly(
    metrics: &Metrics,
    what: &str,
    labels: &[(&str, &str)],
    value: f64,
) -> anyhow::Result<()> {
    let found = metrics.sum(&format!("istio_tcp_connections_{what}_total"), labels);
    ensure!(
        found == value,
        "{what} is {found} instead of {value} for {labels:?}"
    );
    Ok(())
}

fn where_next(files: &Files, options: Options) {
    let directory = files.directory().display();
    say(format_args!(
        "\nWhere to look next:\n  {directory}/\n    \
         node-0.log, node-1.log          what the proxies wrote; `grep access` for the connections\n    \
         node-0.metrics, node-1.metrics  all metrics, as Prometheus would scrape them\n    \
         mesh.yaml                       pods, service and policy, as the proxies were told"
    ));
    if !options.keep {
        say(
            "  make demo ARGS=--keep             leaves all of this up, to be walked on\n  \
             make test, make bench             whether it is right, and how fast it is\n  \
             README.md, ARCHITECTURE.md        how to use it, and how it works inside",
        );
    }
}

/// Has the proxies drain and end.
async fn end(cluster: &mut Cluster<'_>) -> anyhow::Result<()> {
    for node in &cluster.nodes {
        // After Ctrl-C in a terminal it may have gone already; its exit status tells.
        let _ = node.proxy.signal(Signal::SIGTERM);
    }
    for (number, node) in cluster.nodes.iter_mut().enumerate() {
        let status = node.proxy.exit(EXIT_LIMIT).await;
        let status =
            status.with_context(|| format!("the proxy of node-{number} was told to end"))?;
        ensure!(
            status.success(),
            "the proxy of node-{number} ended with {status}"
        );
    }
    Ok(())
}

fn verdict(faults: &[String], files: &Files, time: Duration) -> anyhow::Result<()> {
    let seconds = time.as_secs_f64();
    if faults.is_empty() {
        say(format_args!(
            "\nAll as it should be; cleaned up, {seconds:.1} s."
        ));
        return Ok(());
    }
    let list = faults.join("\n  ");
    let directory = files.directory().display();
    bail!("not as it should be:\n  {list}\nThe logs of the proxies are in {directory}")
}
