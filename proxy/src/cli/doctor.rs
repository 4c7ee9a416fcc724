//! `culvert doctor`: examines the node that it runs on, and says what is wrong and what to do about it.
//!
//! Each check is a function or a task of its own, so that one that fails, panics or takes long hides no other. What only the
//! running proxy can know (the pods' namespaces are open to it alone) is asked of its admin server. Nothing is changed.

mod files;
mod finding;
mod host;
mod running;
mod servers;
mod token;

use std::{
    collections::HashMap,
    fs, io,
    net::SocketAddr,
    os::unix::fs::FileTypeExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use clap::Args;
use futures_util::future::BoxFuture;
use tokio::{
    runtime::Builder,
    task::{JoinSet, spawn_blocking},
    time::timeout,
};

pub use finding::{Finding, Report, Severity};

use super::{
    Environment, Output,
    admin::{self, Answer},
    configuration,
};
use crate::{
    config::{Config, ProxyMode},
    listen::{self, Netns},
    pods,
};
use running::{Dump, Refused};
use servers::Server;

/// What is to be examined, and how it is told.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[non_exhaustive]
pub struct Examination {
    /// Where the admin server of the running proxy is
    #[arg(long, default_value = "127.0.0.1:15000")]
    pub admin: SocketAddr,
    /// How to tell
    #[arg(long, value_enum, default_value = "text")]
    pub output: Output,
}

impl Examination {
    /// The report as it is to be printed.
    #[must_use]
    pub fn print(&self, report: &Report) -> String {
        match self.output {
            Output::Text => report.text(),
            // A report is made of strings.
            Output::Json => serde_json::to_string_pretty(report).unwrap_or_default(),
        }
    }
}

/// Examines the node with the configuration that the proxy would have.
///
/// # Errors
/// If not even a runtime can be made.
pub fn doctor(environment: &Environment<'_>, examination: &Examination) -> io::Result<Report> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let admin = examination.admin;
    let mut findings = Vec::new();
    let config = match configuration(environment, "doctor") {
        Ok(config) => {
            findings.push(Finding::ok("all settings can be used").of("configuration"));
            config
        }
        Err(faults) => {
            let faults = faults.iter().map(|fault| {
                let way_out = "put the variable right: the proxy does not start with it";
                Finding::error(fault.to_string(), way_out).of("configuration")
            });
            findings.extend(faults);
            // What needs no settings is examined all the same.
            findings.extend(in_order(runtime.block_on(examine(vec![capabilities()]))));
            return Ok(Report::new(findings));
        }
    };
    let patient = Arc::new(Patient { config, admin });
    findings.extend(runtime.block_on(async {
        let (proxy, known) = patient.ask().await;
        let mut checks = vec![
            capabilities(),
            patient.check("kernel", async |it| host::kernel(&it.config)),
        ];
        checks.extend(patient.checks(known));
        let mut all = proxy;
        all.extend(in_order(examine(checks).await));
        all
    }));
    Ok(Report::new(findings))
}

/// The node as the proxy sees it.
struct Patient {
    config: Config,
    admin: SocketAddr,
}

/// What the running proxy said.
#[derive(Debug)]
struct Known {
    dump: Dump,
    refused: Refused,
    /// What it is not ready for.
    pending: String,
}

struct Check {
    name: &'static str,
    work: BoxFuture<'static, Vec<Finding>>,
}

fn capabilities() -> Check {
    let work = Box::pin(async {
        let status = fs::read_to_string("/proc/self/status");
        host::capabilities(&status.unwrap_or_default())
    });
    Check {
        name: "capabilities",
        work,
    }
}

impl Patient {
    fn check<F>(
        self: &Arc<Self>,
        name: &'static str,
        work: impl FnOnce(Arc<Self>) -> F + Send + 'static,
    ) -> Check
    where
        F: Future<Output = Vec<Finding>> + Send,
    {
        let patient = Arc::clone(self);
        let work = Box::pin(async move { work(patient).await });
        Check { name, work }
    }

    /// All checks that depend on settings or on the running proxy.
    fn checks(self: &Arc<Self>, known: Option<Known>) -> Vec<Check> {
        let known = Arc::new(known);
        let with = |name, judge: fn(&Self, &Known) -> Vec<Finding>| {
            let known = Arc::clone(&known);
            self.check(name, async move |it| match &*known {
                Some(known) => judge(&it, known),
                None => vec![Finding::skipped("only the running proxy knows")],
            })
        };
        let (xds, ca) = Server::all(&self.config);
        let call = |name, server: Option<Server>, without: &'static str| {
            self.check(name, async move |it| match server {
                Some(server) => server.call(&it.config).await,
                None => vec![Finding::skipped(without)],
            })
        };
        let peers = {
            let known = Arc::clone(&known);
            self.check("peers", async move |it| match &*known {
                Some(known) => {
                    let identity = &it.config.identity;
                    let node = identity.node_name.as_deref();
                    known.dump.reach(node, &identity.network).await
                }
                None => vec![Finding::skipped("only the running proxy knows them")],
            })
        };
        let agent = {
            let known = Arc::clone(&known);
            self.check("agent", async move |it| {
                it.agent(known.as_ref().as_ref()).await
            })
        };
        vec![
            agent,
            with("pods", |_, known| {
                let own = Netns::current().and_then(|own| listen::mtu(&own));
                known.dump.pods(own.ok())
            }),
            self.check("roots", async |it| files::roots(&it.config)),
            self.check("token", async |it| {
                files::tokens(&it.config, SystemTime::now())
            }),
            call("istiod", xds, "the mesh is a file"),
            call(
                "ca",
                ca,
                "certificates come from istiod, or from the process itself",
            ),
            peers,
            with("probes", |_, known| known.dump.probes(&known.refused)),
        ]
    }

    /// What the running proxy says of itself and of all else.
    async fn ask(&self) -> (Vec<Finding>, Option<Known>) {
        let admin = self.admin;
        let readiness = SocketAddr::new(admin.ip(), self.config.ports.readiness);
        let asked = spawn_blocking(move || {
            let get = |server, path| admin::get(server, path);
            let dump: Dump = parsed(&get(admin, "/config_dump")?)?;
            let refused: Refused = parsed(&get(admin, "/debug/refusals")?)?;
            let ready = get(readiness, "/healthz/ready")?;
            io::Result::Ok(Known {
                dump,
                refused,
                pending: if ready.status == 200 {
                    String::new()
                } else {
                    ready.body.trim().to_owned()
                },
            })
        });
        let finding = match asked
            .await
            .unwrap_or_else(|panic| Err(io::Error::other(panic)))
        {
            Ok(known) if known.pending.is_empty() => {
                return (
                    vec![Finding::ok("it runs and is ready").of("proxy")],
                    Some(known),
                );
            }
            Ok(known) => {
                let way_out = "see the findings below, and its log";
                let finding = Finding::warning(known.pending.clone(), way_out).of("proxy");
                return (vec![finding], Some(known));
            }
            Err(error) => Finding::error(
                format!("no proxy answers at {admin}: {error}"),
                "run this in the proxy's container, with --admin if its port is another one, and see whether it starts",
            ),
        };
        (vec![finding.of("proxy")], None)
    }

    /// Whether the CNI agent is there. A running proxy is asked: the agent would take a second connection for a new proxy, and
    /// hand it the next pod.
    async fn agent(&self, known: Option<&Known>) -> Vec<Finding> {
        if self.config.capture.mode != ProxyMode::Shared {
            return vec![Finding::skipped("a proxy of one workload needs none")];
        }
        let path = &self.config.capture.agent_socket;
        if let Some(finding) = missing_socket(path) {
            return vec![finding];
        }
        let shown = path.display();
        let way_out = "is istio-cni's pod on this node ready, with ambient enabled?";
        match known {
            Some(known) if known.pending.contains(pods::READINESS_TASK) => {
                if known.dump.has_pending() {
                    return vec![Finding::ok(format!("it talks to the proxy over {shown}"))];
                }
                vec![Finding::error(
                    "the proxy waits for it to name the pods",
                    way_out,
                )]
            }
            Some(_) => vec![Finding::ok(format!("it talks to the proxy over {shown}"))],
            None => match tokio_seqpacket::UnixSeqpacket::connect(path).await {
                Ok(_) => vec![Finding::ok(format!("it listens on {shown}"))],
                Err(error) => vec![Finding::error(
                    format!("nobody listens on {shown}: {error}"),
                    way_out,
                )],
            },
        }
    }
}

