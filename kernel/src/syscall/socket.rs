//! System calls on sockets.

use alloc::{sync::Arc, vec::Vec};
use core::sync::atomic::{AtomicUsize, Ordering};

use linux_raw_sys::{
    general as linux,
    net::{self, cmsghdr, mmsghdr, msghdr, ucred},
};

use super::{
    Call, Entry, Outcome, Restart,
    file::{attempt, is_interrupted, read_range},
    path,
};
use crate::{
    Errno, Kernel, Result,
    file::{OpenFile, OpenFlags, Readiness, Sink, Source, io::MAX_TRANSFER, watch},
    fs::{Kind, vfs::Resolve},
    memory::user::{self, UserRange},
    net::{
        Caller, Incoming, MAX_FILES, Outgoing, Socket,
        address::{self, Address, UnixName},
        option::{LEVEL_IP, LEVEL_IPV6, SOL_SOCKET},
    },
    task::{Process, Thread},
    time::{self, NEVER},
    trace,
};

/// The supported calls.
pub const CALLS: &[Entry] = &[
    Entry {
        number: linux::__NR_socket,
        name: "socket",
        handler: socket,
        limits: "AF_UNIX, AF_INET and AF_INET6 with TCP, UDP or ICMP echo (not with --net socket), AF_NETLINK with NETLINK_ROUTE; no raw and no packet sockets",
    },
    Entry {
        number: linux::__NR_socketpair,
        name: "socketpair",
        handler: socketpair,
        limits: "AF_UNIX only, as in Linux",
    },
    Entry {
        number: linux::__NR_bind,
        name: "bind",
        handler: bind,
        limits: "",
    },
    Entry {
        number: linux::__NR_listen,
        name: "listen",
        handler: listen,
        limits: "",
    },
    Entry {
        number: linux::__NR_accept,
        name: "accept",
        handler: accept,
        limits: "",
    },
    Entry {
        number: linux::__NR_accept4,
        name: "accept4",
        handler: accept4,
        limits: "",
    },
    Entry {
        number: linux::__NR_connect,
        name: "connect",
        handler: connect,
        limits: "a TCP connection cannot be dissolved with AF_UNSPEC",
    },
    Entry {
        number: linux::__NR_getsockname,
        name: "getsockname",
        handler: getsockname,
        limits: "",
    },
    Entry {
        number: linux::__NR_getpeername,
        name: "getpeername",
        handler: getpeername,
        limits: "",
    },
    Entry {
        number: linux::__NR_sendto,
        name: "sendto",
        handler: sendto,
        limits: NO_URGENT,
    },
    Entry {
        number: linux::__NR_recvfrom,
        name: "recvfrom",
        handler: recvfrom,
        limits: NO_URGENT,
    },
    Entry {
        number: linux::__NR_sendmsg,
        name: "sendmsg",
        handler: sendmsg,
        limits: NO_URGENT,
    },
    Entry {
        number: linux::__NR_recvmsg,
        name: "recvmsg",
        handler: recvmsg,
        limits: NO_URGENT,
    },
    Entry {
        number: linux::__NR_sendmmsg,
        name: "sendmmsg",
        handler: sendmmsg,
        limits: NO_URGENT,
    },
    Entry {
        number: linux::__NR_recvmmsg,
        name: "recvmmsg",
        handler: recvmmsg,
        limits: "returns after the first wait, as with MSG_WAITFORONE",
    },
    Entry {
        number: linux::__NR_shutdown,
        name: "shutdown",
        handler: shutdown,
        limits: "",
    },
    Entry {
        number: linux::__NR_setsockopt,
        name: "setsockopt",
        handler: setsockopt,
        limits: NO_OPTIONS,
    },
    Entry {
        number: linux::__NR_getsockopt,
        name: "getsockopt",
        handler: getsockopt,
        limits: NO_OPTIONS,
    },
];

const NO_URGENT: &str = "no urgent data (MSG_OOB) and no error queue (MSG_ERRQUEUE)";
const NO_OPTIONS: &str =
    "no multicast groups, filters, or timestamps; unknown options give ENOPROTOOPT";

/// Messages of one `sendmmsg` or `recvmmsg` (`UIO_MAXIOV`).
const MAX_MESSAGES: usize = 1024;

/// Longest option value, in bytes.
const MAX_OPTION: usize = 1024;

/// Longest ancillary data, in bytes (Linux's `net.core.optmem_max` is of this order).
const MAX_CONTROL: usize = 20 << 10;

