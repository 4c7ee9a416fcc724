use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _, path::Path};

use bytes::Bytes;
use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::{
    Extent, Kind,
    proto::discovery::{Resource, resource::Payload},
};

mod others;
mod refused;

/// What a state amounts to: content by kind and name.
type Held = BTreeMap<(usize, String), Vec<u8>>;

fn settings(directory: &Path) -> Settings {
    Settings {
        directory: directory.to_owned(),
        max_bytes: 1 << 20,
        owner: "cluster/node".to_owned(),
        on_demand: false,
    }
}

fn resource(name: &str, content: &[u8]) -> Bytes {
    let resource = Resource {
        name: name.into(),
        version: "1".into(),
        resource: Some(Payload {
            value: Bytes::copy_from_slice(content),
            ..Payload::default()
        }),
        ..Resource::default()
    };
    resource.encode_to_vec().into()
}

fn batch(kind: Kind, extent: Extent, told: &[(&str, &[u8])], removed: &[&str]) -> Batch {
    let told = told.iter();
    let resources = told
        .map(|(name, content)| resource(name, content))
        .collect();
    let removed = removed.iter().map(|&name| name.to_owned()).collect();
    Batch::new(kind, extent, resources, removed)
}

fn everything(kind: Kind, names: &[&str]) -> Batch {
    let told: Vec<_> = names.iter().map(|name| (*name, name.as_bytes())).collect();
    batch(kind, Extent::Everything, &told, &[])
}

/// Applies as a mesh does: resources, those that are missing from everything, removals; what is refused stays as it was.
fn apply(held: &mut Held, batch: &Batch, refused: &[String]) {
    let kind = batch.kind() as usize;
    let mut named = Vec::new();
    for resource in batch.resources().flatten() {
        named.push(resource.name.clone());
        let content = resource.resource.map(|payload| payload.value.to_vec());
        if let Some(content) = content.filter(|_| !refused.contains(&resource.name)) {
            held.insert((kind, resource.name), content);
        }
    }
    if batch.extent() == Extent::Everything {
        held.retain(|(of, name), _| *of != kind || named.contains(name));
    }
    for name in batch.removed() {
        held.remove(&(kind, name.clone()));
    }
}

fn recall(settings: &Settings) -> (Held, Option<(SystemTime, u64)>) {
    let (store, _) = Store::open(settings.clone()).unwrap();
    let mut held = Held::new();
    store
        .recall(&mut |batch| apply(&mut held, &batch, &[]))
        .unwrap();
    (held, store.found())
}

fn file(directory: &Path) -> PathBuf {
    directory.join("mesh.state")
}

fn rejected(names: &[String]) -> Vec<Rejected> {
    let reason = "bad".to_owned();
    let names = names.iter().cloned();
    names
        .map(|name| Rejected {
            name,
            reason: reason.clone(),
        })
        .collect()
}

/// One step of a history: a batch, and names of it that are refused.
fn step() -> impl Strategy<Value = (Batch, Vec<String>)> {
    let name = (0..8_u8).prop_map(|number| format!("name-{number}"));
    let content = prop::collection::vec(any::<u8>(), 0..40);
    let told = prop::collection::btree_map(name.clone(), content, 0..6);
    let removed = prop::collection::vec(name.clone(), 0..3);
    let refused = prop::collection::vec(name, 0..2);
    (
        any::<bool>(),
        prop::bool::weighted(0.2),
        told,
        removed,
        refused,
    )
        .prop_map(|(policies, all, told, removed, refused)| {
            let kind = if policies {
                Kind::Authorization
            } else {
                Kind::Address
            };
            let extent = if all {
                Extent::Everything
            } else {
                Extent::Changes
            };
            let resources = told.iter().map(|(name, content)| resource(name, content));
            let refused = refused.into_iter().filter(|name| told.contains_key(name));
            let refused = refused.collect();
            (
                Batch::new(kind, extent, resources.collect(), removed),
                refused,
            )
        })
}

