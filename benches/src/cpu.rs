//! Processor time and memory as the kernel accounts them.

use std::{fs, time::Duration};

/// Processor time, user and system, that live threads of this process named `name…` have used.
#[must_use]
pub fn of_threads(name: &str) -> Duration {
    let tasks = fs::read_dir("/proc/self/task").expect("procfs");
    let nanoseconds = tasks.flatten().filter_map(|task| {
        let comm = fs::read_to_string(task.path().join("comm")).ok()?;
        let own = comm.starts_with(name);
        let stat = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let used = stat.split(' ').next()?.parse::<u64>().ok()?;
        own.then_some(used)
    });
    Duration::from_nanos(nanoseconds.sum())
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