/// The open file of a descriptor that is a socket.
fn open(call: &Call<'_>) -> Result<Arc<OpenFile>> {
    let file = call.process().file(call.int(0))?;
    if file.file.as_socket().is_some() {
        Ok(file)
    } else {
        Err(Errno::ENOTSOCK)
    }
}

/// The socket of an open file that [`open`] gave.
fn as_socket(file: &OpenFile) -> Result<&dyn Socket> {
    file.file.as_socket().ok_or(Errno::ENOTSOCK)
}

fn caller(thread: &Thread, non_blocking: bool) -> Caller {
    let credentials = thread.process.credentials.lock();
    Caller {
        process: thread.process.id,
        uid: credentials.effective_uid(),
        gid: credentials.effective_gid(),
        node: None,
        non_blocking,
    }
}

/// `SOCK_NONBLOCK` and `SOCK_CLOEXEC`, which have the values of `O_NONBLOCK` and `O_CLOEXEC`.
fn flags(raw: u32) -> Result<(OpenFlags, bool)> {
    if raw & !(linux::O_NONBLOCK | linux::O_CLOEXEC) != 0 {
        return Err(Errno::EINVAL);
    }
    let mut open = OpenFlags::READ_WRITE;
    if raw & linux::O_NONBLOCK != 0 {
        open |= OpenFlags::NON_BLOCKING;
    }
    Ok((open, raw & linux::O_CLOEXEC != 0))
}

/// Bits of `socket(2)`'s second argument that are the kind.
const KIND: u32 = 0xf;

fn socket(call: &mut Call<'_>) -> Outcome {
    let kind = call.unsigned(1);
    let (open, close_on_exec) = attempt!(flags(kind & !KIND));
    let file = attempt!(
        call.kernel()
            .net()
            .socket(call.int(0), kind & KIND, call.int(2))
    );
    call.process()
        .add_file(OpenFile::new(file, open), close_on_exec)
        .into()
}

fn socketpair(call: &mut Call<'_>) -> Outcome {
    let kind = call.unsigned(1);
    let (open, close_on_exec) = attempt!(flags(kind & !KIND));
    let who = caller(call.thread, false);
    let (a, b) = attempt!(call.kernel().net().socket_pair(
        call.int(0),
        kind & KIND,
        call.int(2),
        &who
    ));
    let process = call.process();
    let first = attempt!(process.add_file(OpenFile::new(a, open), close_on_exec));
    let result = process
        .add_file(OpenFile::new(b, open), close_on_exec)
        .and_then(|second| {
            user::write(call.raw(3), &[first, second]).inspect_err(|_| forget(process, second))
        });
    if result.is_err() {
        forget(process, first);
    }
    result.into()
}

/// Closes a descriptor that the program never gets to know.
fn forget(process: &Process, descriptor: i32) {
    let removed = process.files.lock().remove(descriptor);
    drop(removed);
}

fn read_address(pointer: u64, length: u64) -> Result<Address> {
    // The length is a C int.
    let length = usize::try_from(length as i32).map_err(|_| Errno::EINVAL)?;
    if length > address::MAX_LENGTH {
        return Err(Errno::EINVAL);
    }
    let mut bytes = [0; address::MAX_LENGTH];
    let bytes = bytes.get_mut(..length).unwrap_or_default();
    UserRange::new(pointer, length as u64)?.read(bytes)?;
    Address::decode(bytes)
}

/// Stores an address for the program: as much as fits, and the length of all of it.
fn write_address(
    file: &OpenFile,
    address: &Address,
    pointer: u64,
    length_pointer: u64,
) -> Result<()> {
    let room: i32 = user::read(length_pointer)?;
    let room = usize::try_from(room).map_err(|_| Errno::EINVAL)?;
    let length = store_address(file, address, pointer, room)?;
    user::write(length_pointer, &length)
}

fn store_address(file: &OpenFile, address: &Address, pointer: u64, room: usize) -> Result<u32> {
    let encoded = address.encode(as_socket(file)?.base().kind.family);
    let bytes = encoded.as_bytes();
    user::write_bytes(
        pointer,
        bytes.get(..bytes.len().min(room)).unwrap_or_default(),
    )?;
    Ok(bytes.len() as u32)
}

/// Finds the node of a Unix path.
fn find_node(call: &Call<'_>, path: &[u8]) -> Result<(u64, u64)> {
    let path = core::str::from_utf8(path).map_err(|_| Errno::EILSEQ)?;
    let view = path::view(call);
    let walk = view.find(&view.working_directory, path, Resolve::FOLLOW)?;
    let metadata = walk.metadata()?;
    if metadata.kind != Kind::Socket {
        return Err(Errno::ECONNREFUSED);
    }
    // Connecting needs write permission (unix(7)).
    view.identity.check(&metadata, 2)?;
    Ok((metadata.device, metadata.inode))
}

