//! The mesh from a YAML file instead of a control plane.

use crate::proto::{security, workload};

/// Everything that one text describes, as the control plane would send it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Document {
    /// Workloads, then services.
    pub addresses: Vec<workload::Address>,
    /// Policies.
    pub policies: Vec<NamedPolicy>,
    /// Records that could not be used; the others are.
    pub rejected: Vec<Rejected>,
}

/// A policy under its resource name.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedPolicy {
    /// `namespace/name`; workloads refer to the policy by it.
    pub name: String,
    /// The policy.
    pub policy: security::Authorization,
}

/// A record that could not be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// The name the record would have had, as far as it is known.
    pub name: String,
    /// What is wrong, and where.
    pub reason: String,
}
