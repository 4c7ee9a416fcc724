//! Processor time and memory as the kernel accounts them.

use std::{collections::BTreeMap, fs, io, time::Duration};

/// Processor time of each thread of a process at one moment.
#[derive(Debug, Clone)]
pub struct Threads(BTreeMap<String, Duration>);

impl Threads {
    /// Reads it.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn of(pid: u32) -> io::Result<Self> {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
        let used = tasks.filter_map(|task| {
            let used = scheduled(&fs::read_to_string(task.path().join("schedstat")).ok()?)?;
            Some((task.file_name().to_string_lossy().into_owned(), used))
        });
        Ok(Self(used.collect()))
    }

    /// What was used since an earlier moment, but for threads that ended meanwhile.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Duration {
        let used = self.0.iter().map(|(thread, now)| {
            let before = earlier.0.get(thread).copied().unwrap_or_default();
            now.saturating_sub(before)
        });
        used.sum()
    }
}

/// The first field of `schedstat`: nanoseconds on a processor.
fn scheduled(schedstat: &str) -> Option<Duration> {
    let nanoseconds = schedstat.split(' ').next()?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

/// Processor time, user and system, that live threads of this process named `name…` have used.
#[must_use]
pub fn of_threads(name: &str) -> Duration {
    let tasks = fs::read_dir("/proc/self/task").expect("procfs");
    let used = tasks.flatten().filter_map(|task| {
        let comm = fs::read_to_string(task.path().join("comm")).ok()?;
        let own = comm.starts_with(name);
        let used = scheduled(&fs::read_to_string(task.path().join("schedstat")).ok()?)?;
        own.then_some(used)
    });
    used.sum()
}

/// Resident memory of this process in bytes.
#[must_use]
pub fn resident_bytes() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages = statm
        .split(' ')
        .nth(1)
        .and_then(|field| field.parse::<u64>().ok());
    pages.expect("the second field is a number") * 4096
}
