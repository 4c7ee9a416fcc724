//! What an examination has found, as values, and how it is told.

use std::fmt::Write as _;

use serde::Serialize;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// The name of the check, as the README lists it.
    pub check: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is so.
    pub what: String,
    /// What to do about it; empty if nothing is to be done.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub way_out: String,
}

/// How bad a finding is. Later ones are worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Not looked at, and why.
    Skipped,
    /// Works, or worked so far, with something lost or about to be.
    Warning,
    /// Traffic is lost, or will be.
    Error,
}

/// All findings, in the order of the checks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The worst of them.
    pub severity: Severity,
    /// What was found, by check.
    pub findings: Vec<Finding>,
}

impl Finding {
    /// `check` was as it should be.
    pub(super) fn ok(what: impl Into<String>) -> Self {
        Self::new(Severity::Ok, what, "")
    }

    pub(super) fn skipped(what: impl Into<String>) -> Self {
        Self::new(Severity::Skipped, what, "")
    }

    pub(super) fn warning(what: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self::new(Severity::Warning, what, way_out)
    }

    pub(super) fn error(what: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self::new(Severity::Error, what, way_out)
    }

    fn new(severity: Severity, what: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self {
            // Whoever runs the checks knows their names.
            check: "",
            severity,
            what: what.into(),
            way_out: way_out.into(),
        }
    }

    pub(super) fn of(self, check: &'static str) -> Self {
        Self { check, ..self }
    }
}

impl Report {
    pub(super) fn new(findings: Vec<Finding>) -> Self {
        let worst = findings.iter().map(|finding| finding.severity).max();
        Self {
            severity: worst.unwrap_or(Severity::Ok),
            findings,
        }
    }

    /// 0 if all is well, 2 if there are warnings, 3 if there are errors. A command that could not be carried out at all ends
    /// with 1, as every other one.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self.severity {
            Severity::Ok | Severity::Skipped => 0,
            Severity::Warning => 2,
            Severity::Error => 3,
        }
    }

    /// Lines for people.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            let sign = match finding.severity {
                Severity::Ok => "ok  ",
                Severity::Skipped => "-   ",
                Severity::Warning => "warn",
                Severity::Error => "FAIL",
            };
            // Writing to a string does not fail.
            let _ = writeln!(text, "{sign}  {:<14}{}", finding.check, finding.what);
            if !finding.way_out.is_empty() {
                let _ = writeln!(text, "{:20}-> {}", "", finding.way_out);
            }
        }
        let count = |severity| {
            let of_it = self.findings.iter().filter(|one| one.severity == severity);
            of_it.count()
        };
        let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
        let _ = writeln!(text, "{errors} errors, {warnings} warnings");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides() {
        for (severities, code) in [
            (vec![], 0),
            (vec![Severity::Ok, Severity::Skipped], 0),
            (vec![Severity::Warning, Severity::Ok], 2),
            (vec![Severity::Ok, Severity::Error, Severity::Warning], 3),
        ] {
            let findings = severities.iter();
            let findings = findings.map(|one| Finding::new(*one, "x", ""));
            assert_eq!(Report::new(findings.collect()).exit_code(), code);
        }
    }

    #[test]
    fn tells_what_is_so_and_the_way_out() {
        let report = Report::new(vec![
            Finding::ok("fine").of("kernel"),
            Finding::error("gone", "bring it back").of("agent"),
        ]);
        let text = report.text();
        assert!(text.contains("ok    kernel        fine\n"), "{text}");
        assert!(text.contains("FAIL  agent         gone\n"), "{text}");
        assert!(
            text.contains("-> bring it back\n1 errors, 0 warnings"),
            "{text}"
        );
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["severity"], "error");
        assert_eq!(json["findings"][0].get("way_out"), None);
        assert_eq!(json["findings"][1]["check"], "agent");
    }
}
