//! The link against a monitor made of two queues.

use super::*;

use alloc::vec;
use kiln_abi::link::HEADER;

/// A stream whose other end is the test.
#[derive(Default)]
struct Fake {
    /// Pieces to be received: bytes and descriptors.
    incoming: Mutex<VecDeque<(Vec<u8>, Vec<i32>)>>,
    outgoing: Mutex<Vec<u8>>,
    /// Bytes taken by one send.
    room: Mutex<usize>,
    ended: Mutex<bool>,
    /// Answers to what is sent, made when something is sent.
    answer: Mutex<Vec<Vec<u8>>>,
}

impl ByteStream for Fake {
    fn source(&self) -> u32 {
        3
    }

    fn receive(&self, bytes: &mut [u8], descriptors: &mut [i32]) -> Result<(usize, usize)> {
        let mut incoming = self.incoming.lock();
        let Some((piece, numbers)) = incoming.front_mut() else {
            return if *self.ended.lock() {
                Ok((0, 0))
            } else {
                Err(Errno::EAGAIN)
            };
        };
        let count = piece.len().min(bytes.len());
        bytes[..count].copy_from_slice(&piece[..count]);
        piece.drain(..count);
        let given = numbers.len();
        descriptors[..given].copy_from_slice(numbers);
        numbers.clear();
        if piece.is_empty() {
            incoming.pop_front();
        }
        Ok((count, given))
    }

    fn send(&self, bytes: &[u8]) -> Result<usize> {
        let room = *self.room.lock();
        if room == 0 {
            return Err(Errno::EAGAIN);
        }
        let count = bytes.len().min(room);
        self.outgoing.lock().extend_from_slice(&bytes[..count]);
        for answer in self.answer.lock().drain(..) {
            self.incoming.lock().push_back((answer, Vec::new()));
        }
        Ok(count)
    }
}

#[derive(Default)]
struct Heard {
    messages: Mutex<Vec<(ToKernel, Option<i32>)>>,
    gone: Mutex<u32>,
}

impl Receiver for Heard {
    fn receive(&self, message: ToKernel, descriptor: Option<HostDescriptor>) {
        self.messages
            .lock()
            .push((message, descriptor.map(HostDescriptor::into_raw)));
    }

    fn disconnected(&self) {
        *self.gone.lock() += 1;
    }
}

