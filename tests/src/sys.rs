//! What speaks to the kernel: network namespaces, and processes inside them.
//!
//! A namespace has no name: it lives as long as a descriptor of it is open. Code enters it on a thread of its own that ends with the
//! call, so no thread of the test process is ever left in a foreign namespace.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    panic::resume_unwind,
    process::{Command, Stdio},
    sync::{Once, mpsc},
    thread,
};

use anyhow::{Context, bail};
use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
        stat::fstat,
    },
};
use tokio::{process::Child, runtime::Handle};

/// A network namespace, held by its descriptor.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
}

impl Netns {
    /// Makes a new, empty network namespace with `lo` down.
    ///
    /// # Errors
    /// When the kernel refuses, typically for want of `CAP_SYS_ADMIN`.
    pub fn new() -> io::Result<Self> {
        let made = thread::spawn(|| -> io::Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(File::open("/proc/thread-self/ns/net")?.into())
        });
        let fd = made.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok(Self { fd })
    }

    /// The namespace of this process.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn current() -> io::Result<Self> {
        let fd = File::open("/proc/self/ns/net")?.into();
        Ok(Self { fd })
    }

    /// Another handle to the same namespace.
    ///
    /// # Errors
    /// When out of descriptors.
    pub fn duplicate(&self) -> io::Result<Self> {
        let fd = self.fd.try_clone()?;
        Ok(Self { fd })
    }

    /// Runs `job` on a thread inside the namespace. Sockets that it makes belong to the namespace for ever; children that it starts
    /// live there.
    ///
    /// # Panics
    /// With the panic of `job`, or when the namespace cannot be entered.
    pub fn run<T: Send>(&self, job: impl FnOnce() -> T + Send) -> T {
        let enter = || {
            setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET)
                .expect("setns into a namespace of ours");
            job()
        };
        thread::scope(|scope| {
            scope
                .spawn(enter)
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Runs a program to its end inside the namespace, `input` on its standard input.
    ///
    /// # Errors
    /// When the program cannot be started or fails; its standard error is in the text.
    pub fn command(&self, program: &str, args: &[&str], input: &str) -> anyhow::Result<String> {
        self.run(|| run_to_end(Command::new(program).args(args).env("PATH", tools()), input))
            .with_context(|| format!("{program} {} <<<\n{input}", args.join(" ")))
    }

    /// Writes a value below `/proc/sys/net` of the namespace, for example `ipv4/ip_forward`.
    ///
    /// # Errors
    /// When the key does not exist or refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        self.run(|| std::fs::write(format!("/proc/sys/net/{key}"), value))
            .with_context(|| format!("net/{key} = {value}"))
    }

    /// Starts a long-running program inside the namespace. It dies with the returned [`Running`], and with this process.
    ///
    /// # Errors
    /// When it cannot be started.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn(&self, mut command: Command) -> anyhow::Result<Running> {
        let (started_tx, started_rx) = mpsc::sync_channel(1);
        let (stop_tx, stop_rx) = mpsc::sync_channel::<()>(1);
        let (runtime, fd) = (Handle::current(), self.fd.try_clone()?);
        die_with_parent_thread(&mut command);
        // The parent-death signal is tied to the thread that forks: this one waits until the program is not needed any more.
        thread::spawn(move || {
            let _runtime = runtime.enter();
            let child = setns(&fd, CloneFlags::CLONE_NEWNET)
                .map_err(io::Error::from)
                .and_then(|()| {
                    tokio::process::Command::from(command)
                        .kill_on_drop(true)
                        .spawn()
                });
            let _ = started_tx.send(child);
            let _ = stop_rx.recv();
        });
        let child = started_rx.recv().context("the starting thread died")??;
        Ok(Running {
            child,
            _thread: stop_tx,
        })
    }

    /// A path that other processes can open while this one lives.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd())
    }

    /// Device and inode: two descriptors mean the same namespace iff these are equal.
    ///
    /// # Panics
    /// When `fstat` fails on an open descriptor.
    #[must_use]
    pub fn id(&self) -> (u64, u64) {
        let stat = fstat(&self.fd).expect("fstat of an open descriptor");
        (stat.st_dev, stat.st_ino)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A program inside a namespace.
#[derive(Debug)]
pub struct Running {
    /// The process; reaped and killed by the runtime when dropped.
    pub child: Child,
    _thread: mpsc::SyncSender<()>,
}

/// Makes sure that this process may make network namespaces, else starts the program again inside a user namespace where it may.
/// Raises the soft limit of descriptors, too.
///
/// # Panics
/// When neither works; the message says what is missing.
pub fn ensure_privileges() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = Netns::new() {
            panic!(
                "{:#}",
                reexecute().context(format!("no network namespace: {error}"))
            );
        }
        if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        }
    });
}

/// Survives re-execution, and so guards against an endless one.
const GUARD: &str = "TESTKIT_IN_USER_NAMESPACE";

/// Whether [`ensure_privileges`] had to start this program again inside a user namespace.
#[must_use]
#[expect(
    clippy::disallowed_methods,
    reason = "what survives re-execution is the environment"
)]
pub fn in_user_namespace() -> bool {
    std::env::var_os(GUARD).is_some()
}

/// Replaces this process by itself inside a user namespace; returns only with the reason why it could not.
fn reexecute() -> anyhow::Error {
    if in_user_namespace() {
        return anyhow::anyhow!("not even inside a user namespace");
    }
    let this = match std::env::current_exe() {
        Ok(path) => path,
        Err(error) => return error.into(),
    };
    let error = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--mount", "--"])
        .arg(this)
        .args(std::env::args_os().skip(1))
        .env(GUARD, "1")
        .exec();
    anyhow::Error::new(error)
        .context("run as root, or allow user namespaces and install util-linux")
}

/// Has the kernel kill the program when the thread that starts it ends.
#[expect(
    unsafe_code,
    reason = "std offers no other way to act between fork and exec"
)]
fn die_with_parent_thread(command: &mut Command) {
    let arm = || prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from);
    // SAFETY: between fork and exec only `prctl` runs, a single system call that neither allocates nor takes a lock.
    unsafe { command.pre_exec(arm) };
}

/// `PATH` with the directories of `ip` and `nft`, which a Debian user's own lacks.
#[must_use]
#[expect(
    clippy::disallowed_methods,
    reason = "test runs are steered by the environment"
)]
pub fn tools() -> String {
    let own = std::env::var("PATH").unwrap_or_default();
    format!("{own}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
}

fn run_to_end(command: &mut Command, input: &str) -> anyhow::Result<String> {
    use std::io::Write as _;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("is it installed?")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "{}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
