//! From an update to the steps that it takes: nothing for what is held already.

use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashSet};
use xds_client::{local::NamedPolicy, proto::workload::Address};

use super::{
    Rejection, State,
    convert::Converter,
    intern::Pool,
    state::{Change, Record},
};

/// Converts everything that can be converted, and lets go of each resource as soon as that is done: a
/// whole mesh is not held in both forms.
pub(super) fn convert(
    addresses: Vec<Address>,
    policies: Vec<NamedPolicy>,
    pool: &mut Pool,
) -> (Vec<Record>, Vec<Rejection>) {
    let mut converter = Converter { pool };
    let mut records = Vec::with_capacity(addresses.len() + policies.len());
    let mut rejected = Vec::new();
    let mut sort = |result| match result {
        Ok(record) => records.push(record),
        Err(rejection) => rejected.push(rejection),
    };
    for address in addresses {
        sort(converter.address(&address));
    }
    for policy in policies {
        sort(converter.named_policy(&policy));
    }
    (records, rejected)
}

/// The steps for new records: the last of each name, if it differs from what is held.
pub(super) fn additions(state: &State, records: &[Record]) -> Vec<Change> {
    let mut last: HashMap<_, _, RandomState> = HashMap::default();
    last.extend(records.iter().map(name).zip(0..));
    records
        .iter()
        .enumerate()
        .filter(|(index, record)| last.get(&name(record)) == Some(index))
        .filter(|(_, record)| !state.holds(record))
        .map(|(_, record)| Change::Put(record.clone()))
        .collect()
}

/// The steps for removals by name. They come after the additions, so they also remove what is being added.
pub(super) fn removals(state: &State, gone: &Gone, additions: &[Change]) -> Vec<Change> {
    if gone.addresses.is_empty() && gone.policies.is_empty() {
        return Vec::new();
    }
    let mut coming: HashMap<_, _, RandomState> = HashMap::default();
    for change in additions {
        if let Change::Put(record) = change {
            coming.insert(name(record), record);
        }
    }
    let find = |name: Name<'_>| {
        let coming = coming.get(&name).map(|record| (*record).clone());
        coming.or_else(|| state.find(name))
    };
    let addresses = gone.addresses.iter().filter_map(|gone| {
        let found = find(Name::Workload(gone)).or_else(|| find(Name::Service(gone)));
        if found.is_none() {
            tracing::debug!(name = %gone, "removal of an unknown resource");
        }
        found
    });
    let policies = gone.policies.iter();
    let policies = policies.filter_map(|gone| find(Name::Policy(gone)));
    addresses.chain(policies).map(Change::Drop).collect()
}

/// The steps that remove everything that a full set does not name, not even as something that cannot be used.
pub(super) fn absences(state: &State, records: &[Record], unusable: &[&str]) -> Vec<Change> {
    let named: HashSet<_, RandomState> = records.iter().map(name).collect();
    let unusable: HashSet<_, RandomState> = unusable.iter().copied().collect();
    state
        .records()
        .filter(|held| {
            let name = name(held);
            let (Name::Workload(text) | Name::Service(text) | Name::Policy(text)) = name;
            !named.contains(&name) && !unusable.contains(text)
        })
        .map(Change::Drop)
        .collect()
}

/// Names of resources that are gone.
#[derive(Debug)]
pub(super) struct Gone {
    pub(super) addresses: Vec<String>,
    pub(super) policies: Vec<String>,
}

/// What a resource is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Name<'a> {
    Workload(&'a str),
    Service(&'a str),
    Policy(&'a str),
}

fn name(record: &Record) -> Name<'_> {
    match record {
        Record::Workload(workload) => Name::Workload(workload.uid()),
        Record::Service(service) => Name::Service(&service.key),
        Record::Policy(policy) => Name::Policy(&policy.key),
    }
}
