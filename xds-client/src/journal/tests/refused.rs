//! Resources that were not put in force.

use super::*;

/// A resource of which the name can be read, but not the rest.
fn unreadable(name: &str) -> Bytes {
    let version = b"\x0a\x01\xff";
    [&version[..], &resource(name, b"bad")].concat().into()
}

/// What is recalled after a batch of workloads, before and after a rewrite.
fn recalled_after(batch: &Batch, refused: &[String]) -> Held {
    let directory = kept();
    let settings = settings(directory.path());
    let (mut store, _) = Store::open(settings.clone()).unwrap();
    for kind in Kind::ALL {
        store.append(&batch_of_nothing(kind), &[]).unwrap();
    }
    store.append(batch, &rejected(refused)).unwrap();
    let (held, _) = recall(&settings);
    store.compact().unwrap();
    assert_eq!(recall(&settings).0, held, "rewritten");
    held
}

#[test]
fn what_cannot_be_read_replaces_nothing() {
    // An earlier version wrote it as if it had been put in force: there was nothing to know it by.
    for refused in [&["one".to_owned()][..], &["nameless".to_owned()], &[]] {
        let resources = vec![unreadable("one")];
        let batch = Batch::new(Kind::Address, Extent::Changes, resources, Vec::new());
        let held = recalled_after(&batch, refused);
        assert_eq!(held[&(0, "one".into())], b"one", "{refused:?}");
    }
}

#[test]
fn what_cannot_be_read_is_not_gone_where_everything_is_told() {
    let resources = vec![unreadable("one"), resource("two", b"two")];
    let batch = Batch::new(Kind::Address, Extent::Everything, resources, Vec::new());
    let held = recalled_after(&batch, &["one".to_owned()]);
    assert_eq!(held[&(0, "one".into())], b"one");
}

#[test]
fn of_two_with_one_name_the_one_in_force_is_kept() {
    let (good, bad) = (resource("one", b"good"), unreadable("one"));
    for resources in [[good.clone(), bad.clone()], [bad, good]] {
        for refused in ["one", "nameless"] {
            let extents = [Extent::Changes, Extent::Everything];
            for extent in extents {
                let resources = resources.to_vec();
                let batch = Batch::new(Kind::Address, extent, resources, Vec::new());
                let held = recalled_after(&batch, &[refused.to_owned()]);
                assert_eq!(held[&(0, "one".into())], b"good", "{refused}");
            }
        }
    }
}

#[test]
fn two_with_one_name_of_which_either_may_be_in_force_end_the_journal() {
    let directory = kept();
    let (mut store, _) = Store::open(settings(directory.path())).unwrap();
    let told: [(&str, &[u8]); 2] = [("one", b"1"), ("one", b"2")];
    let batch = batch(Kind::Address, Extent::Changes, &told, &[]);
    let outcome = store.append(&batch, &rejected(&["one".to_owned()]));
    assert!(outcome.is_err(), "{outcome:?}");
    assert!(!file(directory.path()).exists());
}
