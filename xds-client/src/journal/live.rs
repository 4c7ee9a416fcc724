//! What of a journal still counts, found without holding it: an entry per name.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    io,
};

use bytes::Bytes;
use prost::Message;

use super::format::{Begin, Item, Unusable, Visitor, Writer};
use crate::{Extent, Kind, proto::discovery::Resource, resource::name_of};

/// Finds out which resources still count: what a whole journal amounts to, by the rules by which batches apply.
#[derive(Debug, Default)]
pub(super) struct Live {
    hashers: [RandomState; 2],
    held: HashMap<Name, Place>,
    /// The kind of the transaction that is being read, and its number.
    now: Option<(Kind, u32)>,
    /// Kinds of which everything was told once.
    based: [bool; 2],
}

/// A kind, and a name's hash under two secret keys: two names never meet.
type Name = (Kind, u64, u64);

#[derive(Debug, Clone, Copy)]
struct Place {
    at: u64,
    /// Bytes of the item.
    size: u64,
    /// The last transaction that named it.
    named: u32,
}

impl Live {
    /// Whether everything was told once of this kind.
    pub(super) fn is_based(&self, kind: Kind) -> bool {
        self.based.get(kind as usize).copied().unwrap_or_default()
    }

    /// The places of what counts of a kind, in their order, and the bytes that it takes.
    pub(super) fn places(&self, kind: Kind) -> (Vec<u64>, u64) {
        let held = self.held.iter().filter(|((of, ..), _)| *of == kind);
        let mut size = 0;
        let mut places: Vec<_> = held
            .map(|(_, place)| {
                size += place.size;
                place.at
            })
            .collect();
        places.sort_unstable();
        (places, size)
    }

    /// What is held under a name stays, and counts as named.
    fn refuse(&mut self, kind: Kind, name: &str, named: u32) {
        let name = self.name(kind, name);
        if let Some(place) = self.held.get_mut(&name) {
            place.named = named;
        }
    }

    fn name(&self, kind: Kind, name: &str) -> Name {
        let [one, two] = &self.hashers;
        (kind, one.hash_one(name), two.hash_one(name))
    }
}

impl Visitor for Live {
    fn begin(&mut self, begin: &Begin) {
        let number = self.now.map_or(0, |(_, number)| number + 1);
        self.now = Some((begin.kind, number));
    }

    fn item(&mut self, at: u64, item: Item<'_>) -> Result<(), Unusable> {
        let Some((kind, named)) = self.now else {
            return Err(Unusable::Damaged(at));
        };
        match item {
            Item::Resource(encoded) => {
                if let Ok(resource) = Resource::decode(encoded) {
                    let size = item.size();
                    let place = Place { at, size, named };
                    self.held.insert(self.name(kind, &resource.name), place);
                } else {
                    // Nobody puts in force what cannot be read.
                    let name = name_of(encoded).ok_or(Unusable::Damaged(at))?;
                    self.refuse(kind, &name, named);
                }
            }
            Item::Refused(name) => self.refuse(kind, name, named),
            Item::Removed(name) => {
                let name = self.name(kind, name);
                self.held.remove(&name);
            }
        }
        Ok(())
    }

    fn commit(&mut self, begin: &Begin) -> Result<(), Unusable> {
        if let (Extent::Everything, Some((kind, number))) = (begin.extent, self.now) {
            self.held
                .retain(|(of, ..), place| *of != kind || place.named == number);
            if let Some(based) = self.based.get_mut(kind as usize) {
                *based = true;
            }
        }
        Ok(())
    }
}

/// Copies the resources at certain places.
pub(super) struct Copy<'a, W> {
    pub(super) to: &'a mut Writer<W>,
    pub(super) places: std::iter::Peekable<std::vec::IntoIter<u64>>,
}

impl<W: io::Write> Visitor for Copy<'_, W> {
    fn begin(&mut self, _: &Begin) {}

    fn item(&mut self, at: u64, item: Item<'_>) -> Result<(), Unusable> {
        if self.places.next_if_eq(&at).is_some() {
            self.to.item(item)?;
        }
        Ok(())
    }

    fn commit(&mut self, _: &Begin) -> Result<(), Unusable> {
        Ok(())
    }
}

/// A resource without content, which is refused by everybody: what is held under its name stays.
pub(super) fn only_named(name: &str) -> Bytes {
    let name = name.to_owned();
    let resource = Resource {
        name,
        ..Resource::default()
    };
    resource.encode_to_vec().into()
}
