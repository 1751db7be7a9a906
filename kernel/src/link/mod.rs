//! The kernel's end of the line to the monitor (see [`kiln_abi::link`] for the form of what travels).
//!
//! For: control messages both ways, descriptors that come along, and synchronous FUSE requests of volumes.
//! Not for: what the messages mean. A [`Receiver`] gets the control messages, a volume gets its replies.
//!
//! What always holds:
//! * The receiver runs from the main loop only, never from inside a request, and with no lock of the link held.
//! * Nothing that the monitor sends makes the kernel panic: what cannot be understood is logged and dropped; a stream that
//!   cannot be cut into frames any more is closed.
//! * The log's lines may be sent from anywhere, the link's own code included.
//! * Frames leave in the order of the calls. What the stream does not take at once waits in a queue, which is sent on the
//!   stream's next event.

mod frame;
mod stream;

use alloc::{collections::VecDeque, string::String, sync::Arc, vec::Vec};

use kiln_abi::{
    host::{Event, event_flags},
    link::{CONTROL, MAX_PAYLOAD, ToKernel, ToMonitor, header},
};

use crate::{
    Errno, Result,
    event::{EventHandler, Events},
    host::Host,
    sync::Mutex,
    trace,
};

pub use stream::{ByteStream, DescriptorStream};

use frame::FrameReader;

/// Frames that may wait before the log's lines wait for them to leave.
const MANY_WAITING: usize = 64;

/// Descriptors that one receive takes at most.
const DESCRIPTORS: usize = 16;

/// A descriptor of the host that the monitor handed over; closed when dropped, unless taken with
/// [`HostDescriptor::into_raw`].
pub struct HostDescriptor {
    host: Host,
    number: i32,
}

impl HostDescriptor {
    /// Takes the ownership of `number`.
    #[must_use]
    pub fn new(host: Host, number: i32) -> HostDescriptor {
        HostDescriptor { host, number }
    }

    /// The number; the caller now owns the descriptor.
    #[must_use]
    pub fn into_raw(self) -> i32 {
        let number = self.number;
        core::mem::forget(self);
        number
    }
}

impl Drop for HostDescriptor {
    fn drop(&mut self) {
        // Nothing can be done about a failure, and the number is free in any case (close(2)).
        let _ = self.host.descriptor_close(self.number);
    }
}

/// Who gets the monitor's control messages.
pub trait Receiver: Send + Sync {
    /// A message came, with its descriptor if its kind has one.
    fn receive(&self, message: ToKernel, descriptor: Option<HostDescriptor>);

    /// The monitor has gone: the stream ended or broke. Called once.
    fn disconnected(&self);
}

struct State {
    reader: FrameReader,
    /// Descriptors that came and whose message has not been read yet.
    descriptors: VecDeque<HostDescriptor>,
    /// Control frames that were read inside of a request.
    control: VecDeque<ToKernel>,
    /// Replies for volumes that nobody has taken yet: channel and payload.
    replies: VecDeque<(u32, Vec<u8>)>,
    /// What the stream has not taken yet, and how much of its start has been sent.
    outgoing: VecDeque<Vec<u8>>,
    sent: usize,
    broken: bool,
    announced: bool,
}

/// The line to the monitor.
pub struct Link {
    stream: Arc<dyn ByteStream>,
    host: Host,
    events: Arc<Events>,
    state: Mutex<State>,
    receiver: Mutex<Option<Arc<dyn Receiver>>>,
    /// Lines for the log that the link's own code wrote in the middle of its work; they leave with what is sent next.
    late: Mutex<Vec<String>>,
}

impl Link {
    /// A link over `stream`, registered for the stream's events.
    #[must_use]
    pub fn new(stream: Arc<dyn ByteStream>, host: Host, events: &Arc<Events>) -> Arc<Link> {
        let source = stream.source();
        let link = Arc::new(Link {
            stream,
            host,
            events: Arc::clone(events),
            state: Mutex::new(State {
                reader: FrameReader::default(),
                descriptors: VecDeque::new(),
                control: VecDeque::new(),
                replies: VecDeque::new(),
                outgoing: VecDeque::new(),
                sent: 0,
                broken: false,
                announced: false,
            }),
            receiver: Mutex::new(None),
            late: Mutex::new(Vec::new()),
        });
        events.register(source, Arc::clone(&link) as Arc<dyn EventHandler>);
        // What came before the registration makes no event any more.
        events.defer(Event {
            source,
            flags: event_flags::READABLE,
        });
        link
    }

    /// Sets who gets control messages; those that came earlier are delivered by the next event.
    pub fn set_receiver(&self, receiver: Arc<dyn Receiver>) {
        *self.receiver.lock() = Some(receiver);
        self.wake();
    }

    /// Has the main loop look at the link again.
    fn wake(&self) {
        self.events.defer(Event {
            source: self.stream.source(),
            flags: event_flags::READABLE,
        });
    }