fn base() -> [(Batch, Vec<String>); 2] {
    Kind::ALL.map(|kind| (everything(kind, &["name-0", "name-1"]), Vec::new()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_history_is_recalled_and_survives_restarts_and_rewrites(
        steps in prop::collection::vec((step(), prop::bool::weighted(0.2), any::<bool>()), 1..20)
    ) {
        let directory = tempfile::tempdir().unwrap();
        let settings = settings(directory.path());
        let (mut store, _) = Store::open(settings.clone()).unwrap();
        let mut model = Held::new();
        let base = base().map(|step| (step, false, false));
        for ((batch, refused), restart, rewrite) in base.into_iter().chain(steps) {
            store.append(&batch, &rejected(&refused)).unwrap();
            apply(&mut model, &batch, &refused);
            if rewrite {
                store.compact().unwrap();
            }
            if restart && store.size().is_some() {
                prop_assert_eq!(&recall(&settings).0, &model);
                store = Store::open(settings.clone()).unwrap().0;
                // As on the first stream of a new process: both kinds are answered before the name is taken.
                for kind in Kind::ALL {
                    let nothing = batch_of_nothing(kind);
                    store.append(&nothing, &[]).unwrap();
                }
            }
        }
        prop_assert_eq!(&recall(&settings).0, &model);
    }

    #[test]
    fn an_early_end_leaves_whole_transactions_or_nothing(
        steps in prop::collection::vec(step(), 0..5)
    ) {
        let directory = tempfile::tempdir().unwrap();
        let settings = settings(directory.path());
        let (mut store, _) = Store::open(settings.clone()).unwrap();
        let (mut model, mut ends) = (Held::new(), Vec::new());
        for (batch, refused) in base().into_iter().chain(steps) {
            store.append(&batch, &rejected(&refused)).unwrap();
            apply(&mut model, &batch, &refused);
            if let Some(end) = store.size() {
                ends.push((end, model.clone()));
            }
        }
        let whole = fs::read(file(directory.path())).unwrap();
        for cut in 0..=whole.len() {
            let (read, content) = read_bytes(&settings, &whole[..cut]);
            let last = ends.iter().rev().find(|(end, _)| *end <= cut as u64);
            match last {
                Some((end, expected)) => {
                    prop_assert_eq!(read.unwrap().end, *end, "cut at {}", cut);
                    prop_assert_eq!(&content, expected);
                }
                // Too little to be used: not all kinds are there, or not even a header.
                None => prop_assert!(read.is_err() || !is_complete(&settings, &whole[..cut])),
            }
        }
    }

    #[test]
    fn a_flipped_bit_is_noticed(steps in prop::collection::vec(step(), 0..4), seed in any::<usize>()) {
        let directory = tempfile::tempdir().unwrap();
        let settings = settings(directory.path());
        let (mut store, _) = Store::open(settings.clone()).unwrap();
        for (batch, refused) in base().into_iter().chain(steps) {
            store.append(&batch, &rejected(&refused)).unwrap();
        }
        let whole = fs::read(file(directory.path())).unwrap();
        for offset in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[offset] ^= 1 << (seed.wrapping_add(offset) % 8);
            prop_assert!(read_bytes(&settings, &bytes).0.is_err(), "byte {}", offset);
        }
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        fuzz(&bytes);
    }
}

fn batch_of_nothing(kind: Kind) -> Batch {
    batch(kind, Extent::Changes, &[], &[])
}

fn read_bytes(settings: &Settings, bytes: &[u8]) -> (Result<format::Readable, Unusable>, Held) {
    let mut held = Held::new();
    let mut sink = |batch: Batch| apply(&mut held, &batch, &[]);
    let mut replay = store::Replay::into(&mut sink);
    let read = format::read(
        &mut &*bytes,
        bytes.len() as u64,
        &settings.owner,
        &mut replay,
    );
    (read, held)
}

fn is_complete(settings: &Settings, bytes: &[u8]) -> bool {
    let mut live = live::Live::default();
    let read = format::read(&mut &*bytes, bytes.len() as u64, &settings.owner, &mut live);
    read.is_ok() && Kind::ALL.into_iter().all(|kind| live.is_based(kind))
}

#[test]
fn the_seeds_of_the_fuzz_target_are_read() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/journal");
    let mut whole = 0;
    for seed in fs::read_dir(seeds).unwrap() {
        let bytes = fs::read(seed.unwrap().path()).unwrap();
        fuzz(&bytes);
        let mut live = live::Live::default();
        let length = bytes.len() as u64;
        let read = format::read(&mut &*bytes, length, FUZZ_OWNER, &mut live);
        whole += usize::from(read.is_ok_and(|read| read.told.is_some()));
    }
    assert_eq!(whole, 2, "some have whole transactions");
}

/// A directory in which a state with one workload and one policy was kept.
fn kept() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let (mut store, _) = Store::open(settings(directory.path())).unwrap();
    for kind in Kind::ALL {
        store.append(&everything(kind, &["one"]), &[]).unwrap();
    }
    directory
}

#[test]
fn files_are_ours_alone() {
    let directory = kept();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(directory.path()), 0o700);
    assert_eq!(mode(&file(directory.path())), 0o600);
    fs::set_permissions(file(directory.path()), fs::Permissions::from_mode(0o644)).unwrap();
    let (_, unusable) = Store::open(settings(directory.path())).unwrap();
    assert!(matches!(unusable, Some(Unusable::Exposed)));
}

