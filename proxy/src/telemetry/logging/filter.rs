//! Which records are written: the level filter and its grammar.

use std::{cmp::Reverse, fmt, str::FromStr};

use tracing::{Metadata, level_filters::LevelFilter};

/// Levels by target, written `LEVEL` or `TARGET=LEVEL`, separated by commas. The longest matching
/// target wins.
///
/// Operators know the areas of ztunnel (`ztunnel::proxy`, `ztunnel::xds`, …); each stands for the
/// modules that do this work here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Most specific first.
    clauses: Vec<Clause>,
}

/// A clause that does not follow the grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{clause}` is not a level (off, error, warn, info, debug, trace) or TARGET=LEVEL")]
pub struct FilterError {
    clause: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Clause {
    /// As written; empty for a bare level.
    target: Box<str>,
    /// Module paths that it stands for.
    paths: Vec<Box<str>>,
    level: LevelFilter,
}

impl Filter {
    /// The filter that a process begins with.
    ///
    /// # Errors
    /// A clause is malformed.
    pub fn initial(configured: &str) -> Result<Self, FilterError> {
        let quiet = Self {
            clauses: vec![Clause::new("hickory_server::server", LevelFilter::OFF)],
        };
        quiet.with(configured)
    }

    /// This filter with `clauses` on top: they replace clauses for the same target.
    ///
    /// # Errors
    /// A clause is malformed.
    pub fn with(&self, clauses: &str) -> Result<Self, FilterError> {
        let mut all = self.clauses.clone();
        for text in clauses.split(',').map(str::trim).filter(|c| !c.is_empty()) {
            let clause: Clause = text.parse()?;
            all.retain(|old| old.target != clause.target);
            all.push(clause);
        }
        all.sort_by_key(|clause| Reverse(clause.target.len()));
        Ok(Self { clauses: all })
    }

    /// Whether records and spans of this call site are wanted.
    pub(super) fn enables(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level_of(metadata.target())
    }

    /// The most verbose level that any target has.
    pub(super) fn max_level(&self) -> LevelFilter {
        let levels = self.clauses.iter().map(|clause| clause.level);
        levels.max().unwrap_or(LevelFilter::OFF)
    }

    fn level_of(&self, target: &str) -> LevelFilter {
        self.clauses
            .iter()
            .filter_map(|clause| Some((clause.specificity(target)?, clause.level)))
            .reduce(|best, next| if next.0 > best.0 { next } else { best })
            .map_or(LevelFilter::OFF, |(_, level)| level)
    }
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let nothing = Self {
            clauses: Vec::new(),
        };
        nothing.with(text)
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, clause) in self.clauses.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            let equals = if clause.target.is_empty() { "" } else { "=" };
            write!(f, "{comma}{}{equals}{}", clause.target, clause.level)?;
        }
        Ok(())
    }
}

impl Clause {
    fn new(target: &str, level: LevelFilter) -> Self {
        Self {
            target: target.into(),
            paths: paths(target),
            level,
        }
    }

    /// How closely this clause names `target`: length of the path that matches, then length of what
    /// the operator wrote, since several areas may stand for one module.
    fn specificity(&self, target: &str) -> Option<(usize, usize)> {
        let longest = self
            .paths
            .iter()
            .filter(|path| is_prefix(path, target))
            .map(|path| path.len())
            .max()?;
        Some((longest, self.target.len()))
    }
}

impl FromStr for Clause {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let error = || FilterError {
            clause: text.to_owned(),
        };
        let (target, level) = match text.split_once('=') {
            Some((target, level)) if !target.is_empty() => (target, level),
            Some(_) => return Err(error()),
            // istioctl advertises `TARGET:LEVEL` too.
            None => match text.rsplit_once(':') {
                Some((target, level)) if !target.is_empty() && !target.ends_with(':') => {
                    (target, level)
                }
                Some(_) => return Err(error()),
                None => ("", text),
            },
        };
        let level = level_named(level).ok_or_else(error)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | ':' | '.');
        if !target.chars().all(plain) {
            return Err(error());
        }
        Ok(Self::new(target, level))
    }
}

fn level_named(name: &str) -> Option<LevelFilter> {
    match name.to_ascii_lowercase().as_str() {
        "off" => Some(LevelFilter::OFF),
        "error" | "critical" => Some(LevelFilter::ERROR),
        "warn" | "warning" => Some(LevelFilter::WARN),
        "info" => Some(LevelFilter::INFO),
        "debug" => Some(LevelFilter::DEBUG),
        "trace" => Some(LevelFilter::TRACE),
        _ => None,
    }
}

