//! `baggage`: a workload in one header value.

use std::fmt::{self, Write};

use http::{HeaderMap, HeaderValue};

use super::{BAGGAGE, header_value};

/// The kind of a workload, which is part of the name's key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WorkloadKind {
    /// `k8s.deployment.name`
    #[default]
    Deployment,
    /// `k8s.cronjob.name`
    CronJob,
    /// `k8s.pod.name`
    Pod,
    /// `k8s.job.name`
    Job,
}

impl WorkloadKind {
    const fn key(self) -> &'static str {
        match self {
            Self::Deployment => "k8s.deployment.name",
            Self::CronJob => "k8s.cronjob.name",
            Self::Pod => "k8s.pod.name",
            Self::Job => "k8s.job.name",
        }
    }

    fn of_key(key: &str) -> Option<Self> {
        [Self::Deployment, Self::CronJob, Self::Pod, Self::Job]
            .into_iter()
            .find(|kind| kind.key() == key)
    }
}

/// What baggage says about a workload, borrowed from its record or from the headers that were read; an empty text is an absent
/// one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "a plain record, built by its readers' callers"
)]
pub struct Baggage<T> {
    /// Cluster id.
    pub cluster: T,
    /// Namespace.
    pub namespace: T,
    /// Kind of the workload.
    pub kind: WorkloadKind,
    /// Name of the workload.
    pub workload: T,
    /// Canonical service.
    pub service: T,
    /// Canonical revision.
    pub revision: T,
    /// Region of the locality.
    pub region: T,
    /// Zone of the locality.
    pub zone: T,
}

impl<T: AsRef<str>> Baggage<T> {
    fn fields(&self) -> [(&'static str, &str); 7] {
        [
            ("k8s.cluster.name", self.cluster.as_ref()),
            ("k8s.namespace.name", self.namespace.as_ref()),
            (self.kind.key(), self.workload.as_ref()),
            ("service.name", self.service.as_ref()),
            ("service.version", self.revision.as_ref()),
            ("cloud.region", self.region.as_ref()),
            ("cloud.availability_zone", self.zone.as_ref()),
        ]
    }

    /// The header value. A text that would change the structure (`,`, `=`, anything that is not
    /// visible ASCII) is left out, because readers decode nothing.
    #[must_use]
    pub fn to_value(&self) -> HeaderValue {
        header_value(self)
    }
}

impl<T: AsRef<str>> fmt::Display for Baggage<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (key, value) in self.fields() {
            if value.is_empty() || !value.bytes().all(is_plain) {
                continue;
            }
            if !first {
                f.write_char(',')?;
            }
            first = false;
            write!(f, "{key}={value}")?;
        }
        Ok(())
    }
}

impl<'a> Baggage<&'a str> {
    /// Reads all `baggage` lines. `None` without any, or if one is not visible ASCII.
    #[must_use]
    pub fn read(headers: &'a HeaderMap) -> Option<Self> {
        let mut lines = headers.get_all(BAGGAGE).iter().peekable();
        lines.peek()?;
        let mut found = Self::default();
        for line in lines {
            for pair in line.to_str().ok()?.split(',') {
                let mut parts = pair.split('=');
                let (Some(key), Some(value)) = (parts.next(), parts.next()) else {
                    continue;
                };
                found.set(key, value);
            }
        }
        Some(found)
    }

    fn set(&mut self, key: &str, value: &'a str) {
        let field = match key {
            "k8s.cluster.name" => &mut self.cluster,
            "k8s.namespace.name" => &mut self.namespace,
            "service.name" => &mut self.service,
            "service.version" => &mut self.revision,
            "cloud.region" => &mut self.region,
            "cloud.availability_zone" => &mut self.zone,
            name => {
                let Some(kind) = WorkloadKind::of_key(name) else {
                    return;
                };
                self.kind = kind;
                &mut self.workload
            }
        };
        *field = value;
    }
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && byte != b',' && byte != b'='
}
