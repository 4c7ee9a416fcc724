//! Without servers; those with real ones are end-to-end tests, since a `resolv.conf` names no port.

use super::*;

#[tokio::test]
async fn a_file_that_is_missing_or_names_nobody_is_told_and_looked_at_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("resolv.conf");
    let resolver = Resolver::new(&path, true);
    let host = Arc::from("a.example");
    for text in [None, Some("search example\n")] {
        text.iter()
            .for_each(|text| std::fs::write(&path, text).unwrap());
        let limit = Duration::from_secs(1);
        let error = resolver.addresses(&host, limit).await.unwrap_err();
        assert!(matches!(error, ResolveError::NoServer { .. }), "{error}");
    }
    std::fs::write(&path, "nameserver 127.0.0.1\n").unwrap();
    assert!(resolver.current().is_ok());
    assert!(resolver.running.lock().is_empty());
}

#[tokio::test]
async fn what_is_no_question_needs_no_server() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("resolv.conf");
    std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
    let resolver = Resolver::new(&path, true);
    let ask = async |host: &str| {
        let host = Arc::from(host);
        resolver.addresses(&host, Duration::from_secs(5)).await
    };
    let address: IpAddr = "192.0.2.9".parse().unwrap();
    assert_eq!(*ask("192.0.2.9").await.unwrap(), [address]);
    let no_name = "a..b";
    let error = ask(no_name).await.unwrap_err();
    assert!(matches!(error, ResolveError::Failed { .. }), "{error}");
    assert!(resolver.running.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_question_is_forgotten_once_nobody_waits_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("resolv.conf");
    // Nobody is there.
    std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
    let resolver = Resolver::new(&path, false);
    let host = Arc::from("silent.example");
    let limit = Duration::from_millis(100);
    let (one, two) = tokio::join!(
        resolver.addresses(&host, limit),
        resolver.addresses(&host, limit)
    );
    for answer in [one, two] {
        let error = answer.unwrap_err();
        assert!(
            matches!(
                error,
                ResolveError::Timeout { .. } | ResolveError::Failed { .. }
            ),
            "{error}"
        );
    }
    assert!(resolver.running.lock().is_empty());
}
