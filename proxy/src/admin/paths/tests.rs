use http::HeaderValue;

use super::*;

fn headers(pairs: &[(http::HeaderName, &'static str)]) -> HeaderMap {
    let pairs = pairs.iter();
    pairs
        .map(|(name, value)| (name.clone(), HeaderValue::from_static(value)))
        .collect()
}

#[test]
fn only_pages_of_the_server_itself_may_change_anything() {
    for (pairs, cross) in [
        (vec![], false), // istioctl, curl
        (vec![(HOST, "localhost:15000")], false),
        (
            vec![
                (HOST, "localhost:15000"),
                (ORIGIN, "http://localhost:15000"),
            ],
            false,
        ),
        (
            vec![(HOST, "localhost:15000"), (ORIGIN, "https://evil.example")],
            true,
        ),
        (
            vec![(HOST, "localhost:15000"), (ORIGIN, "http://localhost:8080")],
            true,
        ),
        (vec![(HOST, "localhost:15000"), (ORIGIN, "null")], true),
        (vec![(ORIGIN, "http://localhost:15000")], true),
    ] {
        assert_eq!(is_cross_site(&headers(&pairs)), cross, "{pairs:?}");
    }
}

#[test]
fn names_of_others_that_lead_here_are_refused() {
    for (host, local) in [
        ("localhost", true),
        ("LocalHost:15000", true),
        ("127.0.0.1:15000", true),
        ("[::1]:15000", true),
        ("10.0.0.7", true),
        ("evil.example:15000", false),
        ("localhost.evil.example", false),
        ("127.0.0.1.evil.example", false),
        ("", false),
    ] {
        let asked = headers(&[(HOST, host)]);
        assert_eq!(is_named_locally(&asked), local, "{host}");
    }
    assert!(is_named_locally(&headers(&[])), "HTTP/1.0");
}