    /// Sends a control message. When the monitor has gone it is dropped: [`Receiver::disconnected`] tells.
    pub fn send(&self, message: &ToMonitor) {
        match postcard::to_allocvec(message) {
            Ok(bytes) => {
                let _ = self.post(CONTROL, &[&bytes]);
            }
            Err(error) => trace::warn!("link: a message to the monitor cannot be encoded: {error}"),
        }
    }

    /// Sends a frame that has no answer (a control message, FUSE's `FORGET`).
    ///
    /// # Errors
    /// `EMSGSIZE` when the payload is longer than the protocol allows, `EIO` when the monitor has gone.
    pub fn post(&self, channel: u32, parts: &[&[u8]]) -> Result<()> {
        let frame = frame_of(channel, parts)?;
        let mut state = self.state.lock();
        if state.broken {
            return Err(Errno::EIO);
        }
        self.queue_late(&mut state);
        state.outgoing.push_back(frame);
        self.flush(&mut state);
        if state.broken {
            Err(Errno::EIO)
        } else {
            Ok(())
        }
    }

    /// Sends lines for the instance's log. False when the monitor has gone: nobody would see them.
    pub fn log(&self, text: &str) -> bool {
        let Some(mut state) = self.state.try_lock() else {
            self.late.lock().push(text.into());
            return true;
        };
        if state.broken {
            return false;
        }
        self.late.lock().push(text.into());
        self.flush(&mut state);
        let (sent, many) = (!state.broken, state.outgoing.len() > MANY_WAITING);
        drop(state);
        if many {
            self.drain();
        }
        sent
    }

    /// Waits until all that was sent has been taken, so that the instance can end without losing it, or the monitor has gone.
    pub fn drain(&self) {
        // Without a monitor there is nothing to wait for.
        let _ = self.pump(|state| (state.outgoing.is_empty() && self.stream.taken()).then_some(()));
    }

    /// Sends a FUSE request on a volume's channel and waits for the reply with the same `unique` (bytes 8 to 16 of both,
    /// `struct fuse_in_header` and `struct fuse_out_header` of `linux/fuse.h`). Everything else that happens
    /// meanwhile is kept for the main loop.
    ///
    /// # Errors
    /// As [`Link::post`]; `EINVAL` for a request that is too short to have a `unique`.
    pub fn call(&self, channel: u32, parts: &[&[u8]]) -> Result<Vec<u8>> {
        let mut start = [0u8; 16];
        let mut have = 0;
        for byte in parts.iter().flat_map(|part| part.iter()).take(start.len()) {
            start[have] = *byte;
            have += 1;
        }
        if have < start.len() || channel == CONTROL {
            return Err(Errno::EINVAL);
        }
        let unique = &start[8..];
        self.post(channel, parts)?;
        self.pump(|state| {
            while let Some(index) = state.replies.iter().position(|reply| reply.0 == channel) {
                let (_, payload) = state.replies.remove(index)?;
                if payload.get(8..16) == Some(unique) {
                    return Some(payload);
                }
                trace::warn!("link: a reply on channel {channel} answers no request; dropped");
            }
            None
        })
    }

    /// Sends a control message and waits for the one that `matches`; its descriptor comes along. Everything else that
    /// happens meanwhile is kept for the main loop.
    ///
    /// # Errors
    /// `EIO` when the monitor has gone.
    pub fn request(
        &self,
        message: &ToMonitor,
        mut matches: impl FnMut(&ToKernel) -> bool,
    ) -> Result<(ToKernel, Option<HostDescriptor>)> {
        self.send(message);
        self.pump(|state| {
            let index = state.control.iter().position(&mut matches)?;
            // Descriptors belong to messages in order: those of the messages before stay in front.
            let before = state
                .control
                .iter()
                .take(index)
                .filter(|message| carries_descriptor(message))
                .count();
            let message = state.control.remove(index)?;
            let descriptor = if carries_descriptor(&message) {
                state.descriptors.remove(before)
            } else {
                None
            };
            Some((message, descriptor))
        })
    }

    /// Receives until `found` gives something.
    fn pump<T>(&self, found: impl FnMut(&mut State) -> Option<T>) -> Result<T> {
        let mut ticked = false;
        let result = self.pump_until(found, &mut ticked);
        self.events.resume(ticked);
        result
    }

    fn pump_until<T>(
        &self,
        mut found: impl FnMut(&mut State) -> Option<T>,
        ticked: &mut bool,
    ) -> Result<T> {
        let source = self.stream.source();
        let mut events = [Event::default(); 64];
        loop {
            let mut state = self.state.lock();
            self.flush(&mut state);
            self.fill(&mut state);
            let result = found(&mut state);
            let (left, broken) = (
                !state.control.is_empty() || !state.outgoing.is_empty(),
                state.broken,
            );
            drop(state);
            if let Some(result) = result {
                if left || broken {
                    self.wake();
                }
                return Ok(result);
            }
            if broken {
                self.wake();
                return Err(Errno::EIO);
            }
            let count = self.events.wait_inside(&self.host, &mut events, ticked);
            for event in events.iter().take(count) {
                if event.source == source {
                    self.stream.acknowledge(*event);
                } else {
                    self.events.defer(*event);
                }
            }
        }
    }

