//! Where the fuzz target of DNS (`fuzz/`) enters. Unit tests replay its seeds.

use hickory_proto::op::ResponseCode;

use super::{
    local::Found,
    upstream::Plan,
    wire::{self, Request, Transport},
};

/// A pod's query and a server's answer to it: the length of the query in two bytes, the query, the answer.
pub fn both_directions(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return;
    };
    let (query, answer) = rest.split_at(usize::from(u16::from_be_bytes(*length)).min(rest.len()));
    assert_eq!(wire::id(query).is_some(), query.len() >= 2);
    let _ = wire::is_unhelpful(answer);
    let _ = Plan::of(answer);
    let Some(request) = Request::read(query) else {
        return;
    };
    let _ = request.ask();
    let end = request.question_end();
    if wire::answers(answer, query, end) {
        assert_eq!(wire::id(answer), wire::id(query));
    }
    let found = Found {
        alias: Some("web.shop.svc.cluster.local".to_owned()),
        addresses: (0..=255).map(|last| [10, 0, 0, last].into()).collect(),
        supported: true,
    };
    for transport in [Transport::Udp, Transport::Tcp] {
        if let Some(own) = request.answer(&found, transport) {
            assert!(own.len() <= request.room(transport), "{}", own.len());
            assert_eq!(wire::id(&own), wire::id(query));
        }
    }
    for short in [request.refusal(ResponseCode::FormErr), request.truncated()] {
        let length = short.map_or(0, |short| short.len());
        assert!(length <= request.room(Transport::Udp), "{length}");
    }
    if let Some(cut) = request.truncated() {
        assert!(cut.get(2).is_some_and(|flags| flags & 0x02 != 0), "TC");
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    #[test]
    fn seeds_are_survived() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/dns");
        let mut seen = 0;
        for seed in fs::read_dir(seeds).unwrap() {
            super::both_directions(&fs::read(seed.unwrap().path()).unwrap());
            seen += 1;
        }
        assert!(seen > 0);
    }
}
