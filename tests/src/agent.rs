//! A stand-in for the CNI node agent: the server side of ZDS, driven step by step by the test.
//!
//! Nothing happens in the background: a test accepts a connection, sends what it likes, and reads what comes back. So an agent that
//! misbehaves, is slow, or vanishes is written down as plainly as one that does not.

use std::{
    io::IoSlice,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use prost::Message as _;
use tokio::time::timeout;
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener, ancillary::AncillaryMessageWriter};

use crate::{
    world::Pod,
    zds::{
        AddWorkload, DelWorkload, KeepWorkload, Request, Response, SnapshotSent, WorkloadInfo,
        WorkloadRequest, WorkloadResponse, ZdsHello,
    },
};

/// How long the agent waits for hello and for each answer.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The answer to one message: `Err` holds the proxy's reason.
pub type Answer = Result<(), String>;

/// The listening agent. Dropping it removes the socket file; sessions go on.
#[derive(Debug)]
pub struct Agent {
    listener: UnixSeqpacketListener,
    path: PathBuf,
}

impl Agent {
    /// Listens at `path`, in place of whatever was there.
    ///
    /// # Errors
    /// When the path cannot be bound.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        let _ = std::fs::remove_file(path);
        let listener = UnixSeqpacketListener::bind(path)
            .with_context(|| format!("bind {}", path.display()))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Waits for the next proxy and its hello, without a limit for the former.
    ///
    /// # Errors
    /// When hello is late, truncated or garbage.
    pub async fn accept(&mut self) -> anyhow::Result<Session> {
        let socket = self.listener.accept().await?;
        let mut session = Session {
            hello: Vec::new(),
            socket,
        };
        session.hello = session.receive(ANSWER_LIMIT).await.context("hello")?;
        let version = ZdsHello::decode(session.hello.as_slice())?.version;
        ensure!(version == 1, "hello {:02x?}", session.hello);
        Ok(session)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One connected proxy.
#[derive(Debug)]
pub struct Session {
    /// The first packet, as it came.
    pub hello: Vec<u8>,
    socket: UnixSeqpacket,
}

impl Session {
    /// Sends `add` with the pod's namespace and reads the answer.
    ///
    /// # Errors
    /// When the connection fails or the answer is late or none.
    pub async fn add(&self, pod: &Pod) -> anyhow::Result<Answer> {
        let request = Self::add_request(pod);
        self.send(request, &[pod.netns().as_fd()]).await?;
        self.answer().await
    }

    /// The message that [`Session::add`] sends.
    #[must_use]
    pub fn add_request(pod: &Pod) -> Request {
        let spec = pod.spec();
        Request::Add(AddWorkload {
            uid: spec.uid.clone(),
            workload_info: Some(WorkloadInfo {
                name: spec.name.clone(),
                namespace: spec.namespace.clone(),
                service_account: spec.service_account.clone(),
            }),
        })
    }

    /// Sends `keep` and reads the answer.
    ///
    /// # Errors
    /// As [`Session::add`].
    pub async fn keep(&self, uid: &str) -> anyhow::Result<Answer> {
        self.ask(Request::Keep(KeepWorkload {
            uid: uid.to_owned(),
        }))
        .await
    }

    /// Sends `del` and reads the answer.
    ///
    /// # Errors
    /// As [`Session::add`].
    pub async fn del(&self, uid: &str) -> anyhow::Result<Answer> {
        self.ask(Request::Del(DelWorkload {
            uid: uid.to_owned(),
        }))
        .await
    }

    /// Sends `snapshot_sent` and reads the answer.
    ///
    /// # Errors
    /// As [`Session::add`].
    pub async fn snapshot_sent(&self) -> anyhow::Result<Answer> {
        self.ask(Request::SnapshotSent(SnapshotSent {})).await
    }

    /// Sends a snapshot of these pods, each of which must be taken.
    ///
    /// # Errors
    /// As [`Session::add`], and when one is refused.
    pub async fn snapshot(&self, pods: &[&Pod]) -> anyhow::Result<()> {
        for pod in pods {
            if let Err(reason) = self.add(pod).await? {
                bail!("add of {} refused: {reason}", pod.name());
            }
        }
        if let Err(reason) = self.snapshot_sent().await? {
            bail!("snapshot refused: {reason}");
        }
        Ok(())
    }

    /// Sends a message without descriptors and reads the answer.
    ///
    /// # Errors
    /// As [`Session::add`].
    pub async fn ask(&self, request: Request) -> anyhow::Result<Answer> {
        self.send(request, &[]).await?;
        self.answer().await
    }

    /// Sends a message with any descriptors and reads nothing.
    ///
    /// # Errors
    /// When the connection fails.
    pub async fn send(&self, request: Request, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        self.send_raw(
            &WorkloadRequest {
                payload: Some(request),
            }
            .encode_to_vec(),
            fds,
        )
        .await
    }

    /// Sends any bytes with any descriptors as one packet.
    ///
    /// # Errors
    /// When the connection fails.
    pub async fn send_raw(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        let mut space = [0_u8; 256];
        let mut ancillary = AncillaryMessageWriter::new(&mut space);
        if !fds.is_empty() {
            ancillary.add_fds(fds).context("too many descriptors")?;
        }
        let packet = [IoSlice::new(packet)];
        let sending = self
            .socket
            .send_vectored_with_ancillary(&packet, &mut ancillary);
        timeout(ANSWER_LIMIT, sending)
            .await
            .context("the proxy does not read")??;
        Ok(())
    }

    /// Reads one answer.
    ///
    /// # Errors
    /// When it is late, truncated or not an ack, or the connection ended.
    pub async fn answer(&self) -> anyhow::Result<Answer> {
        let packet = self.receive(ANSWER_LIMIT).await.context("answer")?;
        match WorkloadResponse::decode(packet.as_slice())?.payload {
            Some(Response::Ack(ack)) if ack.error.is_empty() => Ok(Ok(())),
            Some(Response::Ack(ack)) => Ok(Err(ack.error)),
            None => bail!("neither ack nor error: {packet:02x?}"),
        }
    }

    /// Reads one packet as it is.
    ///
    /// # Errors
    /// When it is late or longer than 1024 bytes, or the connection ended.
    pub async fn receive(&self, limit: Duration) -> anyhow::Result<Vec<u8>> {
        let mut buffer = [0_u8; 1024];
        let info = timeout(limit, self.socket.recv(&mut buffer))
            .await
            .context("no packet in time")??;
        ensure!(
            !info.truncated(),
            "packet longer than {} bytes",
            buffer.len()
        );
        ensure!(info.bytes_read() > 0, "connection ended");
        Ok(buffer[..info.bytes_read()].to_vec())
    }

    /// Checks that the proxy neither speaks nor leaves for `period`.
    ///
    /// # Errors
    /// When it does.
    pub async fn silent(&self, period: Duration) -> anyhow::Result<()> {
        let mut buffer = [0_u8; 1024];
        match timeout(period, self.socket.recv(&mut buffer)).await {
            Err(_) => Ok(()),
            Ok(read) => {
                let count = read?.bytes_read();
                bail!("unasked: {:02x?}", &buffer[..count]);
            }
        }
    }

    /// Waits until the proxy closes the connection; returns the answers that came before.
    ///
    /// # Errors
    /// When it is still open after `limit`.
    pub async fn closed(&self, limit: Duration) -> anyhow::Result<Vec<Vec<u8>>> {
        let mut packets = Vec::new();
        let reading = async {
            let mut buffer = [0_u8; 1024];
            while let Ok(info) = self.socket.recv(&mut buffer).await {
                if info.bytes_read() == 0 {
                    break;
                }
                packets.push(buffer[..info.bytes_read()].to_vec());
            }
        };
        timeout(limit, reading)
            .await
            .context("the proxy does not close the connection")?;
        Ok(packets)
    }
}
