//! A server that answers whatever a test wants.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use hickory_proto::op::{Message, ResponseCode};
use parking_lot::Mutex;
use tokio::{
    net::{TcpStream, UdpSocket},
    task::JoinSet,
    time::sleep,
};

use super::{addresses, answer, read, receive, send};
use crate::{sys::Netns, traffic};

/// Serves datagrams and connections until it is dropped.
#[derive(Debug)]
pub struct Scripted {
    asked: Arc<Mutex<Vec<Asked>>>,
    _tasks: JoinSet<()>,
}

/// One query that came.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Who asked.
    pub from: SocketAddr,
    /// Whether over a connection.
    pub tcp: bool,
    /// The query.
    pub bytes: Vec<u8>,
}

/// What is sent, and how long after the query; nothing at all, or more than one message.
type Replies = Vec<(Duration, Vec<u8>)>;

struct Script<F> {
    reply: F,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Scripted {
    /// Listens inside a namespace and answers as `reply` says.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub fn start<F>(netns: &Netns, at: SocketAddr, reply: F) -> io::Result<Self>
    where
        F: Fn(&Asked) -> Replies + Send + Sync + 'static,
    {
        let socket = netns.run(|| std::net::UdpSocket::bind(at))?;
        socket.set_nonblocking(true)?;
        let socket = Arc::new(UdpSocket::from_std(socket)?);
        let listener = traffic::listen(netns, at)?;
        let asked = Arc::default();
        let script = Arc::new(Script {
            reply,
            asked: Arc::clone(&asked),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(socket, Arc::clone(&script)));
        tasks.spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((stream, from)) = listener.accept().await {
                open.spawn(serve_tcp(stream, from, Arc::clone(&script)));
            }
        });
        Ok(Self {
            asked,
            _tasks: tasks,
        })
    }

    /// Behaves as the first label of each name says: `silent`, `slow` (300 ms), `liar` (the answer comes last), `garbage`, `big`
    /// (4 KB), `cut` (over UDP), `refused`; with one address otherwise.
    ///
    /// # Errors
    /// As [`Scripted::start`].
    pub fn by_first_label(netns: &Netns, at: SocketAddr) -> io::Result<Self> {
        Self::start(netns, at, as_the_name_says)
    }

    /// The queries so far.
    #[must_use]
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().clone()
    }
}

impl<F: Fn(&Asked) -> Replies> Script<F> {
    fn replies(&self, asked: Asked) -> Replies {
        let replies = (self.reply)(&asked);
        self.asked.lock().push(asked);
        replies
    }
}

async fn serve_udp<F: Fn(&Asked) -> Replies>(socket: Arc<UdpSocket>, script: Arc<Script<F>>) {
    let (mut room, mut later) = (vec![0; 1 << 16], JoinSet::new());
    loop {
        // An error is that of an earlier answer.
        let Ok((length, from)) = socket.recv_from(&mut room).await else {
            continue;
        };
        let bytes = room[..length].to_vec();
        let asked = Asked {
            from,
            tcp: false,
            bytes,
        };
        for (after, reply) in script.replies(asked) {
            let socket = Arc::clone(&socket);
            later.spawn(async move {
                sleep(after).await;
                let _ = socket.send_to(&reply, from).await;
            });
        }
        while later.try_join_next().is_some() {}
    }
}

async fn serve_tcp<F: Fn(&Asked) -> Replies>(
    mut stream: TcpStream,
    from: SocketAddr,
    script: Arc<Script<F>>,
) {
    while let Ok(bytes) = receive(&mut stream).await {
        let asked = Asked {
            from,
            tcp: true,
            bytes,
        };
        for (after, reply) in script.replies(asked) {
            sleep(after).await;
            if send(&mut stream, &reply).await.is_err() {
                return;
            }
        }
    }
}

/// What [`Scripted::by_first_label`] answers.
fn as_the_name_says(asked: &Asked) -> Replies {
    let (bytes, now) = (&asked.bytes, Duration::ZERO);
    let message = read(bytes);
    let label = message.queries[0].name().iter().next().unwrap_or_default();
    let right = addresses(bytes, 1);
    let edited = |edit: fn(&mut Vec<u8>)| {
        let mut wrong = addresses(bytes, 2);
        edit(&mut wrong);
        (now, wrong)
    };
    match label {
        b"silent" => Vec::new(),
        b"slow" => vec![(Duration::from_millis(300), right)],
        // The identifier of another query, another question, a query, a stub of a header; and then the truth.
        b"liar" => vec![
            edited(|wrong| wrong[0] ^= 1),
            edited(|wrong| wrong[14] ^= 0x02),
            edited(|wrong| wrong[2] &= 0x7f),
            edited(|wrong| wrong.truncate(11)),
            (Duration::from_millis(50), right),
        ],
        b"garbage" => vec![(now, vec![0xff; 40]), (now, Vec::new())],
        b"big" => vec![(now, addresses(bytes, 255))],
        b"cut" if !asked.tcp => {
            let cut = |message: &mut Message| message.metadata.truncation = true;
            vec![(now, answer(bytes, cut))]
        }
        b"refused" => {
            let refuse =
                |message: &mut Message| message.metadata.response_code = ResponseCode::Refused;
            vec![(now, answer(bytes, refuse))]
        }
        _ => vec![(now, right)],
    }
}
