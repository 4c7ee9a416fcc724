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
fn queries_are_read_with_their_escapes() {
    let query = Query("level=access%3Adebug%2Cinfo&reset&limit=10&bad=%zz");
    assert_eq!(query.value("level").unwrap(), "access:debug,info");
    assert!(query.has("reset") && !query.has("set"));
    assert_eq!(query.number("limit"), Some(10_usize));
    assert_eq!(query.number::<usize>("level"), None);
    assert_eq!(query.value("bad").unwrap(), "%zz");
    assert!(!Query("").has(""));
}