fn frame(channel: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(channel, payload.len() as u32).to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

fn control(message: &ToKernel) -> Vec<u8> {
    frame(CONTROL, &postcard::to_allocvec(message).unwrap())
}

fn setup() -> (Arc<Fake>, Arc<Events>, Arc<Link>, Arc<Heard>) {
    let fake = Arc::new(Fake {
        room: Mutex::new(usize::MAX),
        ..Fake::default()
    });
    let events = Arc::new(Events::new());
    let link = Link::new(fake.clone(), Host::new(&crate::host::quiet::TABLE), &events);
    let heard = Arc::new(Heard::default());
    link.set_receiver(heard.clone());
    (fake, events, link, heard)
}

fn accepted() -> ToKernel {
    ToKernel::Accepted {
        local: "1.2.3.4:5".parse().unwrap(),
        peer: "6.7.8.9:10".parse().unwrap(),
    }
}

#[test]
fn messages_come_in_order_with_their_descriptors_however_they_are_cut() {
    for step in 1..40 {
        let (fake, events, _link, heard) = setup();
        let mut bytes = Vec::new();
        for message in [
            ToKernel::Signal { signal: 15 },
            accepted(),
            ToKernel::Input(vec![1, 2]),
            accepted(),
        ] {
            bytes.extend(control(&message));
        }
        for (index, piece) in bytes.chunks(step).enumerate() {
            let numbers = if index == 0 { vec![70, 71] } else { Vec::new() };
            fake.incoming.lock().push_back((piece.to_vec(), numbers));
        }
        events.dispatch_deferred();
        let heard = heard.messages.lock();
        assert_eq!(heard.len(), 4);
        assert_eq!(heard[1], (accepted(), Some(70)));
        assert_eq!(heard[2], (ToKernel::Input(vec![1, 2]), None));
        assert_eq!(heard[3], (accepted(), Some(71)));
    }
}

#[test]
fn a_request_waits_for_its_own_reply_and_keeps_the_rest() {
    let (fake, events, link, heard) = setup();
    events.dispatch_deferred();
    let mut request = vec![0u8; 40];
    request[8..16].copy_from_slice(&9u64.to_le_bytes());
    let mut other = vec![0u8; 16];
    other[8..16].copy_from_slice(&8u64.to_le_bytes());
    let mut reply = vec![0u8; 50];
    reply[8..16].copy_from_slice(&9u64.to_le_bytes());
    *fake.answer.lock() = vec![
        control(&ToKernel::Signal { signal: 1 }),
        frame(2, &other),
        frame(3, &reply),
        frame(2, &reply),
    ];
    assert_eq!(
        link.call(2, &[&request[..10], &request[10..]]).unwrap(),
        reply
    );
    assert!(
        heard.messages.lock().is_empty(),
        "nothing is delivered from inside a request"
    );
    assert!(events.has_deferred());
    events.dispatch_deferred();
    assert_eq!(heard.messages.lock().len(), 1);
    assert_eq!(*fake.outgoing.lock(), frame(2, &request));
    assert_eq!(link.call(2, &[&[1, 2]]), Err(Errno::EINVAL));
}

#[test]
fn what_the_stream_does_not_take_waits() {
    let (fake, events, link, _heard) = setup();
    *fake.room.lock() = 0;
    link.send(&ToMonitor::Started { uptime: 7 });
    link.post(1, &[&[7; 100]]).unwrap();
    assert!(fake.outgoing.lock().is_empty());
    *fake.room.lock() = 7;
    events.dispatch(Event {
        source: 3,
        flags: event_flags::WRITABLE,
    });
    let expected = [
        frame(
            CONTROL,
            &postcard::to_allocvec(&ToMonitor::Started { uptime: 7 }).unwrap(),
        ),
        frame(1, &[7; 100]),
    ]
    .concat();
    assert_eq!(*fake.outgoing.lock(), expected);
    assert_eq!(
        link.post(1, &[&vec![0; MAX_PAYLOAD as usize + 1]]),
        Err(Errno::EMSGSIZE)
    );
}

#[test]
fn the_end_is_told_once_and_fails_requests() {
    let (fake, events, link, heard) = setup();
    fake.incoming
        .lock()
        .push_back((control(&ToKernel::Signal { signal: 2 }), Vec::new()));
    *fake.ended.lock() = true;
    assert_eq!(link.call(1, &[&[0; 16]]), Err(Errno::EIO));
    events.dispatch_deferred();
    events.dispatch(Event {
        source: 3,
        flags: 1,
    });
    assert_eq!(heard.messages.lock().len(), 1);
    assert_eq!(*heard.gone.lock(), 1);
    assert_eq!(link.post(1, &[&[1]]), Err(Errno::EIO));
}

#[test]
fn noise_is_dropped_or_ends_the_link_but_never_panics() {
    let mut state = 0x1234_5678_9abc_def1u64;
    for round in 0..2000 {
        let (fake, events, _link, _heard) = setup();
        for _ in 0..6 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let length = (state % 97) as usize;
            let noise: Vec<u8> = (0..length)
                .map(|index| (state >> (index % 57)) as u8)
                .collect();
            // Half of the time a well-formed frame with noise inside, on a low channel.
            let piece = if state.is_multiple_of(2) {
                noise
            } else {
                frame((state >> 60) as u32, &noise)
            };
            let numbers = if round % 3 == 0 { vec![99] } else { Vec::new() };
            fake.incoming.lock().push_back((piece, numbers));
        }
        events.dispatch_deferred();
    }
    let (fake, events, link, heard) = setup();
    fake.incoming
        .lock()
        .push_back((header(0, MAX_PAYLOAD + 1).to_vec(), Vec::new()));
    events.dispatch_deferred();
    assert_eq!(*heard.gone.lock(), 1);
    assert_eq!(link.post(0, &[&[]]), Err(Errno::EIO));
}

