//! What a client of the admin server may ask, for the fuzzer, and for the test that replays its seeds.

use super::{profile, query::Query};
use crate::telemetry::logging::Filter;

/// The query of a request, read by each endpoint that takes one.
///
/// # Panics
/// When levels that were taken cannot be written and read again.
pub fn query(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let query = Query::new(text);
    let _ = query.number::<usize>("limit");
    drop(profile::cpu(query));
    let levels = query.value("level").unwrap_or_default();
    if let Ok(filter) = Filter::initial(&levels) {
        let again = filter.to_string().parse::<Filter>();
        assert_eq!(again.as_ref(), Ok(&filter), "of {levels:?}");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_are_harmless() {
        testkit::seeds::replay("proxy/fuzz/seeds/admin", super::query);
    }
}
