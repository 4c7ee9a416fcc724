//! The section [`Limits`].

use std::path::Path;

use super::{
    Environment,
    reader::Reader,
    value::{self, Reject},
};
use crate::config::Limits;

pub(super) fn parse(reader: &mut Reader<'_>) -> Limits {
    let default = Limits::default();
    let budget = reader.typed("MEMORY_BUDGET", memory_budget);
    let reserve = reader.typed("DESCRIPTOR_RESERVE", |text| {
        value::integer(text, &(0..=u16::MAX))
    });
    let environment = reader.environment();
    let mut count = |key, default| reader.integer(key, &(1..=10_000_000), default);
    Limits {
        memory_budget: budget.unwrap_or_else(|| of_control_group(environment)),
        descriptor_reserve: reserve,
        flows_per_pod: count("MAX_FLOWS_PER_POD", default.flows_per_pod),
        handshakes_per_pod: count("MAX_HANDSHAKES_PER_POD", default.handshakes_per_pod),
        handshakes_per_peer: count("MAX_HANDSHAKES_PER_PEER", default.handshakes_per_peer),
    }
}

/// Bytes, with a binary unit if one is given; 0 is none.
fn memory_budget(text: &str) -> Result<Option<u64>, Reject> {
    let reject = |reason: &str| {
        let accepted = "bytes, or a number with Ki, Mi or Gi, of 32Mi or more; or 0 for no budget";
        Reject::new(reason, accepted)
    };
    let units = [("Ki", 10), ("Mi", 20), ("Gi", 30)];
    let with_unit = |(unit, shift)| Some((text.strip_suffix(unit)?, shift));
    let (digits, shift) = units.into_iter().find_map(with_unit).unwrap_or((text, 0));
    let number = value::integer(digits, &(0..=u64::MAX >> shift));
    match number.map_err(|rejected| reject(&rejected.reason))? << shift {
        0 => Ok(None),
        bytes if bytes < SMALLEST_BUDGET => Err(reject("too small")),
        bytes => Ok(Some(bytes)),
    }
}

/// Four fifths of the limit of the control group, version 2 or 1. What the kernel holds for sockets counts towards that limit,
/// and is not resident.
fn of_control_group(environment: &Environment<'_>) -> Option<u64> {
    let limit = |path: &&str| -> Option<u64> {
        let text = environment.files().read(Path::new(path)).ok()?;
        text.trim().parse().ok()
    };
    let limit = CONTROL_GROUPS.iter().find_map(limit)?;
    // "max", which is no number, or version 1's largest number of pages.
    (limit < 1 << 60).then_some(limit / 5 * 4)
}

const CONTROL_GROUPS: [&str; 2] = [
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
];
/// Less would be short before the first connection.
const SMALLEST_BUDGET: u64 = 32 << 20;
