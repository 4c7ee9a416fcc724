//! TLS 1.3 record protection (RFC 8446 §5) over keys that rustls agreed on.
//!
//! rustls reads at most 4 KiB a call and copies each payload twice; sealing and opening here move
//! each byte once, from the caller's buffer to the wire buffer and back, with the cipher's pass
//! as the only copy. Handshake, alerts of the handshake and key schedule stay with rustls.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;

/// Largest plaintext of one record, bytes (RFC 8446 §5.1).
pub(super) const MAX_PLAINTEXT: usize = 16_384;
/// Bytes before the ciphertext: type, version, length.
pub(super) const HEADER: usize = 5;
/// Bytes that protection adds to a plaintext: header, inner content type, tag.
pub(super) const OVERHEAD: usize = HEADER + 1 + TAG;
/// Longest ciphertext a peer may send (RFC 8446 §5.2).
const MAX_CIPHERTEXT: usize = MAX_PLAINTEXT + 256;
const TAG: usize = 16;
/// Records sealed under one key before it is replaced; half of what AES-GCM allows (RFC 8446 §5.5).
const KEY_LIFE: u64 = 1 << 23;

/// What a record carries once it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Bytes of the application.
    Data,
    /// Post-handshake messages.
    Handshake,
    /// An alert.
    Alert,
}

impl Content {
    const fn byte(self) -> u8 {
        match self {
            Self::Alert => 21,
            Self::Handshake => 22,
            Self::Data => 23,
        }
    }
}

/// A record could not be sealed or opened. The connection is lost.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The cipher suite is not one of AES-GCM.
    #[error("cipher suite is not AES-GCM")]
    Suite,
    /// A key of the wrong length.
    #[error("traffic key has the wrong length")]
    Key,
    /// The peer sent a record that is too long, of an unknown type, or that does not authenticate.
    #[error("peer sent a bad TLS record: {0}")]
    Peer(&'static str),
    /// The wire buffer is too small for the record.
    #[error("no room for a TLS record")]
    Room,
    /// The sequence number space is used up.
    #[error("TLS sequence numbers are used up")]
    Exhausted,
}

