//! What outlives the show: files to read, and, if asked for, the whole stage to walk on.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use testkit::{Cluster, Log, Netns, World, proxy::STATS_PORT, sys};

use crate::{
    say,
    stage::{Pods, SERVICE},
};

/// The directory of files that stay.
#[derive(Debug)]
pub(crate) struct Files {
    directory: PathBuf,
    logs: Vec<LogFile>,
}

#[derive(Debug)]
struct LogFile {
    file: File,
    written: usize,
}

impl Files {
    /// Uses `demo` beside the profile's directory of the build, or, where that cannot be written, a new temporary directory.
    ///
    /// # Errors
    /// When neither can be written.
    pub(crate) fn create(world: &World) -> anyhow::Result<Self> {
        Self::beside_the_build(world).or_else(|_| {
            let directory = tempfile::Builder::new().prefix("culvert-demo-").tempdir()?;
            Self::inside(directory.keep(), world)
        })
    }

    fn beside_the_build(world: &World) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        let target = program.ancestors().nth(2).context("no build directory")?;
        target.join("CACHEDIR.TAG").metadata()?;
        Self::inside(target.join("demo"), world)
    }

    fn inside(directory: PathBuf, world: &World) -> anyhow::Result<Self> {
        fs::create_dir_all(&directory)?;
        let logs = world.nodes().iter().map(|node| {
            let file = File::create(directory.join(format!("{}.log", node.name())))?;
            Ok(LogFile { file, written: 0 })
        });
        let logs = logs.collect::<anyhow::Result<_>>()?;
        Ok(Self { directory, logs })
    }

    /// Where they are.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Appends what the proxies have logged since the last time.
    ///
    /// # Errors
    /// When the disk is full or the like.
    pub(crate) fn follow(&mut self, cluster: &Cluster<'_>) -> anyhow::Result<()> {
        for (file, node) in self.logs.iter_mut().zip(&cluster.nodes) {
            file.append(node.proxy.log())?;
        }
        Ok(())
    }

    /// Writes another file.
    ///
    /// # Errors
    /// As [`Files::follow`].
    pub(crate) fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.directory.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())
    }
}

impl LogFile {
    fn append(&mut self, log: &Log) -> anyhow::Result<()> {
        let lines = log.since(self.written, |_| true);
        for line in &lines {
            writeln!(self.file, "{}", line.raw)?;
        }
        self.written += lines.len();
        Ok(())
    }
}

/// Tells how to enter the pods, and keeps all up until `stopped`.
///
/// # Errors
/// When the logs cannot be written.
pub(crate) async fn stay(
    world: &World,
    pods: &Pods,
    (cluster, files): (&Cluster<'_>, &mut Files),
    stopped: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    explain(world, pods);
    let follow = async {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            files.follow(cluster)?;
        }
    };
    tokio::select! {
        () = stopped => Ok(()),
        failed = follow => failed,
    }
}

fn explain(world: &World, pods: &Pods) {
    say("\nEverything stays up until Ctrl-C. To enter a pod, put a command behind:");
    for pod in pods.all() {
        say(format_args!("  {:<6}  {}", pod.name(), enter(pod.netns())));
    }
    say("and the namespaces of the proxies and of the link between the nodes:");
    for node in world.nodes() {
        say(format_args!(
            "  {}  {}",
            node.name(),
            enter(node.proxy_netns())
        ));
    }
    say(format_args!("  link    {}", enter(world.link())));
    let service = pods.service().ip();
    say(format_args!(
        "For example:\n  in web     curl -s http://{service}/balance    (service {SERVICE})\n  \
         in guest   curl -s http://{service}/balance    (refused)\n  \
         in node-1  curl -s http://localhost:{STATS_PORT}/metrics\n  \
         in link    tcpdump -i any -A tcp"
    ));
}

/// The command that enters a namespace from any shell of the user who runs the demonstration.
fn enter(netns: &Netns) -> String {
    let path = netns.path();
    if sys::in_user_namespace() {
        let process = std::process::id();
        format!("nsenter --user --preserve-credentials --target {process} --net={path}")
    } else {
        format!("nsenter --net={path}")
    }
}
