//! Families about the process itself: build, file descriptors, pods.

use std::{
    fmt, fs,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::{
        resource::{Resource, UsageWho, getrlimit, getrusage},
        time::TimeValLike,
    },
    unistd::{SysconfVar, sysconf},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, NoLabelSet},
    metrics::{MetricType, counter::Counter, gauge::Gauge},
    registry::Registry,
};

use super::labels::label;

/// Registers `istio_build`, with `version` as its tag, and the families of descriptors, memory and CPU.
pub fn register_process(registry: &mut Registry, version: &str) {
    let build = Build(version.into());
    registry.register_collector(Box::new(build));
    registry.register_collector(Box::new(FileDescriptors));
    let started = SystemTime::now().duration_since(UNIX_EPOCH);
    registry.register_collector(Box::new(Consumption {
        started: started.unwrap_or_default(),
    }));
}

/// What the pod manager reports. Exists in shared mode only.
#[derive(Debug, Clone)]
pub struct PodMetrics {
    /// Pods that are being served.
    pub active: Gauge,
    /// Pods that the CNI agent named and that are not served yet.
    pub pending: Gauge,
    /// Pods that the CNI agent named and whose traffic nobody takes, pending ones included.
    pub unprotected: Gauge,
    /// Pods whose listeners had closed unasked and were opened again.
    pub repaired: Counter,
    /// Pod proxies started so far.
    pub started: Counter,
    /// Pod proxies stopped so far.
    pub stopped: Counter,
}

impl PodMetrics {
    /// Zeroes, exported through `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            active: Gauge::default(),
            pending: Gauge::default(),
            unprotected: Gauge::default(),
            repaired: Counter::default(),
            started: Counter::default(),
            stopped: Counter::default(),
        };
        registry.register(
            "workload_manager_active_proxy_count",
            "Pods that are being served (unstable)",
            metrics.active.clone(),
        );
        registry.register(
            "workload_manager_pending_proxy_count",
            "Pods that wait to be served (unstable)",
            metrics.pending.clone(),
        );
        registry.register(
            "culvert_pods_unprotected",
            "Pods that the CNI agent named and whose traffic nobody takes",
            metrics.unprotected.clone(),
        );
        registry.register(
            "culvert_pods_repaired",
            "Pods whose listeners had closed unasked and were opened again",
            metrics.repaired.clone(),
        );
        registry.register(
            "workload_manager_proxies_started",
            "Pod proxies started (unstable)",
            metrics.started.clone(),
        );
        registry.register(
            "workload_manager_proxies_stopped",
            "Pod proxies stopped (unstable)",
            metrics.stopped.clone(),
        );
        metrics
    }
}

#[derive(Debug)]
struct Build(Box<str>);

impl Collector for Build {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        encoder
            .encode_descriptor(
                "istio_build",
                "Version of the proxy.",
                None,
                MetricType::Gauge,
            )?
            .encode_family(self)?
            .encode_gauge(&1_u32)
    }
}

impl EncodeLabelSet for Build {
    fn encode(&self, set: &mut LabelSetEncoder<'_>) -> fmt::Result {
        label(set, "component", "ztunnel")?;
        label(set, "tag", &self.0)
    }
}

/// Reads the numbers when scraped; a family that cannot be read is left out.
#[derive(Debug)]
struct FileDescriptors;

impl Collector for FileDescriptors {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut gauge = |name, help, value: Option<u64>| match value {
            Some(value) => encoder
                .encode_descriptor(name, help, None, MetricType::Gauge)?
                .encode_gauge(&value),
            None => Ok(()),
        };
        gauge(
            "process_open_fds",
            "Open file descriptors.",
            open_descriptors(),
        )?;
        gauge(
            "process_max_fds",
            "Most file descriptors that may be open.",
            getrlimit(Resource::RLIMIT_NOFILE)
                .ok()
                .map(|(soft, _hard)| soft),
        )
    }
}

