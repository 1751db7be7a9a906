//! Listening, connections and the graceful stop.

use std::{
    convert::Infallible,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cap_std::{ambient_authority, fs::Dir};
use http_body::Body as _;
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{log::Entry, options::Options, respond::Site};

/// How long a client may take over the head of its next request before its connection is closed.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a stop waits for requests in flight.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed accept (out of descriptors): trying at once would only burn the processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Most bytes of a request's head. Also bounds what a connection holds.
const HEAD_BYTES: usize = 16 * 1024;
/// Connections that may wait to be accepted; the system lowers it to its own limit.
const BACKLOG: i32 = 4096;

/// Why the server could not start.
#[derive(Debug)]
pub enum ServerError {
    /// The directory to serve cannot be opened.
    Root(std::path::PathBuf, io::Error),
    /// An address cannot be listened on.
    Listen(SocketAddr, io::Error),
    /// The system does not give what any server needs.
    System(io::Error),
}

impl fmt::Display for ServerError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root(path, error) => write!(
                formatter,
                "cannot open {}: {error}; name the directory to serve with --root",
                path.display()
            ),
            Self::Listen(address, error) => write!(
                formatter,
                "cannot listen on {address}: {error}; choose another address with --listen"
            ),
            Self::System(error) => write!(formatter, "cannot start: {error}"),
        }
    }
}

impl From<io::Error> for ServerError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
///
/// Whatever prevents the start; afterwards nothing does.
pub fn run(options: &Options) -> Result<(), ServerError> {
    let root = Dir::open_ambient_dir(&options.root, ambient_authority())
        .map_err(|error| ServerError::Root(options.root.clone(), error))?;
    let site = Arc::new(Site::new(root, options.max_age));
    allow_many_connections();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // Before the first connection: a signal must never end a request half way.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        // A client that goes away is an error of the write. Once registered, the signal stays harmless.
        drop(signal(SignalKind::pipe())?);
        let graceful = GracefulShutdown::new();
        let mut accepting = Vec::new();
        for listener in listeners(&options.listen)? {
            println!("listening on http://{}", listener.local_addr()?);
            accepting.push(Box::pin(accept(listener, &site, options.log, &graceful)));
        }
        first(all(accepting), either(&mut terminate, &mut interrupt)).await;
        let again = either(&mut terminate, &mut interrupt);
        let stopped = tokio::time::timeout(STOP_TIMEOUT, graceful.shutdown());
        first(stopped, again).await;
        Ok(())
    })
}

/// Raises the limit of open files to what the system allows. Without it the server works, for fewer clients.
fn allow_many_connections() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    );
}

/// Waits for one of two signals.
async fn either(one: &mut Signal, other: &mut Signal) {
    first(one.recv(), other.recv()).await;
}

/// Waits until one of two futures is done.
async fn first(one: impl Future, other: impl Future) {
    let mut one = std::pin::pin!(one);
    let mut other = std::pin::pin!(other);
    std::future::poll_fn(|context| {
        if one.as_mut().poll(context).is_ready() || other.as_mut().poll(context).is_ready() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}

/// Drives futures that do not end.
async fn all<F: Future<Output = Infallible>>(mut futures: Vec<std::pin::Pin<Box<F>>>) {
    std::future::poll_fn(|context| {
        for future in &mut futures {
            let _ = future.as_mut().poll(context);
        }
        std::task::Poll::<()>::Pending
    })
    .await;
}

/// Opens the sockets: the given ones, or port 80 of everything.
fn listeners(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>, ServerError> {
    if addresses.is_empty() {
        let everything = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 80);
        let listener = listen(everything, false).or_else(|error| {
            if matches!(error.raw_os_error(), Some(EAFNOSUPPORT | EADDRNOTAVAIL)) {
                let everything = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 80);
                listen(everything, false).map_err(|error| ServerError::Listen(everything, error))
            } else {
                Err(ServerError::Listen(everything, error))
            }
        })?;
        return Ok(vec![listener]);
    }
    addresses
        .iter()
        .map(|&address| {
            // `[::]` takes IPv4 too, unless that has a socket of its own.
            let only_v6 = addresses
                .iter()
                .any(|other| other.is_ipv4() && other.port() == address.port());
            listen(address, only_v6).map_err(|error| ServerError::Listen(address, error))
        })
        .collect()
}

/// Error numbers of a system without IPv6.
const EAFNOSUPPORT: i32 = 97;
const EADDRNOTAVAIL: i32 = 99;

fn listen(address: SocketAddr, only_v6: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Accepts connections for ever, each served by a task of its own.
async fn accept(
    listener: TcpListener,
    site: &Arc<Site>,
    log: bool,
    graceful: &GracefulShutdown,
) -> Infallible {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let serving = serve(stream, peer.ip(), Arc::clone(site), log, graceful.watcher());
                tokio::spawn(serving);
            }
            Err(error) => {
                eprintln!("kiln-site-server: cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, client: IpAddr, site: Arc<Site>, log: bool, watcher: Watcher) {
    // The response's last piece must not wait for an acknowledgement. A socket that refuses is slow, not wrong.
    let _ = stream.set_nodelay(true);
    let answered = Mutex::new(Vec::new());
    let service = service_fn(|request: Request<Incoming>| {
        let response = site.answer(&request);
        if log {
            let length = response.body().size_hint().exact().unwrap_or_default();
            let entry = Entry::new(client, &request, response.status(), length);
            lock(&answered).push(entry);
        }
        async { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(watcher.watch(connection));
    std::future::poll_fn(|context| {
        let polled = connection.as_mut().poll(context);
        // What was answered is written by now, as far as the client takes it.
        lock(&answered).drain(..).for_each(|entry| entry.write());
        // A client that goes away or speaks nonsense ends its own connection only.
        polled.map(|_| ())
    })
    .await;
}

/// Locks; a panic elsewhere leaves a list of entries as good as it was.
fn lock(entries: &Mutex<Vec<Entry>>) -> MutexGuard<'_, Vec<Entry>> {
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}
