//! The stand-in istiod on a thread of its own, at a low priority: a real one runs on another machine.

use std::{
    fs::{read_link, read_to_string},
    ops::Deref,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use testkit::{Istiod, Pod, World, istiod::Kind};
use tokio::{
    runtime::{Builder, Runtime},
    time::sleep,
};

/// How long a proxy may take to come back, or to take in what it was sent.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A stand-in that yields to everything else on the machine. Dropping it closes everything.
#[derive(Debug)]
pub(crate) struct ControlPlane {
    istiod: Istiod,
    _runtime: Background,
}

/// A runtime whose threads are not awaited when it is dropped, which inside another runtime is forbidden.
#[derive(Debug)]
struct Background(Option<Runtime>);

impl ControlPlane {
    /// Starts it in a pod.
    ///
    /// # Errors
    /// When the port is taken.
    pub(crate) fn start(world: &World, pod: &Pod) -> anyhow::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("istiod")
            .on_thread_start(yield_to_others)
            .enable_all()
            .build()?;
        let entered = runtime.enter();
        let istiod = Istiod::options().start(world, pod)?;
        drop(entered);
        Ok(Self {
            istiod,
            _runtime: Background(Some(runtime)),
        })
    }

    /// Ends the stream and waits until its successor has asked for everything, then holds the answer back. It is
    /// [`answered`](Self::answer) with what is served then, encoded beforehand.
    pub(crate) async fn reconnect_and_hold(&self, prepare: impl FnOnce(&Istiod)) {
        let before = self.istiod.streams().len();
        self.istiod.hold(&[Kind::Address]);
        prepare(&self.istiod);
        self.istiod.end_streams(Ok(()));
        let asked = "a new stream asks for addresses";
        self.istiod
            .until_within(PATIENCE, asked, |streams| {
                let newest = streams.get(before..)?.last()?;
                newest.first(Kind::Address).map(drop)
            })
            .await;
        // The proxy has said all, and the stand-in has looked up what it will say.
        sleep(Duration::from_secs(1)).await;
    }

    /// Sends what was held back, and waits until the proxy has taken it in and said so.
    pub(crate) async fn answer(&self) {
        self.istiod.hold(&[]);
        self.synced().await;
    }

    /// Waits until the proxy has taken in all that is served.
    pub(crate) async fn synced(&self) {
        self.istiod.synced_within(PATIENCE).await;
    }

    /// The first answer of the newest stream: number of resources, and length of the message in bytes.
    ///
    /// # Errors
    /// When there was none.
    pub(crate) fn first_answer(&self) -> anyhow::Result<(usize, u64)> {
        let newest = self.istiod.newest();
        let mut sent = newest.sent.iter();
        let first = sent
            .find(|sent| sent.type_url == Kind::Address.url())
            .context("no answer about addresses")?;
        Ok((first.resources.len(), u64::try_from(first.bytes)?))
    }

    /// How many resources the proxy claimed to hold when it opened the newest stream.
    pub(crate) fn claimed(&self) -> usize {
        let newest = self.istiod.newest();
        let first = newest.first(Kind::Address);
        first.map_or(0, |first| first.initial_resource_versions.len())
    }
}

impl Deref for ControlPlane {
    type Target = Istiod;

    fn deref(&self) -> &Istiod {
        &self.istiod
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Gives the calling thread about a tenth of the weight of the others.
fn yield_to_others() {
    let lower = || -> anyhow::Result<()> {
        let this = read_link("/proc/thread-self")?;
        let thread = this.file_name().context("no thread number")?;
        let nice = nice(&read_to_string("/proc/thread-self/stat")?)?;
        let mut renice = Command::new("renice");
        renice.args(["-n", &(nice + 10).to_string(), "-p"]);
        let status = renice
            .arg(thread)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        ensure!(status.success(), "{status}");
        Ok(())
    };
    if let Err(error) = lower() {
        eprintln!("the stand-in istiod runs at normal priority: renice: {error:#}");
    }
}

/// Field 19 of `/proc/<pid>/stat`; the second may hold spaces and parentheses.
fn nice(stat: &str) -> anyhow::Result<i32> {
    let (_, rest) = stat.rsplit_once(')').context("no command name")?;
    let nice = rest.split_whitespace().nth(16).context("too short")?;
    Ok(nice.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nice_value_is_read_whatever_the_name() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 8 9 20 -5 1";
        assert_eq!(nice(stat).unwrap(), -5);
        assert!(nice("7 (a) S 1").is_err());
    }
}
