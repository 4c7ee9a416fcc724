//! The mesh from a YAML file instead of a control plane.
//!
//! [`parse`] turns a text into the same protobuf messages that istiod would send, so whoever judges
//! and stores resources has one way to do it. Two kinds of fault are kept apart: a text that is not YAML, or not of
//! the outer shape, is an error with its position; a record with an unknown key or a value that makes no sense is named
//! in the [`Document`], and the others are used. [`LocalFile`] follows a file as it changes.
//!
//! Two things that the control plane fills in are filled in here: a workload without `uid` gets one, and the `endpoints`
//! that a service lists become links of the workloads. The status of an endpoint is not used: that of its workload counts. Where a
//! service of a changed file cannot be used, and so stays as it was, the links that it had stay, too.

mod convert;
mod file;
mod links;
mod record;

pub use file::LocalFile;

use std::{fmt, path::PathBuf};

use serde::de::DeserializeOwned;
use serde_yaml_ng::Value;

use crate::{
    Rejected,
    proto::{security, workload},
};
use links::Links;
use record::Root;

/// Everything that one text describes, as the control plane would send it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Document {
    /// Workloads, then services.
    pub addresses: Vec<workload::Address>,
    /// Policies.
    pub policies: Vec<NamedPolicy>,
    /// Records that are not of the shape of their list: an unknown key, a missing one, a text where a number belongs. Whoever
    /// wrote them meant something else.
    pub misshapen: Vec<Rejected>,
    /// Records of the right shape with values that make no sense.
    pub rejected: Vec<Rejected>,
}

impl Document {
    /// The records that could not be used; the others are.
    pub fn unusable(&self) -> impl Iterator<Item = &Rejected> {
        self.misshapen.iter().chain(&self.rejected)
    }
}

/// A policy under its resource name.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedPolicy {
    /// `namespace/name`; workloads refer to the policy by it.
    pub name: String,
    /// The policy.
    pub policy: security::Authorization,
}

/// Why a text or file cannot be used at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocalError {
    /// Not YAML, or not of the outer shape; the source tells line and column.
    #[error("the mesh description is not valid")]
    Yaml(#[from] serde_yaml_ng::Error),
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file described a mesh, and now holds nothing: more likely it is being written than that the mesh is gone.
    #[error("{} has become empty (a mesh of nothing is written `workloads: []`)", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Reads a mesh description.
///
/// # Errors
/// If the text is not YAML, or anything but the lists `workloads`, `services` and `policies`.
pub fn parse(text: &str) -> Result<Document, LocalError> {
    let read = read(text, &Links::default())?;
    Ok(read.map(|(document, _)| document).unwrap_or_default())
}

/// Reads a description, and what its services list as endpoints; services that cannot be used keep what they had `before`. A text
/// without anything in it is `None`.
fn read(text: &str, before: &Links) -> Result<Option<(Document, Links)>, LocalError> {
    let Some(root) = serde_yaml_ng::from_str::<Option<Root>>(text)? else {
        return Ok(None);
    };
    let mut document = Document::default();
    let mut workloads = document.records("workloads", root.workloads, convert::workload);
    let mut of_services = Document::default();
    let services = of_services.records("services", root.services, convert::service);
    let (services, mut links) = links::told(services);
    let kept = before.kept(of_services.unusable(), &links);
    document.misshapen.append(&mut of_services.misshapen);
    document.rejected.append(&mut of_services.rejected);
    document.policies = document.records("policies", root.policies, convert::policy);
    // A workload may have gone meanwhile: that is no fault of what is told now.
    let _gone = kept.apply(&mut workloads);
    document.rejected.extend(links.apply(&mut workloads));
    links.extend(kept);
    let workloads = workloads.into_iter().map(Into::into);
    document.addresses = workloads
        .chain(services.into_iter().map(Into::into))
        .collect();
    Ok(Some((document, links)))
}

impl Document {
    /// Converts each record of a list for itself, and names those that cannot be.
    fn records<R: DeserializeOwned, T>(
        &mut self,
        list: &str,
        values: Vec<Value>,
        convert: impl Fn(R) -> Result<T, String>,
    ) -> Vec<T> {
        let mut records = Vec::with_capacity(values.len());
        for (index, value) in values.into_iter().enumerate() {
            let place = format!("{list}[{index}]");
            let name = record::name(list, &value).unwrap_or_else(|| place.clone());
            let refused = |error: &dyn fmt::Display| Rejected {
                name,
                reason: format!("{place}: {error}"),
            };
            match serde_yaml_ng::from_value(value) {
                Err(error) => self.misshapen.push(refused(&error)),
                Ok(record) => match convert(record) {
                    Err(error) => self.rejected.push(refused(&error)),
                    Ok(record) => records.push(record),
                },
            }
        }
        records
    }
}

#[cfg(test)]
mod tests;
