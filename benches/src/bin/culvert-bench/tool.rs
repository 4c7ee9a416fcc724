//! The applications: iperf3 and nginx as servers, iperf3 and wrk as clients, each in the namespace of its pod.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use testkit::{Netns, sys::Running};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, sleep, timeout},
};

/// Port of nginx.
pub(crate) const HTTP_PORT: u16 = 8080;
/// Port of iperf3.
pub(crate) const IPERF_PORT: u16 = 5201;

/// One result: what was carried, and in which time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Carried {
    /// Payload bytes or requests.
    pub(crate) amount: f64,
    /// The same per second, as the tool says.
    pub(crate) rate: f64,
}

/// What an iperf3 client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Sends.
    Upload,
    /// Receives: `--reverse`.
    Download,
}

/// What a wrk client does with each connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Connections {
    /// Keeps it for all requests.
    Kept,
    /// Opens a new one for each request.
    New,
}

/// Starts an iperf3 server that serves one test after another.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn iperf3_server(netns: &Netns) -> anyhow::Result<Running> {
    let mut command = quiet("iperf3");
    command.args(["--server", "--port", &IPERF_PORT.to_string()]);
    netns.spawn(command).context("iperf3")
}

/// Starts nginx as one process with a small answer to everything; its files go below `directory`.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn nginx(netns: &Netns, directory: &Path) -> anyhow::Result<Running> {
    fs::create_dir_all(directory)?;
    let config = directory.join("nginx.conf");
    let place = directory.display();
    fs::write(&config, nginx_config(&place.to_string()))?;
    let mut command = quiet("nginx");
    command.arg("-p").arg(directory).arg("-c").arg(&config);
    command.arg("-e").arg(directory.join("error.log"));
    netns.spawn(command).context("nginx")
}

/// One process without master: it needs no change of user, and ends with the bench even if that is killed.
fn nginx_config(place: &str) -> String {
    let body = "0123456789abcdef".repeat(16);
    format!(
        "daemon off;\nmaster_process off;\npid {place}/nginx.pid;\nworker_rlimit_nofile 16384;\n\
         events {{ worker_connections 8192; }}\n\
         http {{\n  access_log off;\n  keepalive_requests 1000000000;\n  keepalive_timeout 600s;\n\
         client_body_temp_path {place}/body;\n  proxy_temp_path {place}/proxy;\n  fastcgi_temp_path {place}/fastcgi;\n\
         uwsgi_temp_path {place}/uwsgi;\n  scgi_temp_path {place}/scgi;\n\
         server {{\n    listen {HTTP_PORT} backlog=4096;\n    location / {{ return 200 \"{body}\"; }}\n  }}\n}}\n"
    )
}