/// Resolves what has to be resolved in the file tree before a socket can look for its peer.
fn resolve(call: &Call<'_>, who: &mut Caller, address: &Address) -> Result<()> {
    if let Address::Unix(UnixName::Path(path)) = address {
        who.node = Some(find_node(call, path)?);
    }
    Ok(())
}

fn bind(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let address = attempt!(read_address(call.raw(1), call.raw(2)));
    let socket = attempt!(as_socket(&file));
    let mut who = caller(call.thread, true);
    if let Address::Inet(inet) = &address
        && (1..1024).contains(&inet.port())
        && who.uid != 0
    {
        // The program runs alone: privileged ports protect nobody here, but it may rely on being refused.
        trace::debug!("port {} is bound without privileges", inet.port());
    }
    let Address::Unix(UnixName::Path(path)) = &address else {
        return socket.bind(&who, &address).into();
    };
    let path = attempt!(core::str::from_utf8(path).map_err(|_| Errno::EILSEQ));
    if !matches!(socket.local_address(), Ok(Address::Unix(UnixName::Unnamed))) {
        return Outcome::fail(Errno::EINVAL);
    }
    let view = path::view(call);
    let created = view.create(&view.working_directory, path, Kind::Socket, 0o777, "", 0);
    let node = attempt!(created.map_err(|error| if error == Errno::EEXIST {
        Errno::EADDRINUSE
    } else {
        error
    }));
    let metadata = attempt!(node.metadata());
    who.node = Some((metadata.device, metadata.inode));
    socket.bind(&who, &address).into()
}

fn listen(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let who = caller(call.thread, true);
    attempt!(as_socket(&file)).listen(&who, call.int(1)).into()
}

/// Tries, and waits if that is what the caller wants, at most for the socket's timeout.
fn wait_for(
    kernel: &Arc<Kernel>,
    file: &Arc<OpenFile>,
    interest: Readiness,
    non_blocking: bool,
    mut attempt: impl FnMut() -> Result<usize> + Send + Unpin + 'static,
) -> Outcome {
    match attempt() {
        Err(Errno::EAGAIN) if !non_blocking => wait_on(kernel, file, interest, attempt),
        result => result.into(),
    }
}

/// Waits for a socket, at most for its timeout.
pub(super) fn wait_on(
    kernel: &Arc<Kernel>,
    file: &Arc<OpenFile>,
    interest: Readiness,
    attempt: impl FnMut() -> Result<usize> + Send + Unpin + 'static,
) -> Outcome {
    let timeout = file.file.as_socket().map_or(0, |socket| {
        let options = socket.base().options.lock();
        if interest.contains(Readiness::WRITABLE) {
            options.send_timeout
        } else {
            options.receive_timeout
        }
    });
    let file = Arc::clone(&file.file);
    if timeout == 0 {
        return Outcome::wait(Restart::WithFlag, async move {
            watch::retry(file, interest, attempt)
                .await
                .map(|count| count as u64)
        });
    }
    // With a timeout the call is not made again after a signal (signal(7)).
    let deadline = kernel.clock.monotonic().saturating_add(timeout);
    let kernel = Arc::clone(kernel);
    Outcome::wait(Restart::Never, async move {
        match time::timeout(&kernel, deadline, watch::retry(file, interest, attempt)).await {
            Some(result) => result.map(|count| count as u64),
            None => Err(Errno::EAGAIN),
        }
    })
}

fn accept(call: &mut Call<'_>) -> Outcome {
    accept_with(call, 0)
}

fn accept4(call: &mut Call<'_>) -> Outcome {
    let flags = call.unsigned(3);
    accept_with(call, flags)
}

fn accept_with(call: &mut Call<'_>, raw: u32) -> Outcome {
    let file = attempt!(open(call));
    let (flags, close_on_exec) = attempt!(flags(raw));
    let (pointer, length_pointer) = (call.raw(1), call.raw(2));
    let process = Arc::clone(call.process());
    let listener = Arc::clone(&file);
    let attempt = move || {
        let (accepted, peer) = as_socket(&listener)?.accept()?;
        let accepted = OpenFile::new(accepted, flags);
        if pointer != 0 {
            write_address(&accepted, &peer, pointer, length_pointer)?;
        }
        process
            .add_file(accepted, close_on_exec)
            .map(|descriptor| descriptor as usize)
    };
    wait_for(
        call.kernel(),
        &file,
        Readiness::READABLE,
        file.is_non_blocking(),
        attempt,
    )
}