/// How many descriptors the process has open; `None` where `/proc` cannot be read. Takes some microseconds; with a kernel before
/// Linux 6.2 that, once for every few dozen of them.
pub fn open_descriptors() -> Option<u64> {
    const EACH: &str = "/proc/self/fd";
    if let Some(open @ 1..) = fs::metadata(EACH).ok().map(|all| all.len()) {
        return Some(open);
    }
    let entries = fs::read_dir(EACH).ok()?.count();
    // Without the one that reads it.
    u64::try_from(entries).ok()?.checked_sub(1)
}

/// Memory and CPU, read when scraped; a family that cannot be read is left out.
#[derive(Debug)]
struct Consumption {
    /// Since 1970.
    started: Duration,
}

impl Collector for Consumption {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        if let Some(bytes) = resident_bytes() {
            let name = "process_resident_memory_bytes";
            let gauge = MetricType::Gauge;
            encoder
                .encode_descriptor(name, "Resident memory.", None, gauge)?
                .encode_gauge(&bytes)?;
        }
        let mut gauge = |name, help, value: Option<f64>| match value {
            Some(value) => encoder
                .encode_descriptor(name, help, None, MetricType::Gauge)?
                .encode_gauge(&value),
            None => Ok(()),
        };
        gauge(
            "culvert_memory_limit_bytes",
            "Memory that the container may use; absent without a limit.",
            memory_limit(),
        )?;
        gauge(
            "process_start_time_seconds",
            "When the process started, in seconds since 1970.",
            Some(self.started.as_secs_f64()),
        )?;
        let Some(cpu) = cpu_seconds() else {
            return Ok(());
        };
        encoder
            .encode_descriptor(
                "process_cpu_seconds",
                "CPU time spent, user and system.",
                None,
                MetricType::Counter,
            )?
            .encode_counter::<NoLabelSet, _, u64>(&cpu, None)
    }
}

/// Resident memory of the process, in bytes.
pub fn resident_bytes() -> Option<u64> {
    let pages: u64 = number(
        fs::read_to_string("/proc/self/statm")
            .ok()?
            .split(' ')
            .nth(1)?,
    )?;
    let page = u64::try_from(sysconf(SysconfVar::PAGE_SIZE).ok()??).ok()?;
    Some(pages * page)
}

/// The limit of the own control group, version 2.
fn memory_limit() -> Option<f64> {
    number(fs::read_to_string("/sys/fs/cgroup/memory.max").ok()?.trim())
}

fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

fn cpu_seconds() -> Option<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let micros = (usage.user_time() + usage.system_time()).num_microseconds();
    Some(Duration::from_micros(u64::try_from(micros).ok()?).as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_families_are_there_from_the_start() {
        let mut registry = Registry::default();
        register_process(&mut registry, "1.27.1\"");
        let pods = PodMetrics::register(&mut registry);
        pods.active.set(3);
        pods.started.inc();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "# TYPE istio_build gauge",
            r#"istio_build{component="ztunnel",tag="1.27.1\""} 1"#,
            "# TYPE workload_manager_proxies_started counter",
            "# HELP workload_manager_active_proxy_count Pods that are being served (unstable).",
            "workload_manager_active_proxy_count 3",
            "workload_manager_pending_proxy_count 0",
            "culvert_pods_unprotected 0",
            "culvert_pods_repaired_total 0",
            "workload_manager_proxies_started_total 1",
            "workload_manager_proxies_stopped_total 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        let value = |name| -> f64 {
            let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap();
            line.trim().parse().unwrap()
        };
        assert!(value("process_open_fds ") >= 3.0);
        assert!(value("process_resident_memory_bytes ") > 1e6);
        assert!(value("process_cpu_seconds_total ") > 0.0);
        assert!(value("process_start_time_seconds ") > 1.7e9);
        assert!(value("process_max_fds ") >= value("process_open_fds "));
    }
}
