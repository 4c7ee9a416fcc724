//! Where a record came from, so that one source never removes what another told, and versions that a stream begins with.

use std::borrow::Cow;

/// Where a record came from. Sixteen bytes, as every record has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// A local file.
    File,
    /// The control plane, in a version of sixteen hexadecimal digits, which is what istiod makes.
    Hashed(u64),
    /// The control plane, in a version of another form.
    #[expect(clippy::box_collection, reason = "keeps the type at sixteen bytes")]
    Versioned(Box<String>),
}

/// Who told of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// A local file.
    File,
    /// The control plane.
    ControlPlane,
}

impl Origin {
    pub(super) fn of_version(version: &str) -> Self {
        let digits = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if version.len() == DIGITS
            && version.bytes().all(digits)
            && let Ok(number) = u64::from_str_radix(version, 16)
        {
            return Self::Hashed(number);
        }
        Self::Versioned(Box::new(version.into()))
    }

    /// The version, exactly as it was given. `None` for what has none.
    pub(super) fn version(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::File => None,
            Self::Hashed(number) => Some(format!("{number:0DIGITS$x}").into()),
            Self::Versioned(text) => Some(text.as_str().into()),
        }
    }

    pub(super) fn source(&self) -> Source {
        match self {
            Self::File => Source::File,
            Self::Hashed(_) | Self::Versioned(_) => Source::ControlPlane,
        }
    }
}

const DIGITS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_told_as_it_was_given() {
        for version in [
            "",
            "9f3b2c1d0a4e5f67",
            "000000000000000a",
            "9F3B2C1D0A4E5F67",
            "+123456789012345",
            "v1",
        ] {
            assert_eq!(Origin::of_version(version).version().unwrap(), version);
        }
        assert_eq!(size_of::<Origin>(), 16);
    }
}