#[test]
fn what_cannot_be_used_is_named_and_set_aside() {
    type Change = fn(&mut Settings, &mut Vec<u8>);
    let cases: [(Change, &str); 5] = [
        (
            |settings, _| settings.owner = "another".into(),
            "belongs to \"cluster/node\"",
        ),
        (|_, bytes| bytes[8] = 2, "its format is 2"),
        (|_, bytes| bytes[0] = b'x', "no journal"),
        (|_, bytes| bytes[60] ^= 1, "damaged at byte"),
        (|_, bytes| bytes.truncate(40), "incomplete"),
    ];
    for (change, expected) in cases {
        let directory = kept();
        let (mut settings, path) = (settings(directory.path()), file(directory.path()));
        let mut bytes = fs::read(&path).unwrap();
        change(&mut settings, &mut bytes);
        fs::write(&path, bytes).unwrap();
        let (store, unusable) = Store::open(settings.clone()).unwrap();
        let told = unusable.unwrap().to_string();
        assert!(told.contains(expected), "{told}");
        assert!(store.found().is_none() && !path.exists());
        assert!(directory.path().join("mesh.state.unusable").exists());
        assert!(Store::open(settings).unwrap().1.is_none(), "named once");
    }
}

#[test]
fn a_state_counts_only_when_all_kinds_were_told() {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(directory.path());
    let (mut store, _) = Store::open(settings.clone()).unwrap();
    let outcome = store
        .append(&everything(Kind::Address, &["a"]), &[])
        .unwrap();
    assert_eq!((outcome, store.size()), (Kept::Begun, None));
    assert!(!file(directory.path()).exists());
    let policies = everything(Kind::Authorization, &["p"]);
    assert_eq!(store.append(&policies, &[]).unwrap(), Kept::Published);
    assert_eq!(recall(&settings).0.len(), 2);
    let left = fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(left, 2, "the state and the lock");
}

#[test]
fn an_on_demand_state_is_complete_without_workloads() {
    let directory = tempfile::tempdir().unwrap();
    let mut settings = settings(directory.path());
    settings.on_demand = true;
    let (mut store, _) = Store::open(settings.clone()).unwrap();
    let policies = everything(Kind::Authorization, &["p"]);
    assert_eq!(store.append(&policies, &[]).unwrap(), Kept::Published);
    let workload = batch(Kind::Address, Extent::Changes, &[("w", b"w")], &[]);
    assert_eq!(store.append(&workload, &[]).unwrap(), Kept::Published);
    assert_eq!(recall(&settings).0.len(), 2);
}

#[test]
fn changes_without_a_base_are_not_kept() {
    let directory = tempfile::tempdir().unwrap();
    let (mut store, _) = Store::open(settings(directory.path())).unwrap();
    let changes = batch_of_nothing(Kind::Address);
    assert_eq!(store.append(&changes, &[]).unwrap(), Kept::Baseless);
    store
        .append(&everything(Kind::Address, &["a"]), &[])
        .unwrap();
    let policies = batch(Kind::Authorization, Extent::Changes, &[("p", b"p")], &[]);
    assert_eq!(store.append(&policies, &[]).unwrap(), Kept::Baseless);
}

#[test]
fn what_a_dead_process_left_goes_and_what_a_living_one_writes_stays() {
    let directory = kept();
    let settings = settings(directory.path());
    let left = directory.path().join("mesh.state.0123456789abcdef.new");
    fs::write(&left, b"half").unwrap();
    let (mut living, _) = Store::open(settings.clone()).unwrap();
    assert!(!left.exists());
    living
        .append(&batch_of_nothing(Kind::Address), &[])
        .unwrap();
    let _ = Store::open(settings).unwrap();
    let policies = batch_of_nothing(Kind::Authorization);
    assert_eq!(living.append(&policies, &[]).unwrap(), Kept::Published);
}

#[test]
fn a_journal_shrinks_when_little_of_it_counts() {
    let directory = tempfile::tempdir().unwrap();
    let mut settings = settings(directory.path());
    settings.max_bytes = 1 << 30;
    let (mut store, _) = Store::open(settings.clone()).unwrap();
    for kind in Kind::ALL {
        store.append(&everything(kind, &["one"]), &[]).unwrap();
    }
    let content = vec![7; 100_000];
    for _ in 0..40 {
        let again = batch(Kind::Address, Extent::Changes, &[("one", &content)], &[]);
        store.append(&again, &[]).unwrap();
    }
    assert!(store.size().unwrap() < 2 << 20, "{:?}", store.size());
    assert_eq!(recall(&settings).0[&(0, "one".into())], content);
}