#[test]
fn a_frame_larger_than_the_buffer_is_put_together() {
    let (fake, events, link, _heard) = setup();
    events.dispatch_deferred();
    let mut reply = vec![5u8; 1 << 20];
    reply[8..16].copy_from_slice(&[0; 8]);
    *fake.answer.lock() = vec![frame(1, &reply)];
    assert_eq!(link.call(1, &[&[0; HEADER * 2]]).unwrap(), reply);
}

fn lines(bytes: &[u8]) -> Vec<String> {
    let mut reader = FrameReader::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        let room = reader.space();
        let (piece, after) = rest.split_at(rest.len().min(room.len()));
        room[..piece.len()].copy_from_slice(piece);
        reader.filled(piece.len());
        rest = after;
    }
    let mut lines = Vec::new();
    while let Ok(Some((channel, payload))) = reader.next_frame() {
        assert_eq!(channel, CONTROL);
        match postcard::from_bytes(payload) {
            Ok(ToMonitor::Log(text)) => lines.push(text),
            Ok(ToMonitor::Exited { code }) => lines.push(alloc::format!("exit {code}")),
            other => panic!("{other:?}"),
        }
    }
    lines
}

#[test]
fn lines_of_the_log_leave_in_order_also_those_said_while_the_link_works() {
    let (fake, _events, link, _heard) = setup();
    assert!(link.log("one"));
    let state = link.state.lock();
    assert!(link.log("two"));
    assert!(link.log("three"));
    drop(state);
    link.send(&ToMonitor::Exited { code: 3 });
    link.drain();
    assert_eq!(
        lines(&fake.outgoing.lock()),
        ["one", "two", "three", "exit 3"]
    );
}

#[test]
fn what_waits_has_left_after_drain() {
    let (fake, _events, link, _heard) = setup();
    *fake.room.lock() = 0;
    for _ in 0..MANY_WAITING {
        assert!(link.log("line"));
    }
    assert!(fake.outgoing.lock().is_empty());
    *fake.room.lock() = 7;
    link.drain();
    assert_eq!(lines(&fake.outgoing.lock()).len(), MANY_WAITING);
}

#[test]
fn without_a_monitor_a_line_is_not_taken() {
    let (fake, events, link, heard) = setup();
    *fake.ended.lock() = true;
    events.defer(Event {
        source: 3,
        flags: event_flags::READABLE,
    });
    events.wait(&Host::new(&crate::host::quiet::TABLE), 0);
    assert_eq!(*heard.gone.lock(), 1);
    assert!(!link.log("nobody sees it"));
    link.drain();
}

/// As long as a tick is pending the host does not wait: a request that did not take note of it would keep the processor busy.
#[test]
fn a_tick_during_a_request_is_noted_once_and_kept_for_later() {
    use core::sync::atomic::{AtomicU32, Ordering};
    let flag: &'static AtomicU32 = alloc::boxed::Box::leak(alloc::boxed::Box::default());
    let events = Events::new();
    events.set_pending_flag(flag);
    let host = Host::new(&crate::host::quiet::TABLE);
    let mut ticked = false;
    flag.store(1, Ordering::Relaxed);
    for _ in 0..2 {
        events.wait_inside(&host, &mut [Event::default()], &mut ticked);
        assert!(ticked);
        assert_eq!(flag.load(Ordering::Relaxed), 0);
    }
    events.resume(ticked);
    assert_eq!(flag.load(Ordering::Relaxed), 1);
}