/// Sends or receives for some seconds.
///
/// # Errors
/// When the tool fails, late or early, or says nothing that can be read.
pub(crate) async fn iperf3(
    netns: &Netns,
    server: IpAddr,
    streams: u32,
    direction: Direction,
    seconds: u64,
) -> anyhow::Result<Carried> {
    let mut attempts = 0;
    loop {
        let mut command = Command::new("iperf3");
        command
            .args(["--json", "--client", &server.to_string(), "--port"])
            .arg(IPERF_PORT.to_string())
            .args(["--parallel", &streams.to_string()])
            .args(["--time", &seconds.to_string()]);
        if direction == Direction::Download {
            command.arg("--reverse");
        }
        let output = run(netns, command, seconds).await?;
        match iperf3_result(&output) {
            // The server ends a test a moment after the client.
            Err(error) if error.to_string().contains("busy") && attempts < 20 => attempts += 1,
            result => return result,
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// Asks nginx for some seconds over this many connections.
///
/// # Errors
/// As [`iperf3`], and when more than one request of a hundred failed.
pub(crate) async fn wrk(
    netns: &Netns,
    server: IpAddr,
    connections: u32,
    kind: Connections,
    seconds: u64,
) -> anyhow::Result<Carried> {
    let mut command = Command::new("wrk");
    command
        .args(["--threads", "1", "--connections", &connections.to_string()])
        .args(["--duration", &format!("{seconds}s"), "--timeout", "5s"]);
    if kind == Connections::New {
        command.args(["--header", "Connection: close"]);
    }
    command.arg(format!("http://{}/", SocketAddr::new(server, HTTP_PORT)));
    wrk_result(&run(netns, command, seconds).await?)
}

/// Waits until both servers of a pod answer.
///
/// # Errors
/// When they do not.
pub(crate) async fn answers(netns: &Netns, server: IpAddr) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(15);
    loop {
        match one_request(netns, SocketAddr::new(server, HTTP_PORT)).await {
            Ok(()) => break,
            Err(error) if Instant::now() >= end => return Err(error.context("no answer of nginx")),
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
    iperf3(netns, server, 1, Direction::Upload, 1).await?;
    Ok(())
}

async fn one_request(netns: &Netns, server: SocketAddr) -> anyhow::Result<()> {
    let talk = async {
        let mut stream = testkit::traffic::connect(netns, server).await?;
        let request = "GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        ensure!(
            answer.starts_with(b"HTTP/1.1 200"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
        Ok(())
    };
    timeout(Duration::from_secs(2), talk).await?
}

fn quiet(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Runs a client to its end; its standard output. A failing iperf3 says why there, too.
async fn run(netns: &Netns, mut command: Command, seconds: u64) -> anyhow::Result<String> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let what = command.get_program().to_string_lossy().into_owned();
    let mut running = netns.spawn(command).with_context(|| what.clone())?;
    let mut stdout = running.child.stdout.take().context("stdout")?;
    let mut text = String::new();
    let limit = Duration::from_secs(seconds + 20);
    timeout(limit, stdout.read_to_string(&mut text))
        .await
        .with_context(|| format!("{what} does not end"))??;
    let status = timeout(limit, running.child.wait()).await??;
    ensure!(
        status.success() || text.contains("\"error\""),
        "{what}: {status}: {text}"
    );
    Ok(text)
}

fn iperf3_result(json: &str) -> anyhow::Result<Carried> {
    #[derive(Deserialize)]
    struct Output {
        error: Option<String>,
        #[serde(default)]
        end: End,
    }
    #[derive(Deserialize, Default)]
    struct End {
        sum_received: Option<Sum>,
    }
    #[derive(Deserialize)]
    struct Sum {
        bytes: f64,
        bits_per_second: f64,
    }
    let output: Output = serde_json::from_str(json).context("output of iperf3")?;
    if let Some(error) = output.error {
        bail!("iperf3: {error}");
    }
    let sum = output.end.sum_received.context("iperf3 has no sum")?;
    ensure!(sum.bytes > 0.0, "iperf3 carried nothing");
    Ok(Carried {
        amount: sum.bytes,
        rate: sum.bits_per_second / 8.0,
    })
}

fn wrk_result(text: &str) -> anyhow::Result<Carried> {
    let rate = text
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"))
        .with_context(|| format!("output of wrk: {text}"))?;
    let total = text
        .lines()
        .find_map(|line| line.trim().split_once(" requests in "))
        .context("wrk has no total")?;
    let amount: f64 = total.0.trim().parse()?;
    let bad = failures(text);
    ensure!(
        amount > 0.0 && bad * 100.0 <= amount,
        "wrk: {bad} failures, {amount} answers"
    );
    Ok(Carried {
        amount,
        rate: rate.trim().parse()?,
    })
}

/// Failed connections, reads and writes, timeouts, and answers other than 2xx and 3xx.
fn failures(text: &str) -> f64 {
    let lines = text.lines().filter(|line| {
        let line = line.trim();
        line.starts_with("Socket errors:") || line.starts_with("Non-2xx")
    });
    lines
        .flat_map(|line| line.split([' ', ',']))
        .filter_map(|word| word.parse::<f64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_at_the_receiver_counts() {
        let json = r#"{"start":{},"end":{"sum_sent":{"bytes":9,"bits_per_second":9},"sum_received":{"bytes":4000,"bits_per_second":16000.0}}}"#;
        let expected = Carried {
            amount: 4000.0,
            rate: 2000.0,
        };
        assert_eq!(iperf3_result(json).unwrap(), expected);
        let busy = r#"{"start":{},"end":{},"error":"error - the server is busy running a test."}"#;
        assert!(
            iperf3_result(busy)
                .unwrap_err()
                .to_string()
                .contains("busy")
        );
        assert!(iperf3_result(r#"{"end":{}}"#).is_err());
    }

    #[test]
    fn requests_and_failures_of_wrk_are_read() {
        let good = "  5000 requests in 2.00s, 1.20MB read\n  Socket errors: connect 0, read 3, write 0, timeout 1\n\
                    Requests/sec:   2500.50\nTransfer/sec:    600KB\n";
        let expected = Carried {
            amount: 5000.0,
            rate: 2500.5,
        };
        assert_eq!(wrk_result(good).unwrap(), expected);
        assert!((failures(good) - 4.0).abs() < f64::EPSILON);
        let bad = good.replace(
            "Requests/sec",
            "  Non-2xx or 3xx responses: 4000\nRequests/sec",
        );
        assert!(wrk_result(&bad).is_err());
        assert!(wrk_result("unable to connect").is_err());
    }
}
