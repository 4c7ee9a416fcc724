//! The section [`Limits`].

use super::reader::Reader;
use crate::config::Limits;

pub(super) fn parse(reader: &mut Reader<'_>) -> Limits {
    let default = Limits::default();
    let reserve = reader.typed("DESCRIPTOR_RESERVE", |text| {
        super::value::integer(text, &(0..=u16::MAX))
    });
    let mut count = |key, default| reader.integer(key, &(1..=10_000_000), default);
    Limits {
        descriptor_reserve: reserve,
        flows_per_pod: count("MAX_FLOWS_PER_POD", default.flows_per_pod),
        handshakes_per_pod: count("MAX_HANDSHAKES_PER_POD", default.handshakes_per_pod),
        handshakes_per_peer: count("MAX_HANDSHAKES_PER_PEER", default.handshakes_per_peer),
    }
}
