//! What the container and the kernel below it allow.

use std::{fs, path::Path};

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::geteuid,
};

use super::finding::Finding;
use crate::{
    config::{Config, ProxyMode},
    listen,
};

/// The capabilities that the proxy needs, by their numbers in the kernel's sets.
const NEEDED: [(&str, u32); 3] = [("NET_ADMIN", 12), ("NET_RAW", 13), ("SYS_ADMIN", 21)];

/// Judges the text of `/proc/self/status`.
pub(super) fn capabilities(status: &str) -> Vec<Finding> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    let Some(effective) = effective else {
        return vec![Finding::skipped("/proc/self/status names no capabilities")];
    };
    let has = |(_, bit): &&(&str, u32)| effective & (1 << *bit) != 0;
    let missing: Vec<_> = NEEDED.iter().filter(|it| !has(it)).collect();
    if missing.is_empty() {
        return vec![Finding::ok("NET_ADMIN, NET_RAW and SYS_ADMIN are there")];
    }
    let finding = |(name, _): &(&str, u32)| {
        Finding::error(
            format!("the capability {name} is missing"),
            format!(
                "add {name} to securityContext.capabilities.add of the container; a Pod Security level below privileged forbids it"
            ),
        )
    };
    missing.into_iter().map(finding).collect()
}

/// Tries what serving pods takes, and looks at limits.
pub(super) fn kernel(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    if config.capture.mode == ProxyMode::Shared {
        for shortage in listen::shortages(&config.sockets) {
            let (what, way_out) = halves(&shortage.need.to_string());
            let what = format!("{what}: {}", shortage.source);
            findings.push(if shortage.need.is_vital(&config.sockets) {
                Finding::error(what, way_out)
            } else {
                Finding::warning(what, way_out)
            });
        }
        if !geteuid().is_root() {
            findings.push(Finding::warning(
                format!("this process runs as user {}", geteuid()),
                "run as user 0: the kernel shares ports among sockets of one user only, so neither ztunnel nor a Culvert of \
                 another user can be replaced without a gap, and the agent's socket belongs to root",
            ));
        }
    }
    if let Ok(release) = fs::read_to_string("/proc/sys/kernel/osrelease") {
        findings.push(release_finding(release.trim()));
    }
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && hard < FEW_FILES
    {
        findings.push(Finding::warning(
            format!("this process may open {hard} files"),
            "raise the limit of the container runtime (LimitNOFILE): each pod takes 8 and each connection up to 2",
        ));
    }
    findings.extend(conntrack(Path::new("/proc/sys/net/netfilter")));
    findings
}

/// The two halves of a text around its semicolon.
fn halves(text: &str) -> (String, String) {
    let (what, way_out) = text.split_once("; ").unwrap_or((text, ""));
    (what.to_owned(), way_out.to_owned())
}

/// Judges a version such as `6.12.4-talos`.
fn release_finding(release: &str) -> Finding {
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < OLDEST => Finding::warning(
            format!("Linux {release} is older than {}.{}", OLDEST.0, OLDEST.1),
            "the CNI agent's nftables rules need a later one",
        ),
        _ => Finding::ok(format!("Linux {release}")),
    }
}

/// A full table of connections drops packets without a word.
fn conntrack(directory: &Path) -> Option<Finding> {
    let read = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(directory.join(name)).ok()?;
        text.trim().parse().ok()
    };
    let (count, max) = (read("nf_conntrack_count")?, read("nf_conntrack_max")?);
    (max > 0 && count.saturating_mul(10) > max.saturating_mul(8)).then(|| {
        Finding::warning(
            format!("{count} of {max} entries of connection tracking are in use"),
            "raise net.netfilter.nf_conntrack_max on the node",
        )
    })
}

/// What nftables rules of the agent take.
const OLDEST: (u32, u32) = (5, 13);
/// What a hundred pods with a hundred connections each come to.
const FEW_FILES: u64 = 20_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Severity;

    #[test]
    fn missing_capabilities_are_named() {
        let named = |set: &str| -> Vec<String> {
            let findings = capabilities(&format!("Name:\tx\nCapEff:\t{set}\n")).into_iter();
            findings.map(|one| one.what).collect()
        };
        assert!(named("000001fffeffffff")[0].contains("are there"));
        assert!(named("0000000000203000")[0].contains("are there"));
        assert_eq!(
            named("0000000000003000"),
            ["the capability SYS_ADMIN is missing"]
        );
        assert_eq!(named("0000000000000000").len(), 3);
        assert_eq!(capabilities("")[0].severity, Severity::Skipped);
    }

    #[test]
    fn old_kernels_are_told() {
        for (release, severity) in [
            ("6.12.4-talos", Severity::Ok),
            ("5.13.0", Severity::Ok),
            ("5.4.0-150-generic", Severity::Warning),
            ("4.18.0", Severity::Warning),
            ("weird", Severity::Ok),
        ] {
            assert_eq!(release_finding(release).severity, severity, "{release}");
        }
    }

    #[test]
    fn a_table_that_fills_up_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let full = |count: &str| {
            fs::write(directory.path().join("nf_conntrack_count"), count).unwrap();
            fs::write(directory.path().join("nf_conntrack_max"), "1000\n").unwrap();
            conntrack(directory.path())
        };
        assert_eq!(full("799\n"), None);
        assert_eq!(full("900\n").unwrap().severity, Severity::Warning);
        assert_eq!(conntrack(Path::new("/nowhere")), None);
    }
}