fn connect(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let address = attempt!(read_address(call.raw(1), call.raw(2)));
    let non_blocking = file.is_non_blocking();
    let mut who = caller(call.thread, non_blocking);
    attempt!(resolve(call, &mut who, &address));
    match attempt!(as_socket(&file)).connect(&who, &address) {
        Err(Errno::EINPROGRESS | Errno::EALREADY) if !non_blocking => {
            let again = Arc::clone(&file);
            let finish = move || as_socket(&again)?.finish_connect().map(|()| 0);
            match wait_for(call.kernel(), &file, Readiness::WRITABLE, false, finish) {
                // A timeout of SO_SNDTIMEO leaves the connect going on.
                Outcome::Wait(future, _) => Outcome::wait(Restart::WithFlag, async move {
                    future.await.map_err(|error| {
                        if error == Errno::EAGAIN {
                            Errno::EINPROGRESS
                        } else {
                            error
                        }
                    })
                }),
                other => other,
            }
        }
        // A full queue of a Unix listener.
        Err(Errno::EAGAIN) if !non_blocking => {
            let again = Arc::clone(&file);
            let connect = move || as_socket(&again)?.connect(&who, &address).map(|()| 0);
            wait_for(call.kernel(), &file, Readiness::WRITABLE, false, connect)
        }
        result => result.into(),
    }
}

fn getsockname(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let address = attempt!(attempt!(as_socket(&file)).local_address());
    write_address(&file, &address, call.raw(1), call.raw(2)).into()
}

fn getpeername(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let address = attempt!(attempt!(as_socket(&file)).peer_address());
    write_address(&file, &address, call.raw(1), call.raw(2)).into()
}

/// Refuses flags that would change the meaning and are not supported.
fn check_flags(flags: u32) -> Result<()> {
    if flags & net::MSG_OOB != 0 {
        trace::warn!("urgent data (MSG_OOB) is not supported");
        return Err(Errno::EOPNOTSUPP);
    }
    Ok(())
}

/// A message to send, taken apart.
struct ToSend {
    source: Source<'static>,
    outgoing: Outgoing,
    who: Caller,
    flags: u32,
}

/// Sends now what can be sent; waits for the rest if the socket is blocking.
fn send(call: &Call<'_>, file: &Arc<OpenFile>, message: ToSend) -> Outcome {
    let ToSend {
        mut source,
        mut outgoing,
        who,
        flags,
    } = message;
    let non_blocking = file.is_non_blocking() || flags & net::MSG_DONTWAIT != 0;
    let socket = attempt!(as_socket(file));
    let stream = socket.is_stream();
    let quiet = flags & net::MSG_NOSIGNAL != 0 || !stream;
    let mut done = 0;
    // Nearly always everything goes at once.
    match socket.send(&who, &mut source, &mut outgoing) {
        Ok(count) if source.remaining() == 0 || non_blocking || !stream => return Ok(count).into(),
        Ok(count) => {
            done = count;
            outgoing.files.clear();
        }
        Err(Errno::EAGAIN) if !non_blocking => {}
        Err(error) => {
            if error == Errno::EPIPE && !quiet {
                call.thread.raise_broken_pipe();
            }
            return Outcome::fail(error);
        }
    }
    let (thread, again) = (Arc::clone(call.thread), Arc::clone(file));
    let progress = Arc::new(AtomicUsize::new(done));
    let told = Arc::clone(&progress);
    let attempt = move || loop {
        match as_socket(&again)?.send(&who, &mut source, &mut outgoing) {
            Ok(count) => {
                done += count;
                progress.store(done, Ordering::Relaxed);
                outgoing.files.clear();
                if source.remaining() == 0 || count == 0 || !stream {
                    return Ok(done);
                }
            }
            // What has been sent must be told: a call that a signal takes back would be made again as a whole.
            Err(Errno::EAGAIN) if done > 0 && is_interrupted(&thread) => return Ok(done),
            Err(Errno::EAGAIN) => return Err(Errno::EAGAIN),
            Err(error) => {
                if error == Errno::EPIPE && !quiet {
                    thread.raise_broken_pipe();
                }
                return if done > 0 { Ok(done) } else { Err(error) };
            }
        }
    };
    match wait_for(call.kernel(), file, Readiness::WRITABLE, false, attempt) {
        // A timeout does not take back what was sent either.
        Outcome::Wait(future, restart) => Outcome::wait(restart, async move {
            match (future.await, told.load(Ordering::Relaxed)) {
                (Err(Errno::EAGAIN), sent @ 1..) => Ok(sent as u64),
                (result, _) => result,
            }
        }),
        other => other,
    }
}

