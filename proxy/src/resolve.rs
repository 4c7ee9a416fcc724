//! Addresses of host names, asked of the name servers of the proxy itself.
//!
//! `flow` resolves workloads here that the mesh knows by a host name only, at each connection to them. Answers are kept as long
//! as their servers allow, negative ones too; connections that ask for the same name at the same time are one question.

#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use foldhash::fast::RandomState;
use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use hashbrown::HashMap;
use hickory_resolver::{
    TokioResolver,
    config::LookupIpStrategy,
    net::{NetError, runtime::TokioRuntimeProvider},
    system_conf::parse_resolv_conf,
};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

/// Resolves host names by the servers of a `resolv.conf`, from the process's own network namespace.
#[derive(Debug)]
pub struct Resolver {
    path: PathBuf,
    ipv6: bool,
    held: Mutex<Option<Held>>,
    running: Mutex<HashMap<Arc<str>, WeakShared<Running>, RandomState>>,
}

/// The library, as the file configures it.
#[derive(Debug)]
struct Held {
    looked: Instant,
    modified: Option<SystemTime>,
    resolver: TokioResolver,
}

/// A question that is under way.
type Running = BoxFuture<'static, Result<Arc<[IpAddr]>, Arc<NetError>>>;

/// Why a host name has no address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// The file names no server, or cannot be read.
    #[error("no name server in {}", path.display())]
    NoServer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: NetError,
    },
    /// The servers know no address of this name, or cannot tell.
    #[error("cannot resolve {host}")]
    Failed {
        /// The name.
        host: Arc<str>,
        /// What they said.
        #[source]
        source: Arc<NetError>,
    },
    /// The servers did not answer.
    #[error("no answer for {host} within {limit:?}")]
    Timeout {
        /// The name.
        host: Arc<str>,
        /// How long they were given.
        limit: Duration,
    },
}

impl Resolver {
    /// By the servers in the file at `path`, now and whenever it changes. Without `ipv6` only IPv4 addresses are asked for.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, ipv6: bool) -> Self {
        Self {
            path: path.into(),
            ipv6,
            held: Mutex::default(),
            running: Mutex::default(),
        }
    }

    /// All addresses of `host`, waiting at most `limit`. Call it within the runtime that is to do the work.
    ///
    /// # Errors
    /// [`ResolveError`].
    /// # Cancel safety
    /// The question is given up once nobody waits for it any more.
    pub async fn addresses(
        &self,
        host: &Arc<str>,
        limit: Duration,
    ) -> Result<Arc<[IpAddr]>, ResolveError> {
        let question = self.ask(host)?;
        let _leaving = Leaving {
            resolver: self,
            host,
        };
        let answer = timeout(limit, question).await;
        let host = || Arc::clone(host);
        match answer {
            Ok(Ok(addresses)) => Ok(addresses),
            Ok(Err(source)) => Err(ResolveError::Failed {
                host: host(),
                source,
            }),
            Err(_) => Err(ResolveError::Timeout {
                host: host(),
                limit,
            }),
        }
    }

    /// The question for `host` that is under way, or a new one.
    fn ask(&self, host: &Arc<str>) -> Result<Shared<Running>, ResolveError> {
        let mut running = self.running.lock();
        if let Some(question) = running.get(host).and_then(WeakShared::upgrade) {
            return Ok(question);
        }
        let resolver = self.current().map_err(|source| ResolveError::NoServer {
            path: self.path.clone(),
            source,
        })?;
        let name = full_name(host).into_owned();
        let question: Running = Box::pin(async move {
            let found = resolver.lookup_ip(&*name).await?;
            Ok(found.iter().collect())
        });
        let question = question.shared();
        if let Some(weak) = question.downgrade() {
            running.insert(Arc::clone(host), weak);
        }
        Ok(question)
    }

    /// The file is looked at once per second at most. One that cannot be used changes nothing that worked.
    fn current(&self) -> Result<TokioResolver, NetError> {
        let mut place = self.held.lock();
        if let Some(held) = &mut *place {
            if held.looked.elapsed() >= LOOK_INTERVAL {
                held.looked = Instant::now();
                let modified = modified(&self.path);
                if modified != held.modified
                    && let Ok(resolver) = make(&self.path, self.ipv6)
                {
                    held.modified = modified;
                    held.resolver = resolver;
                }
            }
            return Ok(held.resolver.clone());
        }
        let (modified, looked) = (modified(&self.path), Instant::now());
        let resolver = make(&self.path, self.ipv6)?;
        *place = Some(Held {
            looked,
            modified,
            resolver: resolver.clone(),
        });
        Ok(resolver)
    }
}

/// Forgets a question that nobody waits for any more.
struct Leaving<'a> {
    resolver: &'a Resolver,
    host: &'a Arc<str>,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let mut running = self.resolver.running.lock();
        let question = running.get(self.host);
        if question.is_some_and(|question| question.upgrade().is_none()) {
            running.remove(self.host);
        }
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path)
        .and_then(|file| file.modified())
        .ok()
}

/// The mesh tells full names, and these are asked for as they are: what the search list of the proxy makes of a name is another
/// name. One of a single label, and only that, is looked for in the list.
fn full_name(host: &str) -> Cow<'_, str> {
    let is_name = host.contains('.') && host.parse::<IpAddr>().is_err();
    if is_name && !host.ends_with('.') {
        format!("{host}.").into()
    } else {
        host.into()
    }
}

/// Makes the library work by what the file at `path` says.
fn make(path: &Path, ipv6: bool) -> Result<TokioResolver, NetError> {
    let (servers, options) = parse_resolv_conf(std::fs::read(path)?)?;
    let mut builder = TokioResolver::builder_with_config(servers, TokioRuntimeProvider::default())
        .with_options(options);
    let options = builder.options_mut();
    // With more, the library takes an address for a name.
    options.ndots = options.ndots.min(1);
    options.cache_size = MAX_CACHED;
    options.ip_strategy = if ipv6 {
        LookupIpStrategy::Ipv4AndIpv6
    } else {
        LookupIpStrategy::Ipv4Only
    };
    builder.build()
}

/// Answers that are kept; A and AAAA of a name are two.
const MAX_CACHED: u64 = 4_096;
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