#[test]
fn a_mesh_that_is_too_large_is_not_kept() {
    let directory = kept();
    let settings = settings(directory.path());
    let (mut store, _) = Store::open(settings.clone()).unwrap();
    let content = vec![7; 2 << 20];
    let large = batch(Kind::Address, Extent::Changes, &[("large", &content)], &[]);
    let outcome = store.append(&large, &[]);
    assert!(
        matches!(outcome, Err(KeepError::TooLarge { .. })),
        "{outcome:?}"
    );
    assert!(
        !file(directory.path()).exists(),
        "an old state must not be served"
    );
    assert_eq!(
        store.append(&batch_of_nothing(Kind::Address), &[]).unwrap(),
        Kept::Baseless
    );
    // It begins anew with everything.
    for kind in Kind::ALL {
        store.append(&everything(kind, &["small"]), &[]).unwrap();
    }
    assert_eq!(recall(&settings).0.len(), 2);
}

#[tokio::test]
async fn what_is_kept_is_on_disk_when_the_call_returns() {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(directory.path());
    let opened = open(settings.clone(), JournalMetrics::default(), &mut |_| {});
    let (journal, keeper, recalled) = opened.unwrap();
    assert!(recalled.is_none());
    let stop = CancellationToken::new();
    let running = keeper.run(stop.clone());
    let using = async {
        spawn_blocking(move || {
            for kind in Kind::ALL {
                journal.keep(everything(kind, &["one"]), &[]);
            }
            assert_eq!(recall(&settings).0.len(), 2);
            assert!(!journal.needs_everything());
        })
        .await
        .unwrap();
        stop.cancel();
    };
    tokio::join!(running, using);
}

fn work(batch: Batch) -> Work {
    Work {
        batch,
        refused: Vec::new(),
        done_tx: sync_channel(1).0,
    }
}

/// Tells a journal of something that it cannot keep.
fn lose(journal: &Journal) {
    let waiting = &journal.inner.waiting;
    let before = waiting.swap(usize::MAX / 2, Ordering::Relaxed);
    journal.keep(everything(Kind::Address, &["lost"]), &[]);
    waiting.store(before, Ordering::Relaxed);
}

/// A journal that recalled a state, and then could not keep what was told.
fn lost(directory: &Path) -> (Journal, Keeper) {
    let opened = open(settings(directory), JournalMetrics::default(), &mut |_| {});
    let (journal, keeper, recalled) = opened.unwrap();
    assert!(recalled.is_some());
    lose(&journal);
    (journal, keeper)
}

#[tokio::test]
async fn what_is_lost_ends_the_journal_though_nothing_else_is_told() {
    let directory = kept();
    let (_journal, keeper) = lost(directory.path());
    let stop = CancellationToken::new();
    stop.cancel();
    keeper.run(stop).await;
    assert!(!file(directory.path()).exists());
}

#[tokio::test(start_paused = true)]
async fn what_was_told_before_a_loss_begins_no_journal_after_it() {
    let directory = tempfile::tempdir().unwrap();
    let opened = open(
        settings(directory.path()),
        JournalMetrics::default(),
        &mut |_| {},
    );
    let (journal, keeper, _) = opened.unwrap();
    // Something waits already, so that nobody waits for the disk.
    journal.inner.waiting.store(1, Ordering::Relaxed);
    for kind in Kind::ALL {
        journal.keep(everything(kind, &["early"]), &[]);
    }
    lose(&journal);
    let stop = CancellationToken::new();
    stop.cancel();
    keeper.run(stop).await;
    assert!(!file(directory.path()).exists());
    assert_eq!(journal.inner.waiting.load(Ordering::Relaxed), 1);
    tokio::time::advance(BEGIN_ANEW_AFTER).await;
    assert!(journal.needs_everything());
}

#[tokio::test(start_paused = true)]
async fn what_is_lost_ends_the_journal_and_it_begins_anew() {
    let directory = kept();
    let (journal, mut keeper) = lost(directory.path());
    keeper = keeper.give_up();
    assert!(!file(directory.path()).exists());
    assert!(!journal.needs_everything(), "not at once");
    tokio::time::advance(BEGIN_ANEW_AFTER).await;
    assert!(journal.needs_everything());
    for kind in Kind::ALL {
        keeper = keeper.keep(work(everything(kind, &["one"])));
    }
    assert!(!journal.needs_everything() && file(directory.path()).exists());
}

#[tokio::test(start_paused = true)]
async fn a_mesh_that_is_too_large_is_not_asked_for_again() {
    let directory = kept();
    let opened = open(
        settings(directory.path()),
        JournalMetrics::default(),
        &mut |_| {},
    );
    let (journal, mut keeper, _) = opened.unwrap();
    let content = vec![7; 2 << 20];
    let large = batch(Kind::Address, Extent::Changes, &[("large", &content)], &[]);
    keeper = keeper.keep(work(large));
    keeper = keeper.keep(work(batch_of_nothing(Kind::Address)));
    assert_eq!(keeper.store.size(), None);
    tokio::time::advance(BEGIN_ANEW_AFTER).await;
    assert!(!journal.needs_everything());
}