/// One direction's key, nonce base and sequence number.
pub(super) struct Protection {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Protection {
    pub(super) fn new(
        sequence: u64,
        secrets: &ConnectionTrafficSecrets,
    ) -> Result<Self, RecordError> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { .. } | _ => {
                return Err(RecordError::Suite);
            }
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| RecordError::Key)?;
        let iv = iv.as_ref().try_into().map_err(|_| RecordError::Key)?;
        Ok(Self {
            key: LessSafeKey::new(key),
            iv,
            sequence,
        })
    }

    /// Whether the key has protected so many records that a fresh one is due.
    pub(super) fn is_worn(&self) -> bool {
        self.sequence >= KEY_LIFE
    }

    /// Per-record nonce (RFC 8446 §5.3): the sequence number, exclusive-ored into the base.
    fn nonce(&mut self) -> Result<Nonce, RecordError> {
        let mut nonce = self.iv;
        for (byte, counter) in nonce
            .iter_mut()
            .skip(NONCE_LEN - 8)
            .zip(self.sequence.to_be_bytes())
        {
            *byte ^= counter;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(RecordError::Exhausted)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Writes one record that protects `plaintext` (at most [`MAX_PLAINTEXT`] bytes) to the start of
    /// `out` and returns its length, [`OVERHEAD`] more than the plaintext's.
    pub(super) fn seal(
        &mut self,
        content: Content,
        plaintext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        let length = plaintext.len() + OVERHEAD;
        let (nonce, header) = (self.nonce()?, header(plaintext.len()));
        let record = out.get_mut(..length).ok_or(RecordError::Room)?;
        let (head, body) = record.split_at_mut(HEADER);
        head.copy_from_slice(&header);
        let (ciphertext, tail) = body.split_at_mut(plaintext.len());
        self.key
            .seal_out_of_place_scatter(
                nonce,
                Aad::from(header),
                plaintext,
                ciphertext,
                &[content.byte()],
                tail,
            )
            .map_err(|_| RecordError::Exhausted)?;
        Ok(length)
    }

    /// Protects the `len` bytes that lie in `out` behind room for a header, in place. Otherwise as [`Self::seal`].
    pub(super) fn seal_within(
        &mut self,
        content: Content,
        len: usize,
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        let (nonce, header) = (self.nonce()?, header(len));
        let record = out.get_mut(..len + OVERHEAD).ok_or(RecordError::Room)?;
        let (head, body) = record.split_at_mut(HEADER);
        head.copy_from_slice(&header);
        let (text, tail) = body.split_at_mut(len);
        self.key
            .seal_in_place_scatter(nonce, Aad::from(header), text, &[content.byte()], tail)
            .map_err(|_| RecordError::Exhausted)?;
        Ok(len + OVERHEAD)
    }

    /// As [`Self::seal`], for a text with a content type and padding of its own.
    #[cfg(any(test, fuzzing))]
    pub(super) fn seal_inner(
        &mut self,
        inner: &[u8],
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        let body_len = inner.len() + TAG;
        let (nonce, header) = (self.nonce()?, wire_header(body_len));
        let record = out.get_mut(..HEADER + body_len).ok_or(RecordError::Room)?;
        let (head, body) = record.split_at_mut(HEADER);
        head.copy_from_slice(&header);
        let (ciphertext, tag) = body.split_at_mut(inner.len());
        self.key
            .seal_out_of_place_scatter(nonce, Aad::from(header), inner, ciphertext, &[], tag)
            .map_err(|_| RecordError::Exhausted)?;
        Ok(HEADER + body_len)
    }

    /// Opens a record whose body (ciphertext with tag) is `body` into `out`, which must hold
    /// exactly `body.len() - 16` bytes. Returns what it carries and how many bytes of `out` that is.
    pub(super) fn open_into(
        &mut self,
        body: &[u8],
        out: &mut [u8],
    ) -> Result<(Content, usize), RecordError> {
        let (ciphertext, tag) = body
            .split_at_checked(out.len())
            .ok_or(RecordError::Peer("too short"))?;
        let aad = Aad::from(wire_header(body.len()));
        let nonce = self.nonce()?;
        self.key
            .open_separate_gather(nonce, aad, ciphertext, tag, out)
            .map_err(|_| RecordError::Peer("authentication failed"))?;
        strip(out)
    }

    /// Opens a record in place. Returns what it carries and how many bytes from the start of `body` that is.
    pub(super) fn open_within(&mut self, body: &mut [u8]) -> Result<(Content, usize), RecordError> {
        let aad = Aad::from(wire_header(body.len()));
        let nonce = self.nonce()?;
        let inner = self
            .key
            .open_in_place(nonce, aad, body)
            .map_err(|_| RecordError::Peer("authentication failed"))?;
        strip(inner)
    }
}

impl std::fmt::Debug for Protection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Protection")
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

/// Size of the plaintext buffer that the record at the start of `wire` opens into.
pub(super) const fn inner_len(body_len: usize) -> usize {
    body_len.saturating_sub(TAG)
}

/// Length of the body of the record at the start of `wire`; `None` if its header is not complete.
pub(super) fn body_len(wire: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some(&[kind, _, _, high, low]) = wire.first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    match kind {
        _ if kind != Content::Data.byte() => {
            Err(RecordError::Peer("unprotected after the handshake"))
        }
        _ if length > MAX_CIPHERTEXT => Err(RecordError::Peer("longer than 16640 bytes")),
        _ if length <= TAG => Err(RecordError::Peer("shorter than its tag")),
        _ => Ok(Some(length)),
    }
}

/// Removes padding and the inner content type (RFC 8446 §5.4).
fn strip(inner: &[u8]) -> Result<(Content, usize), RecordError> {
    let end = inner
        .iter()
        .rposition(|&byte| byte != 0)
        .ok_or(RecordError::Peer("no content type"))?;
    if end > MAX_PLAINTEXT {
        return Err(RecordError::Peer("plaintext longer than 16384 bytes"));
    }
    match inner.get(end) {
        Some(23) => Ok((Content::Data, end)),
        Some(22) => Ok((Content::Handshake, end)),
        Some(21) => Ok((Content::Alert, end)),
        _ => Err(RecordError::Peer("unknown content type")),
    }
}

fn header(plaintext_len: usize) -> [u8; HEADER] {
    wire_header(plaintext_len + 1 + TAG)
}

fn wire_header(body_len: usize) -> [u8; HEADER] {
    let [high, low] = u16::try_from(body_len).unwrap_or(u16::MAX).to_be_bytes();
    [23, 3, 3, high, low]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pair() -> (Protection, Protection) {
        let make = || {
            let key = UnboundKey::new(&AES_256_GCM, &[7; 32]).expect("key");
            Protection {
                key: LessSafeKey::new(key),
                iv: [9; NONCE_LEN],
                sequence: 41,
            }
        };
        (make(), make())
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_both_ways(data in proptest::collection::vec(any::<u8>(), 0..5000), repeat in 1_usize..4) {
            let (mut tx, mut rx) = pair();
            for turn in 0..repeat {
                let mut wire = vec![0; data.len() + OVERHEAD];
                tx.seal(Content::Data, &data, &mut wire).expect("seal");
                let length = body_len(&wire).expect("header").expect("complete");
                prop_assert_eq!(length + HEADER, wire.len());
                let body = &mut wire[HEADER..];
                let got = if turn % 2 == 0 {
                    let mut out = vec![0; inner_len(body.len())];
                    let (content, n) = rx.open_into(body, &mut out).expect("open");
                    prop_assert_eq!(content, Content::Data);
                    out[..n].to_vec()
                } else {
                    let (_, n) = rx.open_within(body).expect("open");
                    body[..n].to_vec()
                };
                prop_assert_eq!(&got, &data);
            }
        }

        #[test]
        fn a_changed_record_never_opens(data in proptest::collection::vec(any::<u8>(), 1..300), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let (mut tx, mut rx) = pair();
            let mut wire = vec![0; data.len() + OVERHEAD];
            tx.seal(Content::Data, &data, &mut wire).expect("seal");
            let body = &mut wire[HEADER..];
            let at = at.index(body.len());
            body[at] ^= 1 << bit;
            prop_assert!(rx.open_within(body).is_err());
        }

        #[test]
        fn garbage_never_panics(wire in proptest::collection::vec(any::<u8>(), 0..64)) {
            let (_, mut rx) = pair();
            if let Ok(Some(_)) = body_len(&wire) {
                let mut body = wire[HEADER..].to_vec();
                let mut out = vec![0; inner_len(body.len())];
                prop_assert!(rx.open_into(&body, &mut out).is_err());
                prop_assert!(rx.open_within(&mut body).is_err());
            }
        }
    }
}
