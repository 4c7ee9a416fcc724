//! The sections of the process: ports, threads, drain, logs.

use std::time::Duration;

use super::{
    fault::Given,
    proxy_config::ProxyConfig,
    reader::Reader,
    value::{self, Reject, Threads},
};
use crate::{
    config::{Drain, LogFormat, Logging, Ports, Runtime},
    telemetry::logging::Filter,
};

pub(super) fn ports(reader: &mut Reader<'_>, proxy: &ProxyConfig) -> Ports {
    let (admin, stats) = (
        proxy.admin_port.unwrap_or(15_000),
        proxy.stats_port.unwrap_or(15_020),
    );
    if admin == stats {
        let reject = Reject::new("one port for two servers", "two different ports");
        let keys = "proxyAdminPort and statsPort";
        reader.fault(keys, Given::Value(admin.to_string()), reject);
    }
    Ports {
        admin,
        stats,
        readiness: 15_021,
        outbound: 15_001,
        inbound_plaintext: 15_006,
        hbone: 15_008,
        socks5: 15_080,
    }
}

/// Every variable is checked, also where one that ranks higher makes it irrelevant.
pub(super) fn threads(reader: &mut Reader<'_>, proxy: &ProxyConfig, arguments: &str) -> Runtime {
    let explicit = reader.typed("ZTUNNEL_WORKER_THREADS", Threads::parse);
    let node_limit = reader.typed("ZTUNNEL_CPU_LIMIT", |text| {
        value::integer(text, &(0..=usize::from(u16::MAX)))
    });
    let limit = reader.typed("ZTUNNEL_RESOURCE_CPU_LIMIT", value::cpus);
    let request = reader.typed("ZTUNNEL_RESOURCE_CPU_REQUEST", value::cpus);

    let online = reader.environment().cpus();
    let cores = limit.or(node_limit).unwrap_or(online);
    let request = request.unwrap_or(0);
    let concurrency = proxy.concurrency.map(|n| Threads::Count(n.into()));
    let configured = explicit.or(concurrency);
    let worker_threads = match (configured, limit) {
        (Some(threads), _) => threads.of(cores),
        (None, Some(limit)) => limit.max(request),
        (None, None) => cores.div_ceil(4).max(request).max(2),
    };
    Runtime {
        worker_threads: worker_threads.max(1),
        arguments: arguments.to_owned(),
        core_dumps: reader.boolean("CORE_DUMPS", false),
    }
}

/// A little less than the time that the pod is given, so that the process ends by itself.
pub(super) fn drain(reader: &mut Reader<'_>) -> Drain {
    let deadline = reader.duration("CONNECTION_TERMINATION_DEADLINE");
    let grace = reader.typed("TERMINATION_GRACE_PERIOD_SECONDS", |text| {
        value::integer(text, &(0..=u64::MAX))
    });
    let from_grace = grace.map(|seconds| match seconds {
        11.. => seconds - 5,
        _ => seconds.saturating_sub(1).max(1),
    });
    let default = Duration::from_secs(from_grace.unwrap_or(5));
    Drain {
        deadline: deadline.unwrap_or(default),
    }
}

/// A filter that cannot be used keeps the log from being set up; it is told with what else is wrong.
pub(super) fn check_filter(reader: &mut Reader<'_>) {
    reader.typed("RUST_LOG", |text| {
        Filter::initial(text).map_err(|error| {
            let accepted = "levels and TARGET=LEVEL, separated by commas, such as info,access=off";
            Reject::new(error.to_string(), accepted)
        })
    });
}

pub(super) fn logging(reader: &Reader<'_>) -> Logging {
    let format = if reader.literal("LOG_FORMAT", "json") {
        LogFormat::Json
    } else {
        LogFormat::Text
    };
    Logging {
        filter: reader.raw("RUST_LOG").unwrap_or("info").to_owned(),
        format,
        policy_at_info: reader.literal("AUTHZ_POLICY_INFO_LOGGING", "true"),
    }
}
