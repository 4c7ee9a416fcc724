//! `/config_dump`: what istioctl, Kiali and people read.
//!
//! The form is fixed by its readers, which decode it into types of their own and drop all of it where one value has
//! another type. So it is built from types of this room and of nobody else. It is written while it is sent: of the mesh,
//! no more than the list of its records is held, and its lock for moments only.

mod certificate;
mod control_plane;
pub(super) mod pods;
mod policy;
mod service;
mod settings;
mod workload;

use std::{
    io::{self, BufWriter, Write},
    sync::Arc,
};

use serde::{
    Serialize, Serializer,
    ser::{SerializeMap, SerializeStruct as _},
};

use self::{
    certificate::Certificate,
    control_plane::ControlPlane,
    pods::PodStates,
    policy::PolicyRecord,
    service::{ServiceRecord, Staged},
    workload::WorkloadRecord,
};
use super::Console;
use crate::mesh::{Policy, Service, Source, Workload};
pub use settings::Settings;

/// Writes all of it, keys in alphabetical order.
pub(super) fn write(console: &Console, out: impl Write) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(super::stream::CHUNK_BYTES, out);
    let mesh = &console.shared.mesh;
    let told = Told {
        workloads: mesh.workloads(),
        services: mesh.services(),
        policies: mesh.policies(),
    };
    let all = Select {
        told: &told,
        console,
        only: None,
    };
    let mut serializer = serde_json::Serializer::pretty(&mut out);
    let mut map = serializer.serialize_map(None)?;
    let certificates = console.shared.agent.snapshot();
    let certificates: Vec<_> = certificates.iter().map(Certificate::of).collect();
    map.serialize_entry("certificates", &certificates)?;
    map.serialize_entry("config", &console.settings)?;
    map.serialize_entry(
        "controlPlane",
        &ControlPlane::of(&console.control_plane, &console.shared.mesh),
    )?;
    map.serialize_entry("policies", &all.policies())?;
    map.serialize_entry("services", &all.services())?;
    map.serialize_entry("stagedServices", &Staged::of(mesh))?;
    let of_file = Select {
        only: Some(Source::File),
        ..all
    };
    map.serialize_entry("staticConfig", &of_file)?;
    map.serialize_entry("version", &console.build)?;
    if let Some(pods) = PodStates::of(console) {
        map.serialize_entry("workloadState", &pods)?;
    }
    map.serialize_entry("workloads", &all.workloads())?;
    SerializeMap::end(map)?;
    out.write_all(b"\n")?;
    out.flush()
}

/// All records, sorted, with who told of them.
struct Told {
    workloads: Vec<(Arc<Workload>, Source)>,
    services: Vec<(Arc<Service>, Source)>,
    policies: Vec<(Arc<Policy>, Source)>,
}

/// The records of one source, or of all.
#[derive(Clone, Copy)]
struct Select<'a> {
    told: &'a Told,
    console: &'a Console,
    only: Option<Source>,
}

impl<'a> Select<'a> {
    fn wants(self, source: Source) -> bool {
        self.only.is_none_or(|only| only == source)
    }

    fn workloads(self) -> impl Serialize + 'a {
        Each(move || {
            let wanted = self
                .told
                .workloads
                .iter()
                .filter(move |(_, source)| self.wants(*source));
            wanted.map(|(workload, _)| WorkloadRecord::of(workload))
        })
    }

    fn services(self) -> impl Serialize + 'a {
        Each(move || {
            let wanted = self
                .told
                .services
                .iter()
                .filter(move |(_, source)| self.wants(*source));
            wanted.map(move |(service, _)| ServiceRecord::of(service, &self.console.shared.mesh))
        })
    }

    fn policies(self) -> impl Serialize + 'a {
        Each(move || {
            let wanted = self
                .told
                .policies
                .iter()
                .filter(move |(_, source)| self.wants(*source));
            wanted.map(|(policy, _)| PolicyRecord::of(policy))
        })
    }
}

impl Serialize for Select<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("StaticConfig", 3)?;
        fields.serialize_field("policies", &self.policies())?;
        fields.serialize_field("services", &self.services())?;
        fields.serialize_field("workloads", &self.workloads())?;
        fields.end()
    }
}

/// A sequence whose items are made one at a time, while it is written.
pub(super) struct Each<F>(pub(super) F);

impl<F, I> Serialize for Each<F>
where
    F: Fn() -> I,
    I: Iterator<Item: Serialize>,
{
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
}

/// For `skip_serializing_if`.
fn is_empty(text: &str) -> bool {
    text.is_empty()
}
