//! Names: real clients inside pods, a real server for the proxy to ask, and one that does as it is told.

mod client;
mod dnsmasq;
mod scripted;

use std::path::Path;

pub use client::{Dug, Library, receive, send};
pub use dnsmasq::Dnsmasq;
use hickory_proto::{
    op::{Message, Query},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
pub use scripted::{Asked, Scripted};

/// A query as a stub resolver sends it.
///
/// # Panics
/// When `name` is none.
#[must_use]
pub fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    let name = Name::from_ascii(name).expect("a name");
    message.add_query(Query::query(name, kind));
    message
}

/// A query for the IPv4 addresses of a name.
///
/// # Panics
/// As [`query`].
#[must_use]
pub fn address_query(name: &str) -> Message {
    query(name, RecordType::A)
}

/// The answer to `query` that `edit` makes of an empty one.
///
/// # Panics
/// When `query` is none, or the answer too long.
#[must_use]
pub fn answer(query: &[u8], edit: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = read(query).into_response();
    edit(&mut message);
    message.to_vec().expect("a message")
}

/// The answer to `query` with `count` addresses from 192.0.2.0 on.
///
/// # Panics
/// As [`answer`].
#[must_use]
pub fn addresses(query: &[u8], count: u8) -> Vec<u8> {
    answer(query, |message| {
        let owner = message.queries[0].name().clone();
        for last in 0..count {
            let data = RData::A(A::new(192, 0, 2, last));
            message.add_answer(Record::from_rdata(owner.clone(), 60, data));
        }
    })
}

/// The message of these bytes.
///
/// # Panics
/// When it is none.
#[must_use]
pub fn read(bytes: &[u8]) -> Message {
    Message::from_vec(bytes).expect("a message of DNS")
}

/// The beginning of a command line that shows the program behind it `file` as its `/etc/resolv.conf`, and nobody else.
///
/// Who writes `file` anew writes it in place: a file put in its place would not be seen.
#[must_use]
pub fn with_resolv_conf(file: &Path) -> Vec<String> {
    const MOUNT: &str = r#"mount --bind "$0" /etc/resolv.conf && exec "$@""#;
    let file = file.display().to_string();
    ["unshare", "--mount", "--", "sh", "-c", MOUNT, &file]
        .map(str::to_owned)
        .into()
}
