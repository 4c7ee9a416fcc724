#![allow(clippy::unwrap_used, reason = "test code: a panic is a failed test")]

use std::{fs, os::unix::fs::symlink};

use super::*;

/// Whether there is a hint well before one would come by the clock.
async fn soon(hints: &mut Hints) -> bool {
    timeout(Duration::from_millis(500), hints.next())
        .await
        .is_ok()
}

/// A directory with hints for `name` in it, of which the first has been taken.
async fn hints(name: &str) -> (tempfile::TempDir, Hints) {
    // Not across the moment when all are due.
    if until_next(RARELY) < Duration::from_secs(4) {
        sleep(until_next(RARELY)).await;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut hints = Hints::new(directory.path().join(name));
    assert!(soon(&mut hints).await, "the first one");
    (directory, hints)
}

#[tokio::test]
async fn a_file_is_worth_a_look_when_it_is_made_written_replaced_and_removed() {
    let (directory, mut hints) = hints("file").await;
    assert!(!soon(&mut hints).await, "nothing happened");
    let at = |name: &str| directory.path().join(name);
    fs::write(at("file"), "one").unwrap();
    assert!(soon(&mut hints).await, "made");
    assert!(!soon(&mut hints).await, "told already");
    fs::write(at("file"), "two").unwrap();
    assert!(soon(&mut hints).await, "written");
    fs::write(at("new"), "three").unwrap();
    fs::rename(at("new"), at("file")).unwrap();
    assert!(soon(&mut hints).await, "replaced");
    fs::remove_file(at("file")).unwrap();
    assert!(soon(&mut hints).await, "removed");
}

#[tokio::test]
async fn a_swap_of_links_is_seen_as_a_mounted_volume_makes_it() {
    let (directory, mut hints) = hints("file").await;
    let at = |name: &str| directory.path().join(name);
    for version in ["one", "two"] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("file"), version).unwrap();
    }
    symlink("one", at("data")).unwrap();
    symlink("data/file", at("file")).unwrap();
    while soon(&mut hints).await {}
    symlink("two", at("next")).unwrap();
    fs::rename(at("next"), at("data")).unwrap();
    assert!(soon(&mut hints).await, "swapped");
    while soon(&mut hints).await {}
    fs::write(at("two/file"), "three").unwrap();
    assert!(soon(&mut hints).await, "written where the links lead now");
}

#[tokio::test]
async fn a_directory_may_come_later_and_a_link_lead_elsewhere() {
    let (directory, mut hints) = hints("late/file").await;
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("real"), "one").unwrap();
    fs::create_dir(directory.path().join("late")).unwrap();
    assert!(soon(&mut hints).await, "the directory");
    symlink(elsewhere.path().join("real"), hints.path()).unwrap();
    assert!(soon(&mut hints).await, "the link");
    while soon(&mut hints).await {}
    fs::write(elsewhere.path().join("real"), "two").unwrap();
    assert!(soon(&mut hints).await, "what it leads to");
}

#[tokio::test]
async fn what_happens_while_nobody_waits_is_told() {
    let (directory, mut hints) = hints("file").await;
    fs::write(directory.path().join("file"), "one").unwrap();
    sleep(Duration::from_millis(50)).await;
    assert!(soon(&mut hints).await);
    // A wait that is given up.
    assert!(!soon(&mut hints).await);
    fs::write(directory.path().join("file"), "two").unwrap();
    assert!(soon(&mut hints).await);
}

#[test]
fn all_who_wait_are_due_at_the_same_moment() {
    let before = SystemTime::now();
    let due = until_next(RARELY);
    assert!(!due.is_zero() && due <= RARELY);
    let due = before + due;
    let rest = due
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_millis()
        % 10_000;
    assert!(!(100..9_900).contains(&rest), "{rest}");
}
