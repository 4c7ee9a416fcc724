//! What the stand-in serves: named, versioned resources, and the log of their changes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use bytes::Bytes;
use prost::Message as _;
use xds_client::{
    local::Document,
    proto::{
        discovery::{Resource, resource::Payload},
        workload::{Address, Service, Workload, address},
    },
};

use crate::traffic::checksum;

/// A type of resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "the two types that a node proxy follows"
)]
pub enum Kind {
    /// Workloads and services.
    Address,
    /// Policies.
    Authorization,
}

impl Kind {
    /// Both, in the order of first requests and of pushes.
    pub const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// Its type URL.
    #[must_use]
    pub fn url(self) -> &'static str {
        match self {
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
        }
    }

    /// The kind of a type URL.
    #[must_use]
    pub fn of(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.url() == url)
    }
}

/// One resource, encoded once.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    content: Content,
    version: String,
    value: Bytes,
    /// All of it as it goes over the wire, without aliases: a large answer shall cost little when its time comes.
    wire: Bytes,
}

/// What a resource is to the stand-in.
#[derive(Debug, Clone, PartialEq)]
enum Content {
    Workload(Box<Workload>),
    Service(Box<Service>),
    Policy,
    /// Bytes that a test chose.
    Raw,
}

impl Entry {
    /// Policies have no version.
    fn new(kind: Kind, name: &str, content: Content, value: Bytes, salt: u64) -> Self {
        let mut entry = Self {
            content,
            version: String::new(),
            value,
            wire: Bytes::new(),
        };
        if kind == Kind::Address {
            entry.version = version(&entry.value, salt);
        }
        entry.wire = entry.encode(kind, name, Vec::new());
        entry
    }

    fn address(address: Address, salt: u64) -> Option<(String, Self)> {
        let value: Bytes = address.encode_to_vec().into();
        let (name, content) = match address.r#type? {
            address::Type::Workload(workload) => {
                (workload.uid.clone(), Content::Workload(Box::new(workload)))
            }
            address::Type::Service(service) => (
                format!("{}/{}", service.namespace, service.hostname),
                Content::Service(Box::new(service)),
            ),
        };
        let entry = Self::new(Kind::Address, &name, content, value, salt);
        Some((name, entry))
    }

    fn encode(&self, kind: Kind, name: &str, aliases: Vec<String>) -> Bytes {
        let resource = Resource {
            version: self.version.clone(),
            resource: Some(Payload {
                type_url: kind.url().to_owned(),
                value: self.value.clone(),
            }),
            name: name.to_owned(),
            aliases,
        };
        resource.encode_to_vec().into()
    }

    /// `network/ip` for each address, `network/ip/length` for each range.
    fn aliases(&self) -> Vec<String> {
        let text = |network: &str, bytes: &[u8]| Some(format!("{network}/{}", ip(bytes)?));
        match &self.content {
            Content::Workload(workload) => {
                let addresses = workload.addresses.iter();
                addresses
                    .filter_map(|bytes| text(&workload.network, bytes))
                    .collect()
            }
            Content::Service(service) => {
                let addresses = service.addresses.iter();
                let alias = addresses.filter_map(|vip| {
                    let host = text(&vip.network, &vip.address)?;
                    let full = u32::try_from(vip.address.len() * 8).ok()?;
                    Some(match vip.length.filter(|length| *length != full) {
                        Some(length) => format!("{host}/{length}"),
                        None => host,
                    })
                });
                alias.collect()
            }
            Content::Policy | Content::Raw => Vec::new(),
        }
    }

    fn is_service(&self) -> bool {
        matches!(self.content, Content::Service(_))
    }
}

