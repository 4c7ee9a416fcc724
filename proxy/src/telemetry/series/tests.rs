use std::sync::atomic::AtomicI64;

use tokio::time::{Instant, sleep, timeout};

use super::*;

/// A series that is in use while its count is above zero.
#[derive(Debug, Default)]
struct Open {
    name: u32,
    count: AtomicI64,
}

impl Counted for Open {
    fn in_use(&self) -> bool {
        self.count.load(Relaxed) > 0
    }
}

#[derive(Hash)]
struct Name(u32);

impl Key for Name {
    type Series = Open;

    fn names(&self, series: &Open) -> bool {
        series.name == self.0
    }

    fn make(&self) -> Open {
        Open {
            name: self.0,
            ..Open::default()
        }
    }
}

fn opened(open: &Open) {
    open.count.fetch_add(1, Relaxed);
}

fn looked_at(_: &Open) {}

const IDLE: Duration = Duration::from_secs(80);

#[test]
fn a_name_is_one_series_and_the_limit_holds() {
    let table = Table::default();
    let first = table.touch(&Name(1), 2, opened).unwrap();
    let again = table.touch(&Name(1), 2, opened).unwrap();
    assert!(Arc::ptr_eq(&first, &again));
    assert_eq!(first.series.count.load(Relaxed), 2);
    table.touch(&Name(2), 2, opened).unwrap();
    assert!(table.touch(&Name(3), 2, opened).is_none());
    assert!(table.touch(&Name(2), 2, opened).is_some());
    table.touch_always(&Name(3), opened);
    assert_eq!((table.len(), table.all().len()), (3, 3));
}

#[test]
fn the_limit_holds_when_many_come_at_once() {
    let table = Table::<Open>::default();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let table = &table;
            scope.spawn(move || {
                for name in 0..1_000 {
                    // Some names are the threads' own, some are everybody's.
                    let name = if name % 2 == 0 {
                        name
                    } else {
                        thread * 1_000 + name
                    };
                    table.touch(&Name(name), 300, opened);
                }
            });
        }
    });
    assert_eq!((table.len(), table.all().len()), (300, 300));
}

#[tokio::test(start_paused = true)]
async fn what_is_idle_for_long_goes_and_what_is_in_use_stays() {
    let table = Table::default();
    let held = table.touch_always(&Name(1), opened);
    table.touch_always(&Name(2), looked_at);
    let start = Instant::now();
    let watching = async {
        while table.len() == 2 {
            sleep(Duration::from_secs(1)).await;
        }
        start.elapsed()
    };
    let gone_after = tokio::select! {
        () = table.evict_idle(IDLE, || {}) => unreachable!("never ends"),
        after = watching => after,
    };
    let expected = IDLE..=IDLE + IDLE / 8 + Duration::from_secs(1);
    assert!(expected.contains(&gone_after), "{gone_after:?}");
    assert_eq!((table.len(), table.evicted()), (1, 1));

    held.series.count.store(0, Relaxed);
    let evicting = table.evict_idle(IDLE, || {});
    assert!(timeout(IDLE * 2, evicting).await.is_err());
    assert_eq!((table.len(), table.evicted()), (0, 2));
}

#[tokio::test(start_paused = true)]
async fn what_is_used_now_and_then_stays() {
    let table = Table::default();
    table.touch_always(&Name(1), looked_at);
    let using = async {
        for _ in 0..10 {
            sleep(IDLE / 2).await;
            table.touch(&Name(1), 1, looked_at).unwrap();
        }
    };
    tokio::select! {
        () = table.evict_idle(IDLE, || {}) => unreachable!("never ends"),
        () = using => {}
    }
    assert_eq!((table.len(), table.evicted()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_holds_series_for_long_delays_no_eviction() {
    let table = Table::default();
    for name in 0..1_000 {
        table.touch_always(&Name(name), looked_at);
    }
    let held = table.all();
    let cleared = AtomicU64::new(0);
    let evicting = table.evict_idle(IDLE, || {
        cleared.fetch_add(1, Relaxed);
    });
    assert!(timeout(IDLE * 2, evicting).await.is_err());
    assert_eq!((table.len(), held.len()), (0, 1_000));
    assert_eq!(cleared.load(Relaxed), 1);
    let room: usize = table.shards().map(|shard| shard.read().capacity()).sum();
    assert_eq!(room, 0, "the table gives its memory back");
}
