//! How settings look when the effective configuration is printed: short, and without secrets.

use std::{fmt::Display, time::Duration};

use serde::{Serialize as _, Serializer};

/// Stands wherever a secret would.
pub(super) const REDACTED: &str = "<redacted>";

/// `300s`, `250ms`.
pub(super) fn duration<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:?}"))
}

/// As [`duration`], or null.
pub(super) fn optional_duration<S: Serializer>(
    value: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    value
        .map(|value| format!("{value:?}"))
        .serialize(serializer)
}

/// The `Display` form.
pub(super) fn text<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// The length of a text that is too long to print.
pub(super) fn size<S: Serializer>(value: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("<inline, {} bytes>", value.len()))
}
