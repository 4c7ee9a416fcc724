//! Where fuzz targets (`fuzz/`) enter: bytes of a control plane, and of who writes the file that stands for one. Unit tests
//! replay the targets' seeds.
#![allow(
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "not a part of the client: a panic is a failed test"
)]

use crate::{Extent, Kind, Mode, NodeFacts, Rejected, Session, Versions, client, local};

/// The body of a stream of responses, of which the first byte says how many bytes come at a time. Each response gets its answer.
pub fn stream(bytes: &[u8]) {
    let Some((&at_once, body)) = bytes.split_first() else {
        return;
    };
    let node = NodeFacts::default().to_node();
    let (mut session, _) = Session::open(&node, Mode::Everything, |_| Versions::with_room(0), &[]);
    let mut told = [false; Kind::ALL.len()];
    for response in client::responses(body, usize::from(at_once) + 1) {
        let (type_url, nonce) = (response.type_url.clone(), response.nonce.clone());
        let (batch, receipt) = session.receive(response);
        assert_eq!(batch.is_some(), Kind::of_type_url(&type_url).is_some());
        let mut rejected = Vec::new();
        if let Some(batch) = batch {
            let first = told.get_mut(batch.kind() as usize);
            let first = first.is_some_and(|told| !std::mem::replace(told, true));
            assert_eq!(batch.extent() == Extent::Everything, first);
            let broken = batch.resources().filter_map(Result::err);
            rejected.extend(broken.map(|error| Rejected {
                name: String::new(),
                reason: error.to_string(),
            }));
        }
        let answer = receipt.answer(&rejected);
        assert_eq!((answer.type_url, answer.response_nonce), (type_url, nonce));
        assert_eq!(answer.error_detail.is_some(), !rejected.is_empty());
    }
}

/// A description of a mesh.
pub fn description(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(document) = local::parse(text) {
        for policy in &document.policies {
            assert!(policy.name.contains('/'), "{}", policy.name);
        }
        let again = local::parse(text).map(|again| (again.addresses, again.policies));
        let same = again.is_ok_and(|again| again == (document.addresses, document.policies));
        assert!(same, "read differently");
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    #[test]
    fn seeds_are_survived() {
        for (name, target) in [
            ("stream", stream as fn(&[u8])),
            ("description", description),
        ] {
            let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
            let mut seen = 0;
            for seed in fs::read_dir(seeds.join(name)).unwrap() {
                target(&fs::read(seed.unwrap().path()).unwrap());
                seen += 1;
            }
            assert!(seen > 0, "{name} has no seeds");
        }
    }
}
