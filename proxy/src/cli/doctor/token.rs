//! What a service-account token says of itself. It is not verified here: that is for whoever is shown it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;

use super::finding::Finding;

/// The claims that matter, of the payload of a JWT (RFC 7519).
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Claims {
    #[serde(default)]
    aud: Audience,
    exp: Option<u64>,
    iat: Option<u64>,
}

/// One audience or several.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

impl Default for Audience {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl Audience {
    fn names(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Several(all) => all,
        }
    }
}

impl Claims {
    fn of(token: &str) -> Option<Self> {
        let payload = token.trim().split('.').nth(1)?;
        let payload = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
        serde_json::from_slice(&payload).ok()
    }
}

/// Judges a token that is to be shown to `reader`, as of `now`. No finding quotes it.
pub(super) fn judge(token: &str, now: SystemTime, reader: &Reader) -> Vec<Finding> {
    if token.trim().is_empty() {
        return vec![Finding::error(
            format!("the token {} is empty", reader.origin),
            "mount a projected service-account token there",
        )];
    }
    let Some(claims) = Claims::of(token) else {
        return vec![Finding::warning(
            format!(
                "the token {} is no JWT, so nothing can be told of it",
                reader.origin
            ),
            "a projected service-account token is one",
        )];
    };
    let mut findings = Vec::new();
    findings.extend(expiry(&claims, now, reader));
    findings.extend(issue(&claims, now, reader));
    findings.extend(audience(&claims, reader));
    findings
}

/// Where the token was found, and who is to accept it.
#[derive(Debug)]
pub(super) struct Reader {
    /// For the text of findings, such as `in /path`.
    pub(super) origin: String,
    /// The audience that it must name; `None` if that is for the reader to say.
    pub(super) audience: Option<&'static str>,
}

fn expiry(claims: &Claims, now: SystemTime, Reader { origin, .. }: &Reader) -> Option<Finding> {
    let expiry = UNIX_EPOCH.checked_add(Duration::from_secs(claims.exp?))?;
    Some(match expiry.duration_since(now) {
        Ok(left) => Finding::ok(format!("the token {origin} is good for {}", rounded(left))),
        Err(past) => Finding::error(
            format!("the token {origin} ended {} ago", rounded(past.duration())),
            "the kubelet renews projected tokens: see whether it runs, and whether the file is a projected volume rather than a copy",
        ),
    })
}

/// A token that is of the future tells that clocks differ.
fn issue(claims: &Claims, now: SystemTime, Reader { origin, .. }: &Reader) -> Option<Finding> {
    let issued = UNIX_EPOCH.checked_add(Duration::from_secs(claims.iat?))?;
    let ahead = issued.duration_since(now).ok()?;
    (ahead > TOLERATED).then(|| {
        Finding::error(
            format!(
                "the token {origin} was issued {} in the future",
                rounded(ahead)
            ),
            "the clock of this node is behind that of the API server: set it by NTP",
        )
    })
}

fn audience(claims: &Claims, reader: &Reader) -> Option<Finding> {
    let wanted = reader.audience?;
    let given = claims.aud.names();
    (!given.iter().any(|one| one == wanted)).then(|| {
        Finding::warning(
            format!(
                "the token {} is for {given:?}, not for {wanted:?}",
                reader.origin
            ),
            "set the audience of the projected token, or TOKEN_AUDIENCES of istiod",
        )
    })
}

/// Whole units, the largest that fits.
pub(super) fn rounded(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Clocks of a cluster may differ by as much.
const TOLERATED: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Severity;

    fn token(claims: &str) -> String {
        format!("e30.{}.c2lnbmF0dXJl", URL_SAFE_NO_PAD.encode(claims))
    }

    fn judged(token: &str) -> Vec<(Severity, String)> {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let reader = Reader {
            origin: "in /token".to_owned(),
            audience: Some("istio-ca"),
        };
        let findings = judge(token, now, &reader).into_iter();
        findings.map(|one| (one.severity, one.what)).collect()
    }

    #[test]
    fn a_token_is_judged_by_its_claims() {
        for (claims, expected) in [
            (
                r#"{"aud":["istio-ca"],"exp":1003600,"iat":999000}"#,
                vec![(Severity::Ok, "good for 60 min")],
            ),
            (
                r#"{"aud":"istio-ca","exp":999000}"#,
                vec![(Severity::Error, "ended 16 min ago")],
            ),
            (
                r#"{"aud":["vault"],"exp":1003600}"#,
                vec![
                    (Severity::Ok, "good"),
                    (Severity::Warning, r#"for ["vault"], not for "istio-ca""#),
                ],
            ),
            (
                r#"{"aud":["istio-ca"],"exp":1003600,"iat":1000090}"#,
                vec![
                    (Severity::Ok, "good"),
                    (Severity::Error, "90 s in the future"),
                ],
            ),
            (r#"{"aud":["istio-ca"]}"#, vec![]),
            ("{", vec![(Severity::Warning, "no JWT")]),
            (r#"{"exp":18446744073709551615,"aud":"istio-ca"}"#, vec![]),
        ] {
            let found = judged(&token(claims));
            assert_eq!(found.len(), expected.len(), "{claims}: {found:?}");
            for ((severity, what), (expected, part)) in found.iter().zip(expected) {
                assert_eq!(*severity, expected, "{claims}: {what}");
                assert!(what.contains(part), "{what}");
            }
        }
        assert_eq!(judged(" \n")[0].0, Severity::Error);
        assert_eq!(judged("secret")[0].0, Severity::Warning);
        assert!(!format!("{:?}", judged("very-secret-token")).contains("very"));
    }

    #[test]
    fn times_are_told_in_whole_units() {
        for (seconds, told) in [(5, "5 s"), (180, "3 min"), (7200, "2 h"), (200_000, "2 d")] {
            assert_eq!(rounded(Duration::from_secs(seconds)), told);
        }
    }
}
