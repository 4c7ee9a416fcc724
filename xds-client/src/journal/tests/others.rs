//! Processes that follow the same mesh on one node.

use super::*;

fn added(name: &str) -> Batch {
    batch(Kind::Address, Extent::Changes, &[(name, b"x")], &[])
}

/// A process that keeps what was kept before it.
fn keeping(settings: &Settings) -> Store {
    let (mut store, _) = Store::open(settings.clone()).unwrap();
    for kind in Kind::ALL {
        store.append(&batch_of_nothing(kind), &[]).unwrap();
    }
    assert!(store.size().is_some());
    store
}

fn names(settings: &Settings) -> Vec<String> {
    let (held, _) = recall(settings);
    held.into_keys().map(|(_, name)| name).collect()
}

#[test]
fn a_successor_takes_the_name_and_the_predecessor_writes_no_more() {
    let directory = kept();
    let settings = settings(directory.path());
    let mut old = keeping(&settings);
    let (mut new, _) = Store::open(settings.clone()).unwrap();
    assert_eq!(new.append(&added("new"), &[]).unwrap(), Kept::Begun);
    assert_eq!(
        old.append(&added("old"), &[]).unwrap(),
        Kept::Published,
        "not yet"
    );
    let policies = batch_of_nothing(Kind::Authorization);
    assert_eq!(new.append(&policies, &[]).unwrap(), Kept::Published);
    assert_eq!(old.append(&added("late"), &[]).unwrap(), Kept::Succeeded);
    old.give_up();
    assert_eq!(names(&settings), ["new", "one", "one"]);
}

#[test]
fn a_predecessor_keeps_again_when_its_successor_has_ended() {
    let directory = kept();
    let settings = settings(directory.path());
    let mut old = keeping(&settings);
    let new = keeping(&settings);
    assert_eq!(old.append(&added("a"), &[]).unwrap(), Kept::Succeeded);
    drop(new);
    assert_eq!(old.append(&added("b"), &[]).unwrap(), Kept::Baseless);
    assert!(!file(directory.path()).exists(), "it does not know of b");
    for kind in Kind::ALL {
        old.append(&everything(kind, &["again"]), &[]).unwrap();
    }
    assert_eq!(names(&settings), ["again", "again"]);
}

#[test]
fn a_successor_that_ends_before_anything_is_told_does_not_end_the_journal() {
    let directory = kept();
    let settings = settings(directory.path());
    let mut old = keeping(&settings);
    drop(keeping(&settings));
    let all = everything(Kind::Address, &["again"]);
    assert_eq!(old.append(&all, &[]).unwrap(), Kept::Begun);
}

#[test]
fn who_gives_up_before_its_time_leaves_what_a_living_process_keeps() {
    let directory = kept();
    let settings = settings(directory.path());
    let mut old = keeping(&settings);
    let (mut new, _) = Store::open(settings).unwrap();
    let nothing = batch_of_nothing(Kind::Address);
    assert_eq!(new.append(&nothing, &[]).unwrap(), Kept::Begun);
    new.give_up();
    assert_eq!(old.append(&added("a"), &[]).unwrap(), Kept::Published);
    assert_eq!(new.append(&added("a"), &[]).unwrap(), Kept::Succeeded);
    drop(old);
    assert_eq!(new.append(&added("b"), &[]).unwrap(), Kept::Baseless);
    assert!(!file(directory.path()).exists(), "it does not know of b");
}

#[test]
fn who_gives_up_what_it_keeps_removes_it() {
    let directory = kept();
    let settings = settings(directory.path());
    let mut store = keeping(&settings);
    store.give_up();
    assert!(!file(directory.path()).exists());
    let all = everything(Kind::Address, &["again"]);
    assert_eq!(store.append(&all, &[]).unwrap(), Kept::Begun);
}

#[tokio::test(start_paused = true)]
async fn who_keeps_again_asks_for_everything() {
    let directory = kept();
    let settings = settings(directory.path());
    let opened = open(settings.clone(), JournalMetrics::default(), &mut |_| {});
    let (journal, mut keeper, _) = opened.unwrap();
    for kind in Kind::ALL {
        keeper = keeper.keep(work(batch_of_nothing(kind)));
    }
    let other = keeping(&settings);
    keeper = keeper.keep(work(added("a")));
    tokio::time::advance(BEGIN_ANEW_AFTER).await;
    assert!(!journal.needs_everything(), "another process keeps it");
    drop(other);
    keeper = keeper.keep(work(added("b")));
    tokio::time::advance(BEGIN_ANEW_AFTER).await;
    assert!(journal.needs_everything());
    for kind in Kind::ALL {
        keeper = keeper.keep(work(everything(kind, &["again"])));
    }
    assert!(!journal.needs_everything());
    drop(keeper);
    assert_eq!(names(&settings), ["again", "again"]);
}