/// What is wrong with a path where a socket should be.
fn missing_socket(path: &Path) -> Option<Finding> {
    let way_out = "istio-cni must run on this node with ambient enabled; mount the host's directory /var/run/ztunnel, and not the \
                   socket, which is made anew whenever the agent starts";
    match fs::metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => None,
        Ok(_) => Some(Finding::error(
            format!("{} is no socket", path.display()),
            way_out,
        )),
        Err(error) => Some(Finding::error(
            format!("there is no socket {}: {error}", path.display()),
            way_out,
        )),
    }
}

fn parsed<T: for<'a> serde::Deserialize<'a>>(answer: &Answer) -> io::Result<T> {
    serde_json::from_str(&answer.body).map_err(io::Error::other)
}

/// Runs all checks at once. The index keeps their order.
async fn examine(checks: Vec<Check>) -> Vec<(usize, Vec<Finding>)> {
    let mut running = JoinSet::new();
    let mut names = HashMap::new();
    for (index, Check { name, work }) in checks.into_iter().enumerate() {
        let id = running.spawn(timeout(LIMIT, work)).id();
        names.insert(id, (index, name));
    }
    let mut found = Vec::new();
    while let Some(end) = running.join_next_with_id().await {
        let (id, findings) = match end {
            Ok((id, Ok(findings))) => (id, findings),
            Ok((id, Err(_))) => (id, vec![unfinished("it took too long")]),
            Err(panic) => (panic.id(), vec![unfinished(&panic.to_string())]),
        };
        if let Some((index, name)) = names.get(&id) {
            let findings = findings.into_iter().map(|one| one.of(name));
            found.push((*index, findings.collect()));
        }
    }
    found
}

