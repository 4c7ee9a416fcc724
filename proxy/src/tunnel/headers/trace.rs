//! `traceparent`: ids that tie the logs of two proxies together.

use std::fmt;

use http::{HeaderMap, HeaderValue};
use rand::Rng;

use super::{TRACEPARENT, header_value};

/// Trace and span id of one application connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TraceParent {
    /// 16 bytes, the same on every hop.
    pub trace_id: u128,
    /// 8 bytes, of the sender.
    pub span_id: u64,
    /// Whether the sender tells its span.
    pub sampled: bool,
}

impl TraceParent {
    /// These ids.
    #[must_use]
    pub const fn new(trace_id: u128, span_id: u64, sampled: bool) -> Self {
        Self {
            trace_id,
            span_id,
            sampled,
        }
    }

    /// Fresh random ids, of a span that is not told.
    pub fn random(rng: &mut impl Rng) -> Self {
        Self {
            trace_id: (u128::from(rng.next_u64()) << 64) | u128::from(rng.next_u64()),
            span_id: rng.next_u64(),
            sampled: false,
        }
    }

    /// Reads the header; anything but four hexadecimal fields of the right lengths is absent.
    #[must_use]
    pub fn read(headers: &HeaderMap) -> Option<Self> {
        Self::parse(headers.get(TRACEPARENT)?.to_str().ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split('-');
        let mut field = |length: usize| {
            let field = fields.next()?;
            let hex = field.len() == length && field.bytes().all(|b| b.is_ascii_hexdigit());
            hex.then_some(field)
        };
        let (_version, trace, span, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
        if fields.next().is_some() {
            return None;
        }
        Some(Self {
            trace_id: u128::from_str_radix(trace, 16).ok()?,
            span_id: u64::from_str_radix(span, 16).ok()?,
            sampled: u8::from_str_radix(flags, 16).ok()? & SAMPLED != 0,
        })
    }

    /// The header value.
    #[must_use]
    pub fn to_value(self) -> HeaderValue {
        header_value(&self)
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = if self.sampled { SAMPLED } else { 0 };
        write!(
            f,
            "00-{:032x}-{:016x}-{flags:02x}",
            self.trace_id, self.span_id
        )
    }
}

/// The one flag that there is.
const SAMPLED: u8 = 1;
