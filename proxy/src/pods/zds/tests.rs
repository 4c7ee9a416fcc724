//! The bytes of the protocol.

use std::{fs::File, os::fd::AsFd as _, os::unix::fs::MetadataExt as _};

use proptest::prelude::*;

use super::*;
use crate::listen::testing::fresh_netns;

const ADD: &str = "0A100A0361626312090A016E1201731A0161";
const KEEP: &str = "2A050A03616263";
const DEL: &str = "12051203616263";
const SNAPSHOT_SENT: &str = "1A00";

fn bytes(hex: &str) -> Vec<u8> {
    let digits: String = hex.split_whitespace().collect();
    (0..digits.len() / 2)
        .map(|i| u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}

fn again(pod: &Netns) -> OwnedFd {
    pod.as_fd().try_clone_to_owned().unwrap()
}

fn netns() -> OwnedFd {
    File::open("/proc/self/ns/net").unwrap().into()
}

#[test]
fn reads_every_request() {
    let Request::Add(pod) = decode(&bytes(ADD), vec![netns()]).unwrap() else {
        panic!("not an add");
    };
    assert_eq!(&*pod.uid, "abc");
    assert_eq!(pod.who, WorkloadRef::new("s", "n", "a"));
    assert_eq!(pod.netns.id(), Netns::current().unwrap().id());
    assert!(matches!(decode(&bytes(KEEP), vec![]), Ok(Request::Keep(uid)) if &*uid == "abc"));
    assert!(matches!(decode(&bytes(DEL), vec![]), Ok(Request::Del(uid)) if &*uid == "abc"));
    assert!(matches!(
        decode(&bytes(SNAPSHOT_SENT), vec![]),
        Ok(Request::SnapshotSent)
    ));
}

#[test]
fn writes_hello_and_answers() {
    assert_eq!(hello(), bytes("0801"));
    assert_eq!(answer(Ok(())), bytes("0A00"));
    assert_eq!(answer(Err("x")), bytes("0A030A0178"));
}

#[test]
fn a_long_error_is_cut_between_characters() {
    for reason in [
        "x".repeat(5000),
        "ü".repeat(5000),
        format!("x{}", "ü".repeat(5000)),
    ] {
        let packet = answer(Err(&reason));
        assert!(
            packet.len() > 800 && packet.len() < 1000,
            "{}",
            packet.len()
        );
        let read = WorkloadResponse::decode(&*packet).unwrap();
        let Some(workload_response::Payload::Ack(ack)) = read.payload else {
            panic!("not an ack");
        };
        assert!(reason.starts_with(&ack.error));
    }
}

#[test]
fn tells_a_later_version_from_a_broken_message() {
    // Field 9 of the oneof, a message.
    let unknown = decode(&bytes("4A00"), vec![]).unwrap_err();
    assert!(matches!(unknown, BadPacket::UnknownPayload));
    assert!(unknown.keeps_connection());

    let file = || OwnedFd::from(tempfile::tempfile().unwrap());
    let foreign = decode(&bytes(ADD), vec![file()]).unwrap_err();
    assert!(matches!(foreign, BadPacket::NotNetns(_)));
    assert!(foreign.keeps_connection());

    for (hex, descriptors) in [
        ("FFFFFF", 0), // garbage
        (ADD, 0),      // no descriptor
        (ADD, 2),      // too many
        (KEEP, 1),     // where none belongs
        (DEL, 1),
        (SNAPSHOT_SENT, 1),
        ("0A050A03616263", 1),     // add without workload_info
        ("0A070A0361626312FF", 1), // cut short
    ] {
        let descriptors = std::iter::repeat_with(netns).take(descriptors).collect();
        let broken = decode(&bytes(hex), descriptors).unwrap_err();
        assert!(!broken.keeps_connection(), "{hex}: {broken}");
    }
}

#[test]
fn closes_descriptors_of_packets_it_refuses() {
    let pod = fresh_netns();
    let inode = File::from(again(&pod)).metadata().unwrap().ino();
    let open = || {
        let name = format!("net:[{inode}]");
        let links = std::fs::read_dir("/proc/self/fd").unwrap();
        links
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .filter(|target| target.as_os_str() == name.as_str())
            .count()
    };
    assert_eq!(open(), 1);
    for hex in ["FFFFFF", "4A00", KEEP, DEL, SNAPSHOT_SENT, "0A050A03616263"] {
        assert!(decode(&bytes(hex), vec![again(&pod)]).is_err());
        assert_eq!(open(), 1, "{hex}");
    }
    let two = vec![again(&pod), again(&pod)];
    assert!(decode(&bytes(ADD), two).is_err());
    assert_eq!(open(), 1);
    drop(decode(&bytes(ADD), vec![again(&pod)]).unwrap());
    assert_eq!(open(), 1);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(packet in proptest::collection::vec(any::<u8>(), 0..200), descriptors in 0..3_usize) {
        let descriptors = std::iter::repeat_with(netns).take(descriptors).collect();
        let _ = decode(&packet, descriptors);
    }

    /// Every prefix of a request, and every request with a byte changed, is judged without panic.
    #[test]
    fn damaged_requests_never_panic(hex in prop_oneof![Just(ADD), Just(KEEP), Just(DEL)], cut in 0..20_usize, byte in any::<u8>()) {
        let mut packet = bytes(hex);
        let at = cut % packet.len();
        let _ = decode(&packet[..at], vec![]);
        packet[at] = byte;
        let _ = decode(&packet, vec![netns()]);
    }
}
