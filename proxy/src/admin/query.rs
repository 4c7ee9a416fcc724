//! What a request to the admin server asks for.

use std::borrow::Cow;

/// The query of a request: `name=value` pairs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Query<'a>(&'a str);

impl<'a> Query<'a> {
    pub(super) const fn new(text: &'a str) -> Self {
        Self(text)
    }

    pub(super) fn has(self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// The first value of that name, decoded.
    pub(super) fn value(self, name: &str) -> Option<Cow<'a, str>> {
        let mut pairs = form_urlencoded::parse(self.0.as_bytes());
        pairs.find(|(key, _)| key == name).map(|(_, value)| value)
    }

    pub(super) fn number<N: std::str::FromStr>(self, name: &str) -> Option<N> {
        self.value(name)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read_with_their_escapes() {
        let query = Query("level=access%3Adebug%2Cinfo&reset&limit=10&bad=%zz");
        assert_eq!(query.value("level").unwrap(), "access:debug,info");
        assert!(query.has("reset") && !query.has("set"));
        assert_eq!(query.number("limit"), Some(10_usize));
        assert_eq!(query.number::<usize>("level"), None);
        assert_eq!(query.value("bad").unwrap(), "%zz");
        assert!(!Query("").has(""));
    }
}
