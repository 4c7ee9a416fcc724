//! An explanation as lines for a terminal.

use std::fmt;

use super::{Behind, Explanation, Route, Source, verdict::Verdict};

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "from       {}", self.from)?;
        if let Some(certificate) = &self.from.certificate {
            writeln!(f, "           certificate: {certificate}")?;
        }
        writeln!(f, "to         {} ({})", self.to, self.owner)?;
        for waypoint in &self.waypoints {
            writeln!(f, "waypoint   {waypoint}")?;
        }
        for service in &self.around {
            writeln!(f, "around     the waypoint of {service}: a pod is dialled")?;
        }
        for endpoint in &self.endpoints {
            let mark = if endpoint.eligible { '+' } else { '-' };
            writeln!(
                f,
                "endpoint {mark} {}{}: {}",
                endpoint.workload,
                On(&endpoint.network),
                endpoint.because
            )?;
        }
        writeln!(f, "route      {}", self.route)?;
        for identity in &self.route.expected {
            writeln!(f, "           the server must be {identity}")?;
        }
        for identity in &self.route.inner_expected {
            writeln!(f, "           the far end must be {identity}")?;
        }
        if let Some(verdict) = &self.policy {
            writeln!(f, "policy     {}", verdict.because)?;
            write!(f, "{verdict}")?;
        }
        for behind in &self.behind {
            let Behind {
                workload,
                at,
                policy,
            } = behind;
            writeln!(f, "behind     {at} ({workload}): {}", policy.because)?;
            write!(f, "{policy}")?;
        }
        match (self.outcome.allowed, self.outcome.reason) {
            (true, _) => writeln!(f, "outcome    allowed: {}", self.outcome.because),
            (false, Some(reason)) => {
                writeln!(f, "outcome    refused ({reason}): {}", self.outcome.because)
            }
            (false, None) => writeln!(f, "outcome    refused: {}", self.outcome.because),
        }
    }
}

/// The policies that were asked, a line each.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for judged in &self.policies {
            let mark = if judged.matches { '+' } else { '-' };
            let action = judged.action.unwrap_or("?");
            let dry_run = if judged.dry_run { ", dry run" } else { "" };
            writeln!(
                f,
                "         {mark} {} ({action}{dry_run}): {}",
                judged.key, judged.because
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)?;
        if let Some(identity) = &self.identity {
            write!(f, " as {identity}")?;
        }
        On(&self.network).fmt(f)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind)?;
        if let Some(dialled) = &self.dialled {
            write!(f, " to {dialled}")?;
        }
        if let Some(workload) = &self.workload {
            let via = self.via.unwrap_or("workload");
            write!(f, ", {via} {workload}{}", On(&self.network))?;
        }
        if let Some(authority) = &self.authority {
            write!(f, ", asking for {authority}")?;
        }
        Ok(())
    }
}

/// A network that has a name.
struct On<'a>(&'a str);

impl fmt::Display for On<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "" => Ok(()),
            network => write!(f, " on network {network}"),
        }
    }
}