    /// Puts the lines that the link's own code wrote behind what waits.
    fn queue_late(&self, state: &mut State) {
        for text in core::mem::take(&mut *self.late.lock()) {
            let frame = postcard::to_allocvec(&ToMonitor::Log(text))
                .map_err(|_| Errno::EINVAL)
                .and_then(|bytes| frame_of(CONTROL, &[&bytes]));
            state.outgoing.extend(frame);
        }
    }

    /// Sends what waits, as far as the stream takes it.
    fn flush(&self, state: &mut State) {
        self.queue_late(state);
        while let Some(front) = state.outgoing.front() {
            match self
                .stream
                .send(front.get(state.sent..).unwrap_or_default())
            {
                Ok(count) => {
                    state.sent += count;
                    if state.sent >= front.len() {
                        state.outgoing.pop_front();
                        state.sent = 0;
                    } else if count == 0 {
                        return;
                    }
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Err(error) => {
                    self.fail(state, error);
                    return;
                }
            }
        }
    }

    fn fail(&self, state: &mut State, error: Errno) {
        if !state.broken {
            trace::console(format_args!(
                "link: the line to the monitor is gone ({error})"
            ));
            state.broken = true;
            state.outgoing.clear();
        }
    }

    /// Receives what there is and cuts it into frames.
    fn fill(&self, state: &mut State) {
        while !state.broken {
            let mut descriptors = [-1; DESCRIPTORS];
            let room = state.reader.space();
            let asked = room.len();
            let (count, descriptor_count) = match self.stream.receive(room, &mut descriptors) {
                Ok((0, _)) => return self.fail(state, Errno::EPIPE),
                Ok(counts) => counts,
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => continue,
                Err(error) => return self.fail(state, error),
            };
            for &number in descriptors.iter().take(descriptor_count) {
                state
                    .descriptors
                    .push_back(HostDescriptor::new(self.host, number));
            }
            state.reader.filled(count);
            loop {
                match state.reader.next_frame() {
                    Ok(Some((CONTROL, payload))) => match postcard::from_bytes::<ToKernel>(payload)
                    {
                        Ok(message) => state.control.push_back(message),
                        Err(error) => trace::warn!(
                            "link: a message of the monitor cannot be decoded: {error}"
                        ),
                    },
                    Ok(Some((channel, payload))) => {
                        let reply = (channel, payload.to_vec());
                        state.replies.push_back(reply);
                    }
                    Ok(None) => break,
                    Err(length) => {
                        trace::console(format_args!(
                            "link: the monitor announces a frame of {length} bytes, more than allowed"
                        ));
                        return self.fail(state, Errno::EPROTO);
                    }
                }
            }
            // A short count may also be the boundary at which descriptors travel, so only `EAGAIN` ends the loop,
            // except when there was room for more and no descriptor: then the stream was drained, and more makes an event.
            if count < asked && descriptor_count == 0 && self.stream.short_means_drained() {
                return;
            }
        }
    }

    /// The next control message with its descriptor.
    fn next_control(&self, state: &mut State) -> Option<(ToKernel, Option<HostDescriptor>)> {
        let message = state.control.pop_front()?;
        let descriptor = if carries_descriptor(&message) {
            state.descriptors.pop_front()
        } else {
            None
        };
        Some((message, descriptor))
    }

    /// Delivers control messages.
    fn deliver(&self) {
        let Some(receiver) = self.receiver.lock().clone() else {
            return;
        };
        loop {
            let mut state = self.state.lock();
            let next = self.next_control(&mut state);
            let gone = state.broken && !state.announced && next.is_none();
            state.announced |= gone;
            drop(state);
            if let Some((message, descriptor)) = next {
                receiver.receive(message, descriptor);
                continue;
            }
            if gone {
                receiver.disconnected();
            }
            return;
        }
    }
}

/// A header with what follows it.
fn frame_of(channel: u32, parts: &[&[u8]]) -> Result<Vec<u8>> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let length = u32::try_from(length)
        .ok()
        .filter(|&length| length <= MAX_PAYLOAD)
        .ok_or(Errno::EMSGSIZE)?;
    let mut frame = Vec::with_capacity(kiln_abi::link::HEADER + length as usize);
    frame.extend_from_slice(&header(channel, length));
    for part in parts {
        frame.extend_from_slice(part);
    }
    Ok(frame)
}

/// Whether a descriptor comes along with a message.
fn carries_descriptor(message: &ToKernel) -> bool {
    match message {
        ToKernel::Accepted { .. } => true,
        ToKernel::Connected { result, .. } => result.is_ok(),
        ToKernel::Datagram { result, .. } => result.is_ok(),
        ToKernel::Signal { .. } | ToKernel::Input(_) | ToKernel::Activity => false,
    }
}

impl EventHandler for Link {
    fn handle(&self, event: Event) {
        self.stream.acknowledge(event);
        let mut state = self.state.lock();
        self.flush(&mut state);
        self.fill(&mut state);
        drop(state);
        self.deliver();
    }
}

#[cfg(test)]
mod tests;
