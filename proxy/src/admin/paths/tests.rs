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
