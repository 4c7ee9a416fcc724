//! Debian's `dnsmasq` as the server that the proxy asks.

use std::{
    net::{IpAddr, SocketAddr},
    process::{Command, Stdio},
};

use crate::{
    sys::{Netns, Running, tools},
    traffic, wait,
};

/// A running server. Dropping it ends it.
#[derive(Debug)]
pub struct Dnsmasq {
    _running: Running,
}

impl Dnsmasq {
    /// Serves `zone` with authority at port 53 of these addresses; `records` are options of dnsmasq, such as
    /// `host-record=a.example,192.0.2.1`. Everything outside the zone is refused.
    ///
    /// # Errors
    /// When it is not installed.
    ///
    /// # Panics
    /// When it does not serve within ten seconds.
    pub async fn start(
        netns: &Netns,
        at: &[IpAddr],
        zone: &str,
        records: &[String],
    ) -> anyhow::Result<Self> {
        let listed = at.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut command = Command::new("dnsmasq");
        command
            .env("PATH", tools())
            .args(["--no-daemon", "--conf-file=/dev/null", "--no-resolv"])
            .args(["--no-hosts", "--bind-interfaces", "--pid-file="])
            .arg(format!("--listen-address={}", listed.join(",")))
            .arg(format!("--auth-server=ns.{zone},{}", listed.join(",")))
            .arg(format!("--auth-zone={zone}"))
            .arg("--auth-ttl=77")
            .args(records.iter().map(|record| format!("--{record}")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let running = netns.spawn(command)?;
        for ip in at {
            let serves = async || {
                let stream = traffic::connect(netns, SocketAddr::new(*ip, 53)).await;
                stream.is_ok().then_some(())
            };
            wait::until(wait::SOON, "dnsmasq serves", serves).await;
        }
        Ok(Self { _running: running })
    }
}
