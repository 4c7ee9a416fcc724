use std::{
    hint::black_box,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use prost::Message as _;

use super::*;
use crate::admin::profile::{
    image::images,
    pprof::{Location, Profile},
};

/// What a thread does until it is told to stop.
#[inline(never)]
fn turns_in_circles(done: &AtomicBool) -> u64 {
    let mut turns = 0_u64;
    while !done.load(Relaxed) {
        turns = black_box(turns.wrapping_add(1));
    }
    turns
}

#[inline(never)]
fn asks_the_kernel(done: &AtomicBool) {
    while !done.load(Relaxed) {
        black_box(fs::metadata("/proc/self/status").is_ok());
    }
}

/// The functions of a stack, innermost first.
fn functions(profile: &Profile, location_ids: &[u64]) -> Vec<String> {
    let text = |index: i64| profile.string_table[usize::try_from(index).unwrap()].clone();
    let name = |id: &u64| {
        let location: &Location = profile.location.iter().find(|one| one.id == *id).unwrap();
        let line = location.line.first()?;
        let mut functions = profile.function.iter();
        Some(text(functions.find(|one| one.id == line.function_id)?.name))
    };
    location_ids.iter().filter_map(name).collect()
}

fn holds(names: &[String], part: &str) -> bool {
    names.iter().any(|name| name.contains(part))
}

#[test]
fn busy_threads_are_found_with_those_who_called_them() {
    let (done, stop) = (AtomicBool::new(false), CancellationToken::new());
    let images = images().unwrap();
    let wanted = Wanted {
        length: Duration::from_secs(2),
        frequency: 500,
    };
    let sampled = thread::scope(|scope| {
        scope.spawn(|| turns_in_circles(&done));
        scope.spawn(|| asks_the_kernel(&done));
        let sampled = sample(wanted, &images, &stop);
        done.store(true, Relaxed);
        sampled
    });
    let stacks = match sampled {
        Ok(stacks) => stacks,
        // Without the privilege there is nothing but a clear answer.
        Err(error) => {
            let expected = [nix::libc::EACCES, nix::libc::EPERM, nix::libc::ENOSYS];
            assert!(expected.contains(&error.raw_os_error().unwrap()), "{error}");
            return;
        }
    };
    let encoded = stacks.profile(&images, wanted.length, wanted.frequency);
    let profile = Profile::decode(&*encoded).unwrap();
    assert_eq!((profile.period, profile.sample_type.len()), (2_000_000, 2));
    assert_eq!(profile.string_table[0], "");
    assert!(profile.mapping.iter().any(|image| image.has_functions));
    let named: Vec<_> = profile
        .sample
        .iter()
        .map(|one| (functions(&profile, &one.location_id), one.value[0]))
        .collect();
    let seen = |function: &str| -> i64 {
        let with = named.iter().filter(|(names, _)| holds(names, function));
        // The caller of the caller is known, too: the frames between were found.
        with.clone()
            .for_each(|(names, _)| assert!(names.len() > 3, "{names:#?}"));
        with.map(|(_, count)| count).sum()
    };
    assert!(seen("turns_in_circles") > 20, "{named:#?}");
    assert!(seen("asks_the_kernel") > 20, "{named:#?}");
    let in_kernel = named
        .iter()
        .any(|(names, _)| names[0] == "[kernel]" && holds(names, "asks_the_kernel"));
    assert!(in_kernel || !holds(&profile.string_table, "[kernel]"));
}

#[test]
fn it_ends_when_nobody_waits_for_it() {
    let stop = CancellationToken::new();
    stop.cancel();
    let wanted = Wanted {
        length: Duration::from_secs(300),
        frequency: 100,
    };
    let began = Instant::now();
    drop(sample(wanted, &[], &stop));
    assert!(began.elapsed() < Duration::from_secs(60));
}

#[test]
fn records_that_are_cut_end_the_reading() {
    let record = |kind: u32, body: &[u8]| {
        let length = u16::try_from(8 + body.len()).unwrap();
        let head = [&kind.to_ne_bytes()[..], &[0; 2], &length.to_ne_bytes()];
        [&head.concat(), body].concat()
    };
    let lost = [1_u64, 7].map(u64::to_ne_bytes).concat();
    let mut all = record(RECORD_LOST, &lost);
    all.extend(record(1, b"12345678"));
    all.extend(record(RECORD_SAMPLE, &[0; 3]));
    for length in 0..=all.len() {
        let (mut rest, mut lost) = (&all[..length], 0);
        while let Some(record) = Record::next(&mut rest) {
            if let Record::Lost(count) = record {
                lost += count;
            }
        }
        assert_eq!(lost, if length < 24 { 0 } else { 7 });
    }
    // A length that does not even cover the header.
    assert!(Record::next(&mut &[0_u8; 16][..]).is_none());
}
