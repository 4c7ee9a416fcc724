//! Frames in pieces, and how many are too many.

use super::*;

const SETTINGS: u8 = 4;
const PING: u8 = 6;

fn watch(before: usize) -> Watch {
    Watch::new(
        before,
        &config::Tunnel {
            max_control_frames: 10,
            max_resets: 5,
            ..Default::default()
        },
    )
}

fn frame(kind: u8, length: usize) -> Vec<u8> {
    let [.., high, middle, low] = length.to_be_bytes();
    let mut frame = vec![high, middle, low, kind, 0, 0, 0, 0, 1];
    frame.resize(9 + length, kind);
    frame
}

#[tokio::test(start_paused = true)]
async fn frames_are_found_however_they_are_cut() {
    let mut bytes = vec![PING; 24];
    for length in [0, 5, 70_000] {
        bytes.extend(frame(DATA, length));
        bytes.extend(frame(PING, 8));
        bytes.extend(frame(RST_STREAM, 4));
    }
    for piece in [1, 2, 7, 9, 10, 4096, bytes.len()] {
        let mut watch = watch(24);
        for piece in bytes.chunks(piece) {
            watch.follow(piece, 0);
        }
        assert_eq!((watch.control.count, watch.resets.count), (3, 3), "{piece}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_and_a_steady_pace_are_no_flood_but_more_than_that_is() {
    for (kind, limit, flood) in [
        (PING, 100, Flood::ControlFrames),
        (SETTINGS, 100, Flood::ControlFrames),
        (WINDOW_UPDATE, 100, Flood::ControlFrames),
        (0x77, 100, Flood::ControlFrames),
        (RST_STREAM, 50, Flood::Resets),
    ] {
        let mut watch = watch(0);
        for _ in 0..5 {
            for _ in 0..limit {
                watch.follow(&frame(kind, 8), 0);
            }
            assert_eq!(watch.found(), None, "{kind}");
            tokio::time::advance(SPAN).await;
        }
        for _ in 0..limit {
            watch.follow(&frame(kind, 8), 0);
        }
        assert_eq!(watch.found(), None, "{kind}");
        watch.follow(&frame(kind, 8), 0);
        assert_eq!(watch.found(), Some(flood), "{kind}");
    }
}

#[tokio::test(start_paused = true)]
async fn data_is_no_flood_and_earns_updates_of_windows() {
    let mut watch = watch(0);
    for round in 1..=10_000 {
        watch.follow(&frame(DATA, 1), 0);
        watch.follow(&frame(HEADERS, 20), 0);
        watch.follow(&frame(WINDOW_UPDATE, 4), round * SENT_FOR_AN_UPDATE);
    }
    assert_eq!(watch.found(), None);
    for _ in 0..=100 {
        watch.follow(&frame(WINDOW_UPDATE, 4), 10_000 * SENT_FOR_AN_UPDATE);
    }
    assert_eq!(watch.found(), Some(Flood::ControlFrames));
}
