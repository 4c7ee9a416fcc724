//! Times as people and tools read them.

use std::time::SystemTime;

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// UTC, whole seconds: `2026-08-20T10:15:30Z`.
pub(super) fn rfc3339(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at);
    let whole = at.replace_nanosecond(0).unwrap_or(at);
    // Only years of more than four digits have no such form.
    whole.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn seconds_are_whole() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_787_220_930_999);
        assert_eq!(rfc3339(at), "2026-08-20T10:15:30Z");
    }
}