/// Lower-case hexadecimal, as istiod's hashes of the content.
fn version(value: &[u8], salt: u64) -> String {
    format!("{:016x}", checksum(value) ^ salt)
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(bytes.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

/// All resources, and which of them changed when.
#[derive(Debug, Default)]
pub(super) struct Catalogue {
    shelves: [Shelf; 2],
    generation: u64,
    salt: u64,
}

#[derive(Debug, Default)]
struct Shelf {
    entries: BTreeMap<String, Entry>,
    changes: Vec<(u64, String)>,
    /// Alias → names.
    aliases: HashMap<String, BTreeSet<String>>,
    /// Service → workloads.
    links: HashMap<String, BTreeSet<String>>,
}

impl Catalogue {
    /// Grows with every change.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Adds and replaces; with `complete`, removes all else. What is equal keeps its bytes and its version.
    pub(super) fn apply(&mut self, document: Document, complete: bool) -> u64 {
        assert!(
            document.unusable().next().is_none(),
            "a mesh that cannot be served: {document:?}"
        );
        self.generation += 1;
        let salt = self.salt;
        let addresses = document.addresses.into_iter();
        let addresses = addresses.filter_map(|address| Entry::address(address, salt));
        let policies = document.policies.into_iter().map(|named| {
            let value = named.policy.encode_to_vec().into();
            let entry = Entry::new(
                Kind::Authorization,
                &named.name,
                Content::Policy,
                value,
                salt,
            );
            (named.name, entry)
        });
        self.shelf(Kind::Address, addresses.collect(), complete);
        self.shelf(Kind::Authorization, policies.collect(), complete);
        self.generation
    }

    /// Any bytes under any name.
    pub(super) fn put_raw(&mut self, kind: Kind, name: &str, value: Bytes) -> u64 {
        self.generation += 1;
        let entry = Entry::new(kind, name, Content::Raw, value, self.salt);
        self.shelf(kind, BTreeMap::from([(name.to_owned(), entry)]), false);
        self.generation
    }

    /// Takes resources away.
    pub(super) fn remove(&mut self, kind: Kind, names: &[&str]) -> u64 {
        self.generation += 1;
        let generation = self.generation;
        for name in names {
            self.shelves[kind as usize].replace(name, None, generation);
        }
        generation
    }

    /// Gives every address another version, as another replica of istiod may; pushes nothing.
    pub(super) fn reversion(&mut self) {
        self.salt = self.salt.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let entries = &mut self.shelves[Kind::Address as usize].entries;
        for (name, entry) in entries {
            entry.version = version(&entry.value, self.salt);
            entry.wire = entry.encode(Kind::Address, name, Vec::new());
        }
    }

    fn shelf(&mut self, kind: Kind, new: BTreeMap<String, Entry>, complete: bool) {
        let (shelf, generation) = (&mut self.shelves[kind as usize], self.generation);
        if complete {
            let gone = shelf.entries.keys().filter(|name| !new.contains_key(*name));
            for name in gone.cloned().collect::<Vec<_>>() {
                shelf.replace(&name, None, generation);
            }
        }
        for (name, entry) in new {
            shelf.replace(&name, Some(entry), generation);
        }
    }

    fn at(&self, kind: Kind) -> &Shelf {
        &self.shelves[kind as usize]
    }

    /// All names, workloads before services.
    pub(super) fn names(&self, kind: Kind) -> Vec<String> {
        self.in_order(kind, self.at(kind).entries.keys().cloned().collect())
    }

    /// Names that exist, workloads before services.
    pub(super) fn in_order(&self, kind: Kind, names: BTreeSet<String>) -> Vec<String> {
        let entries = &self.at(kind).entries;
        let known = names
            .into_iter()
            .filter(|name| entries.contains_key(name))
            .collect::<Vec<_>>();
        let (services, mut ordered): (Vec<_>, Vec<_>) = known
            .into_iter()
            .partition(|name| entries[name].is_service());
        ordered.extend(services);
        ordered
    }

    /// What changed after a generation, the workloads of changed services included.
    pub(super) fn changed(&self, kind: Kind, after: u64) -> BTreeSet<String> {
        let shelf = self.at(kind);
        let start = shelf
            .changes
            .partition_point(|(generation, _)| *generation <= after);
        let mut names: BTreeSet<String> = shelf.changes[start..]
            .iter()
            .map(|(_, name)| name.clone())
            .collect();
        let services = names.iter().filter(|name| shelf.is_service(name));
        let linked: Vec<String> = services.flat_map(|name| shelf.linked(name)).collect();
        names.extend(linked);
        names
    }

    /// The resources that a key of an on-demand client means: by name or alias, a service with its workloads.
    pub(super) fn find(&self, key: &str) -> BTreeSet<String> {
        let shelf = self.at(Kind::Address);
        let mut found = shelf.aliases.get(key).cloned().unwrap_or_default();
        if shelf.entries.contains_key(key) {
            found.insert(key.to_owned());
        }
        let services = found.iter().filter(|name| shelf.is_service(name));
        let linked: Vec<String> = services.flat_map(|name| shelf.linked(name)).collect();
        found.extend(linked);
        found
    }

    /// Names of the workloads of a node.
    pub(super) fn on_node(&self, node: &str) -> Vec<String> {
        let entries = self.at(Kind::Address).entries.iter();
        let local = entries.filter(|(_, entry)| match &entry.content {
            Content::Workload(workload) => workload.node == node,
            Content::Service(_) | Content::Policy | Content::Raw => false,
        });
        local.map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn contains(&self, kind: Kind, name: &str) -> bool {
        self.at(kind).entries.contains_key(name)
    }

    /// The version of a resource, empty for policies.
    pub(super) fn version(&self, kind: Kind, name: &str) -> Option<&str> {
        let entry = self.at(kind).entries.get(name)?;
        Some(&entry.version)
    }

    pub(super) fn aliases(&self, name: &str) -> Vec<String> {
        let entry = self.at(Kind::Address).entries.get(name);
        entry.map(Entry::aliases).unwrap_or_default()
    }

    /// The resource as it goes over the wire.
    pub(super) fn encoded(&self, kind: Kind, name: &str, with_aliases: bool) -> Option<Bytes> {
        let entry = self.at(kind).entries.get(name)?;
        Some(if with_aliases {
            entry.encode(kind, name, entry.aliases())
        } else {
            entry.wire.clone()
        })
    }
}

impl Shelf {
    fn is_service(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(Entry::is_service)
    }

    fn linked(&self, service: &str) -> impl Iterator<Item = String> {
        self.links.get(service).into_iter().flatten().cloned()
    }

    /// Notes a change only where there is one.
    fn replace(&mut self, name: &str, new: Option<Entry>, generation: u64) {
        let same = match (self.entries.get(name), &new) {
            // Maps are encoded in any order: the same workload may come as other bytes.
            (Some(old), Some(new)) => {
                old.content == new.content && (old.value == new.value || !is_bytes(&new.content))
            }
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if same {
            return;
        }
        if let Some(old) = self.entries.remove(name) {
            self.index(name, &old, |set, name| {
                set.remove(name);
            });
        }
        if let Some(new) = new {
            self.index(name, &new, |set, name| {
                set.insert(name.to_owned());
            });
            self.entries.insert(name.to_owned(), new);
        }
        self.changes.push((generation, name.to_owned()));
    }

    fn index(&mut self, name: &str, entry: &Entry, change: impl Fn(&mut BTreeSet<String>, &str)) {
        for alias in entry.aliases() {
            change(self.aliases.entry(alias).or_default(), name);
        }
        if let Content::Workload(workload) = &entry.content {
            for service in workload.services.keys() {
                change(self.links.entry(service.clone()).or_default(), name);
            }
        }
    }
}

/// Whether the bytes alone tell what a resource is.
fn is_bytes(content: &Content) -> bool {
    matches!(content, Content::Policy | Content::Raw)
}