/// Whether `path` names `target` or a module that encloses it.
fn is_prefix(path: &str, target: &str) -> bool {
    match target.strip_prefix(path) {
        Some(rest) => path.is_empty() || rest.is_empty() || rest.starts_with("::"),
        None => false,
    }
}

/// The module paths that a written target stands for: itself, and its counterparts here.
fn paths(target: &str) -> Vec<Box<str>> {
    let counterparts: &[&str] = if target == "ztunnel" {
        &["culvert", "xds_client", "cert_agent"]
    } else if target == "state" {
        &["ztunnel::state"]
    } else {
        AREAS
            .iter()
            .find(|(area, _)| is_prefix(area, target))
            .map_or(&[], |(_, modules)| modules)
    };
    let counterparts = counterparts.iter().copied();
    std::iter::once(target)
        .chain(counterparts)
        .map(Box::from)
        .collect()
}

/// The areas of ztunnel, and who does that work here.
const AREAS: &[(&str, &[&str])] = &[
    (
        "ztunnel::proxy",
        &[
            "culvert::flow",
            "culvert::tunnel",
            "culvert::relay",
            "culvert::listen",
            "culvert::route",
        ],
    ),
    ("ztunnel::xds", &["xds_client"]),
    ("ztunnel::state", &["culvert::mesh"]),
    ("ztunnel::rbac", &["culvert::policy"]),
    ("ztunnel::dns", &["culvert::dns"]),
    ("ztunnel::inpod", &["culvert::pods"]),
    ("ztunnel::identity", &["cert_agent"]),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn levels(filter: &str, expected: &[(&str, LevelFilter)]) {
        let parsed: Filter = filter.parse().unwrap();
        for (target, level) in expected {
            assert_eq!(parsed.level_of(target), *level, "{target} under {filter}");
        }
    }

    #[test]
    fn longest_target_wins_and_areas_have_counterparts() {
        use LevelFilter as L;
        levels("info", &[("h2", L::INFO), ("access", L::INFO)]);
        levels(
            "access=debug",
            &[("access", L::DEBUG), ("accessory", L::OFF)],
        );
        levels(
            "warn,access=debug,dns=trace,state=info",
            &[
                ("access", L::DEBUG),
                ("dns", L::TRACE),
                ("ztunnel::state", L::INFO),
                ("culvert::dns", L::WARN),
                ("rustls", L::WARN),
            ],
        );
        levels(
            "info,ztunnel=error,ztunnel::proxy=debug,ztunnel::xds=trace",
            &[
                ("culvert::flow::outbound", L::DEBUG),
                ("culvert::tunnel", L::DEBUG),
                ("culvert::mesh", L::ERROR),
                ("xds_client::session", L::TRACE),
                ("cert_agent", L::ERROR),
                ("ztunnel::state", L::ERROR),
                ("h2", L::INFO),
            ],
        );
        levels(
            "off,ztunnel::state=info,ztunnel::rbac=debug",
            &[("culvert::policy", L::DEBUG)],
        );
        levels(
            "ztunnel::inpod::admin=debug",
            &[("culvert::pods", L::DEBUG)],
        );
        levels(
            "debug,culvert::tunnel=off",
            &[("culvert::tunnel::pool", L::OFF), ("x", L::DEBUG)],
        );
    }

    #[test]
    fn prints_most_specific_first_and_later_clauses_replace() {
        for (written, printed) in [
            ("info", "hickory_server::server=off,info"),
            (
                "access=debug,info",
                "hickory_server::server=off,access=debug,info",
            ),
            (
                "info,debug,access=off,access=trace",
                "hickory_server::server=off,access=trace,debug",
            ),
            (
                "access:debug,WARNING",
                "hickory_server::server=off,access=debug,warn",
            ),
            (
                "ztunnel::proxy:critical",
                "hickory_server::server=off,ztunnel::proxy=error",
            ),
            ("", "hickory_server::server=off"),
        ] {
            assert_eq!(Filter::initial(written).unwrap().to_string(), printed);
        }
    }

    #[test]
    fn malformed_clauses_are_named() {
        for bad in [
            "nonsense",
            "access",
            "access=loud",
            "=info",
            "a::b",
            "a::info",
            ":info",
            "a[b]=info",
        ] {
            let error = format!("info,{bad}").parse::<Filter>().unwrap_err();
            assert_eq!(error.clause, bad);
        }
    }
}