fn sendto(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let flags = call.unsigned(3);
    attempt!(check_flags(flags));
    let range = attempt!(UserRange::new(
        call.raw(1),
        call.raw(2).min(MAX_TRANSFER as u64)
    ));
    let mut outgoing = Outgoing {
        more: flags & net::MSG_MORE != 0,
        ..Outgoing::default()
    };
    let mut who = caller(call.thread, true);
    if call.raw(4) != 0 {
        let to = attempt!(read_address(call.raw(4), call.raw(5)));
        attempt!(resolve(call, &mut who, &to));
        outgoing.to = Some(to);
    }
    send(
        call,
        &file,
        ToSend {
            source: Source::user(range),
            outgoing,
            who,
            flags,
        },
    )
}

/// Ancillary data of a message to send.
fn read_control(
    call: &Call<'_>,
    header: &msghdr,
    who: &Caller,
    outgoing: &mut Outgoing,
) -> Result<()> {
    let length = header.msg_controllen;
    if length == 0 {
        return Ok(());
    }
    if length > MAX_CONTROL {
        return Err(Errno::ENOBUFS);
    }
    let bytes = user::read_bytes(header.msg_control as u64, length)?;
    let mut rest = bytes.as_slice();
    while rest.len() >= size_of::<cmsghdr>() {
        let control: cmsghdr = user::from_bytes(rest).ok_or(Errno::EINVAL)?;
        let size = control.cmsg_len as usize;
        let data = rest.get(size_of::<cmsghdr>()..size).ok_or(Errno::EINVAL)?;
        match (control.cmsg_level, control.cmsg_type as u32) {
            (SOL_SOCKET, net::SCM_RIGHTS) => {
                for number in data.chunks_exact(4) {
                    let number: i32 = user::from_bytes(number).ok_or(Errno::EINVAL)?;
                    if outgoing.files.len() >= MAX_FILES {
                        return Err(Errno::EINVAL);
                    }
                    outgoing.files.push(call.process().file(number)?);
                }
            }
            (SOL_SOCKET, net::SCM_CREDENTIALS) => {
                let given: ucred = user::from_bytes(data).ok_or(Errno::EINVAL)?;
                let own = given.pid == who.process && given.uid == who.uid && given.gid == who.gid;
                if !own && who.uid != 0 {
                    return Err(Errno::EPERM);
                }
                outgoing.credentials = Some((given.pid, given.uid, given.gid));
            }
            (LEVEL_IP, net::IP_PKTINFO) => {
                // struct in_pktinfo: interface, source address, (unused) destination.
                let ip: [u8; 4] = data
                    .get(4..8)
                    .and_then(|ip| ip.first_chunk())
                    .copied()
                    .ok_or(Errno::EINVAL)?;
                outgoing.from = Some(core::net::IpAddr::from(ip)).filter(|ip| !ip.is_unspecified());
            }
            (LEVEL_IPV6, net::IPV6_PKTINFO) => {
                let ip: [u8; 16] = data.first_chunk().copied().ok_or(Errno::EINVAL)?;
                outgoing.from = Some(core::net::IpAddr::from(ip)).filter(|ip| !ip.is_unspecified());
            }
            // How the packet travels: nothing depends on it.
            (LEVEL_IP, net::IP_TOS | net::IP_TTL)
            | (LEVEL_IPV6, net::IPV6_TCLASS | net::IPV6_HOPLIMIT) => {}
            (level, kind) => {
                trace::warn!("ancillary data of level {level} and type {kind} is not supported");
                return Err(Errno::EINVAL);
            }
        }
        rest = rest.get(size.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(())
}

fn read_message(call: &Call<'_>, header: &msghdr, flags: u32) -> Result<ToSend> {
    check_flags(flags)?;
    let ranges = user::read_ranges(header.msg_iov as u64, header.msg_iovlen as u64)?;
    let mut who = caller(call.thread, true);
    let mut outgoing = Outgoing {
        more: flags & net::MSG_MORE != 0,
        ..Outgoing::default()
    };
    if !header.msg_name.is_null() && header.msg_namelen != 0 {
        let to = read_address(header.msg_name as u64, header.msg_namelen as u64)?;
        resolve(call, &mut who, &to)?;
        outgoing.to = Some(to);
    }
    read_control(call, header, &who, &mut outgoing)?;
    Ok(ToSend {
        source: Source::user_vector(&ranges)?,
        outgoing,
        who,
        flags,
    })
}

fn sendmsg(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let header: msghdr = attempt!(user::read(call.raw(1)));
    let message = attempt!(read_message(call, &header, call.unsigned(2)));
    send(call, &file, message)
}

fn sendmmsg(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let count = call.length(2).min(MAX_MESSAGES);
    let flags = call.unsigned(3);
    for index in 0..count {
        let address = call.raw(1) + (index * size_of::<mmsghdr>()) as u64;
        let outcome = match user::read::<mmsghdr>(address)
            .and_then(|one| read_message(call, &one.msg_hdr, flags))
        {
            Ok(message) => send(call, &file, message),
            Err(error) => Outcome::fail(error),
        };
        match outcome {
            Outcome::Done(Ok(sent)) => {
                attempt!(user::write(
                    address + size_of::<msghdr>() as u64,
                    &(sent as u32)
                ));
            }
            // What has been sent counts; the error comes again with the next call.
            Outcome::Done(Err(_)) if index > 0 => return Ok(index).into(),
            Outcome::Wait(..) if index > 0 => return Ok(index).into(),
            Outcome::Wait(future, restart) => {
                // One message at a time: the program sees that one was sent, and calls again.
                return Outcome::wait(restart, async move {
                    let sent = future.await?;
                    user::write(address + size_of::<msghdr>() as u64, &(sent as u32))?;
                    Ok(1)
                });
            }
            other => return other,
        }
    }
    Ok(count).into()
}

fn recvfrom(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let flags = call.unsigned(3);
    attempt!(check_flags(flags));
    let range = attempt!(UserRange::new(
        call.raw(1),
        call.raw(2).min(MAX_TRANSFER as u64)
    ));
    let (pointer, length_pointer) = (call.raw(4), call.raw(5));
    if flags == 0 && pointer == 0 {
        return read_range(call.thread, &file, range);
    }
    let non_blocking = file.is_non_blocking() || flags & net::MSG_DONTWAIT != 0;
    let peek = flags & net::MSG_PEEK != 0;
    let again = Arc::clone(&file);
    let mut gathered = Gathered::new(&file, flags, range.length);
    let attempt = move || {
        let mut sink = Sink::user(range);
        sink.advance(gathered.done);
        let incoming = gathered.receive(&again, &mut sink, peek)?;
        if pointer != 0 {
            match &incoming.from {
                Some(from) => write_address(&again, from, pointer, length_pointer)?,
                // A connection's peer is not told again (recv(2)).
                None => user::write(length_pointer, &0u32)?,
            }
        }
        Ok(if flags & net::MSG_TRUNC != 0 {
            incoming.full_length
        } else {
            incoming.count
        })
    };
    wait_for(
        call.kernel(),
        &file,
        Readiness::READABLE,
        non_blocking,
        attempt,
    )
}

/// A reception that may take several steps (`MSG_WAITALL`).
struct Gathered {
    all: bool,
    wanted: usize,
    done: usize,
}

impl Gathered {
    fn new(file: &OpenFile, flags: u32, wanted: usize) -> Gathered {
        let stream = file.file.as_socket().is_some_and(Socket::is_stream);
        let all = flags & net::MSG_WAITALL != 0 && flags & (net::MSG_PEEK | net::MSG_DONTWAIT) == 0;
        Gathered {
            all: all && stream && !file.is_non_blocking(),
            wanted,
            done: 0,
        }
    }

    fn receive(&mut self, file: &OpenFile, sink: &mut Sink<'_>, peek: bool) -> Result<Incoming> {
        let socket = as_socket(file)?;
        if !self.all {
            return socket.receive(sink, peek);
        }
        loop {
            match socket.receive(sink, peek) {
                Ok(mut incoming) => {
                    self.done += incoming.count;
                    let end = incoming.count == 0 || !incoming.files.is_empty();
                    if end || self.done >= self.wanted {
                        incoming.count = self.done;
                        incoming.full_length = self.done;
                        return Ok(incoming);
                    }
                }
                Err(error) if error != Errno::EAGAIN && self.done > 0 => {
                    return Ok(Incoming::bytes(self.done));
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Ancillary data on its way to the program.
struct ControlWriter {
    bytes: Vec<u8>,
    room: usize,
    truncated: bool,
}

impl ControlWriter {
    /// Bytes that an item's data may have; a header that does not fit is left out.
    fn room_for_data(&self) -> usize {
        self.room
            .saturating_sub(self.bytes.len() + size_of::<cmsghdr>())
    }

    fn put(&mut self, level: i32, kind: u32, data: &[u8]) {
        if self.room < self.bytes.len() + size_of::<cmsghdr>() {
            self.truncated = true;
            return;
        }
        let length = data.len().min(self.room_for_data());
        self.truncated |= length < data.len();
        let header = cmsghdr {
            cmsg_len: (size_of::<cmsghdr>() + length) as _,
            cmsg_level: level,
            cmsg_type: kind as i32,
        };
        self.bytes.extend_from_slice(user::bytes_of(&header));
        self.bytes
            .extend_from_slice(data.get(..length).unwrap_or_default());
        self.bytes.resize(
            self.bytes
                .len()
                .next_multiple_of(8)
                .min(self.room.max(self.bytes.len())),
            0,
        );
    }
}

/// Stores everything that came with a message: address, ancillary data, flags.
fn write_message(
    process: &Process,
    file: &OpenFile,
    header_address: u64,
    header: &msghdr,
    incoming: Incoming,
    flags: u32,
) -> Result<usize> {
    let socket = as_socket(file)?;
    let mut header = *header;
    let mut out_flags = 0;
    if incoming.count < incoming.full_length {
        out_flags |= net::MSG_TRUNC;
    }
    if !header.msg_name.is_null() {
        let room = usize::try_from(header.msg_namelen).map_err(|_| Errno::EINVAL)?;
        header.msg_namelen = match &incoming.from {
            Some(from) => store_address(file, from, header.msg_name as u64, room)?.cast_signed(),
            None => 0,
        };
    }
    let room = if header.msg_control.is_null() {
        0
    } else {
        header.msg_controllen
    };
    let mut control = ControlWriter {
        bytes: Vec::new(),
        room,
        truncated: false,
    };
    let options = socket.base().options.lock();
    let (pass_credentials, info, info_v6) = (
        options.pass_credentials,
        options.packet_info,
        options.packet_info_v6,
    );
    drop(options);
    if pass_credentials {
        let (pid, uid, gid) = incoming.credentials.unwrap_or((0, 65534, 65534));
        control.put(
            SOL_SOCKET,
            net::SCM_CREDENTIALS,
            user::bytes_of(&ucred { pid, uid, gid }),
        );
    }
    if let Some(ip) = incoming.to {
        match ip {
            core::net::IpAddr::V4(ip) if info => {
                let mut data = [0u8; 12];
                data[..4].copy_from_slice(&interface_of(ip.is_loopback()).to_ne_bytes());
                data[4..8].copy_from_slice(&ip.octets());
                data[8..].copy_from_slice(&ip.octets());
                control.put(LEVEL_IP, net::IP_PKTINFO, &data);
            }
            core::net::IpAddr::V6(_) | core::net::IpAddr::V4(_) if info_v6 => {
                let v6 = match ip {
                    core::net::IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    core::net::IpAddr::V6(ip) => ip,
                };
                let mut data = [0u8; 20];
                data[..16].copy_from_slice(&v6.octets());
                data[16..].copy_from_slice(&interface_of(ip.is_loopback()).to_ne_bytes());
                control.put(LEVEL_IPV6, net::IPV6_PKTINFO, &data);
            }
            _ => {}
        }
    }
    if !incoming.files.is_empty() {
        let fitting = control.room_for_data() / 4;
        let close_on_exec = flags & net::MSG_CMSG_CLOEXEC != 0;
        let mut numbers = Vec::new();
        for file in incoming.files.iter().take(fitting) {
            match process.add_file(Arc::clone(file), close_on_exec) {
                Ok(number) => numbers.extend_from_slice(&number.to_ne_bytes()),
                Err(_) => break,
            }
        }
        control.truncated |= numbers.len() / 4 < incoming.files.len();
        if !numbers.is_empty() {
            control.put(SOL_SOCKET, net::SCM_RIGHTS, &numbers);
        }
    }
    if control.truncated {
        out_flags |= net::MSG_CTRUNC;
    }
    if flags & net::MSG_CMSG_CLOEXEC != 0 {
        out_flags |= net::MSG_CMSG_CLOEXEC;
    }
    if !control.bytes.is_empty() {
        user::write_bytes(header.msg_control as u64, &control.bytes)?;
    }
    header.msg_controllen = control.bytes.len() as _;
    header.msg_flags = out_flags;
    user::write(header_address, &header)?;
    Ok(if flags & net::MSG_TRUNC != 0 {
        incoming.full_length
    } else {
        incoming.count
    })
}

/// Index of the interface that datagrams to an own address come through.
fn interface_of(loopback: bool) -> u32 {
    if loopback { 1 } else { 2 }
}

/// An attempt to receive one message into a program's header.
fn receive_attempt(
    call: &Call<'_>,
    file: &Arc<OpenFile>,
    header_address: u64,
    flags: u32,
) -> Result<impl FnMut() -> Result<usize> + Send + Unpin + 'static> {
    check_flags(flags)?;
    if flags & net::MSG_ERRQUEUE != 0 {
        // The queue is always empty.
        return Err(Errno::EAGAIN);
    }
    let header: msghdr = user::read(header_address)?;
    let ranges = user::read_ranges(header.msg_iov as u64, header.msg_iovlen as u64)?;
    let wanted = ranges.iter().map(|range| range.length).sum();
    let mut gathered = Gathered::new(file, flags, wanted);
    let (process, file) = (Arc::clone(call.process()), Arc::clone(file));
    Ok(move || {
        let mut sink = Sink::user_vector(&ranges)?;
        sink.advance(gathered.done);
        let incoming = gathered.receive(&file, &mut sink, flags & net::MSG_PEEK != 0)?;
        let header: msghdr = user::read(header_address)?;
        write_message(&process, &file, header_address, &header, incoming, flags)
    })
}

fn recvmsg(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let flags = call.unsigned(2);
    let non_blocking = file.is_non_blocking() || flags & net::MSG_DONTWAIT != 0;
    let attempt = attempt!(receive_attempt(call, &file, call.raw(1), flags));
    wait_for(
        call.kernel(),
        &file,
        Readiness::READABLE,
        non_blocking,
        attempt,
    )
}

/// `MSG_WAITFORONE`.
const MSG_WAITFORONE: u32 = 0x1_0000;

fn recvmmsg(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let count = call.length(2).min(MAX_MESSAGES);
    let flags = call.unsigned(3) & !MSG_WAITFORONE;
    let non_blocking = file.is_non_blocking() || flags & net::MSG_DONTWAIT != 0;
    let deadline = match call.raw(4) {
        0 => NEVER,
        pointer => {
            let limit = attempt!(
                user::read::<linux::timespec>(pointer).and_then(|t| time::from_timespec(&t))
            );
            call.kernel().clock.monotonic().saturating_add(limit)
        }
    };
    for index in 0..count {
        let address = call.raw(1) + (index * size_of::<mmsghdr>()) as u64;
        let length_address = address + size_of::<msghdr>() as u64;
        let attempt = receive_attempt(call, &file, address, flags);
        let mut attempt = match attempt {
            Ok(attempt) => attempt,
            Err(_) if index > 0 => return Ok(index).into(),
            Err(error) => return Outcome::fail(error),
        };
        match attempt() {
            Ok(received) => attempt!(user::write(length_address, &(received as u32))),
            Err(_) if index > 0 => return Ok(index).into(),
            Err(Errno::EAGAIN) if !non_blocking => {
                let first = move || {
                    let received = attempt()?;
                    user::write(length_address, &(received as u32))?;
                    Ok(1)
                };
                return match wait_on(call.kernel(), &file, Readiness::READABLE, first) {
                    Outcome::Wait(future, restart) if deadline != NEVER => {
                        let kernel = Arc::clone(call.kernel());
                        Outcome::wait(restart, async move {
                            time::timeout(&kernel, deadline, future)
                                .await
                                .unwrap_or(Err(Errno::EAGAIN))
                        })
                    }
                    other => other,
                };
            }
            Err(error) => return Outcome::fail(error),
        }
    }
    Ok(count).into()
}

fn shutdown(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let (read, write) = match call.unsigned(1) {
        net::SHUT_RD => (true, false),
        net::SHUT_WR => (false, true),
        net::SHUT_RDWR => (true, true),
        _ => return Outcome::fail(Errno::EINVAL),
    };
    attempt!(as_socket(&file)).shutdown(read, write).into()
}

fn setsockopt(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let length = attempt!(usize::try_from(call.int(4)).map_err(|_| Errno::EINVAL)).min(MAX_OPTION);
    let mut value = [0; MAX_OPTION];
    let value = value.get_mut(..length).unwrap_or_default();
    attempt!(UserRange::new(call.raw(3), length as u64).and_then(|range| range.read(value)));
    attempt!(as_socket(&file))
        .set_option(call.int(1), call.unsigned(2), value)
        .into()
}

fn getsockopt(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(open(call));
    let room: i32 = attempt!(user::read(call.raw(4)));
    let room = attempt!(usize::try_from(room).map_err(|_| Errno::EINVAL));
    let value = attempt!(attempt!(as_socket(&file)).option(call.int(1), call.unsigned(2)));
    let value = value.get(..value.len().min(room)).unwrap_or_default();
    attempt!(user::write_bytes(call.raw(3), value));
    user::write(call.raw(4), &(value.len() as u32)).into()
}
