//! Answers in time, and later.

use tokio::time::{advance, pause, resume};
use tokio_seqpacket::UnixSeqpacketListener;

use super::*;

#[tokio::test]
async fn an_answer_that_comes_too_late_is_not_sent() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ztunnel.sock");
    let mut listener = UnixSeqpacketListener::bind(&path).unwrap();
    let mut agent = Agent::new(path);
    let (first, server) = tokio::join!(agent.next(), listener.accept());
    assert!(matches!(first, Heard::Connected));
    let server = server.unwrap();
    for (seconds, is_sent) in [(4, true), (5, false)] {
        server.send(&[0x1A, 0x00]).await.unwrap();
        assert!(matches!(agent.next().await, Heard::Packet(Ok(_))));
        pause();
        advance(Duration::from_secs(seconds)).await;
        resume();
        assert_eq!(agent.answer(Ok(())).await.is_ok(), is_sent);
    }
    let mut packet = [0; 16];
    for length in [zds::hello().len(), zds::answer(Ok(())).len(), 0] {
        let received = server.recv(&mut packet).await.unwrap();
        assert_eq!(received.bytes_read(), length);
    }
}