fn unfinished(why: &str) -> Finding {
    Finding::warning(
        format!("the check did not come to its end: {why}"),
        "try again",
    )
}

fn in_order(mut found: Vec<(usize, Vec<Finding>)>) -> impl Iterator<Item = Finding> {
    found.sort_by_key(|(index, _)| *index);
    found.into_iter().flat_map(|(_, findings)| findings)
}

/// How long each check may take.
const LIMIT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    fn check(
        name: &'static str,
        work: impl Future<Output = Vec<Finding>> + Send + 'static,
    ) -> Check {
        let work = Box::pin(work);
        Check { name, work }
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_that_fails_hides_no_other() {
        let checks = vec![
            check("slow", std::future::pending()),
            check("broken", async { panic!("on purpose") }),
            check("well", async { vec![Finding::ok("fine")] }),
        ];
        let found: Vec<_> = in_order(examine(checks).await).collect();
        let told: Vec<_> = found.iter().map(|one| (one.check, one.severity)).collect();
        assert_eq!(
            told,
            [
                ("slow", Severity::Warning),
                ("broken", Severity::Warning),
                ("well", Severity::Ok)
            ]
        );
    }

    #[test]
    fn what_is_no_socket_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ztunnel.sock");
        assert!(missing_socket(&path).unwrap().what.contains("no socket"));
        fs::write(&path, "").unwrap();
        assert!(missing_socket(&path).unwrap().what.contains("is no socket"));
        fs::remove_file(&path).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(missing_socket(&path), None);
    }
}
