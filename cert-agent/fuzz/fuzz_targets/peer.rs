//! Bytes of a peer or of a file: names in certificates, identities as text, revocation lists.
#![no_main]

use cert_agent::{Revocations, SpiffeId, peer_id};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(id) = peer_id(&[bytes.into()]) {
        assert_eq!(id.as_str().parse::<SpiffeId>().as_ref(), Ok(&id));
    }
    if let Some(id) = std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| text.parse::<SpiffeId>().ok())
    {
        assert!(!id.trust_domain().is_empty() && !id.namespace().is_empty());
    }
    let _ = Revocations::armed().update("fuzz", bytes);
});
