//! `poll(2)`, `select(2)` and their relatives.

use alloc::{sync::Arc, vec::Vec};

use linux_raw_sys::general as linux;

use super::{
    Call, Entry, Outcome, Restart, event::deadline_after_milliseconds, event::set_mask,
    file::attempt,
};
use crate::{
    Errno, Kernel, Result,
    file::{
        File, OpenFile, Readiness, Watcher,
        watch::{WakeWatcher, Watch},
    },
    memory::user::{self, UserRange},
    time::{NEVER, from_timespec, from_timeval, timeout, to_timespec, to_timeval},
};

/// The supported calls.
pub const CALLS: &[Entry] = &[
    Entry {
        number: linux::__NR_poll,
        name: "poll",
        handler: poll,
        limits: "",
    },
    Entry {
        number: linux::__NR_ppoll,
        name: "ppoll",
        handler: ppoll,
        limits: "",
    },
    Entry {
        number: linux::__NR_select,
        name: "select",
        handler: select,
        limits: "",
    },
    Entry {
        number: linux::__NR_pselect6,
        name: "pselect6",
        handler: pselect6,
        limits: "",
    },
];

/// `POLLNVAL`.
const INVALID: u16 = linux::EPOLLNVAL as u16;
const READ_NORMAL: u32 = linux::EPOLLRDNORM;
const WRITE_NORMAL: u32 = linux::EPOLLWRNORM;
const READ_BAND: u32 = linux::EPOLLRDBAND;
const WRITE_BAND: u32 = linux::EPOLLWRBAND;

/// One file that is asked for.
struct Asked {
    /// `None` when the descriptor is not open.
    file: Option<Arc<OpenFile>>,
    /// `POLL*`.
    events: u32,
}

/// What a file answers to `events`, in `POLL*`.
fn answer(asked: &Asked) -> u16 {
    let Some(file) = &asked.file else {
        return INVALID;
    };
    let readiness = file.file.readiness();
    let mut bits = readiness.bits();
    // The "normal" kinds are the same as the plain ones.
    if readiness.contains(Readiness::READABLE) {
        bits |= READ_NORMAL;
    }
    if readiness.contains(Readiness::WRITABLE) {
        bits |= WRITE_NORMAL;
    }
    (bits & (asked.events | Readiness::ALWAYS.bits())) as u16
}

fn interest(events: u32) -> Readiness {
    let mut interest = Readiness::from_bits_truncate(events);
    if events & (READ_NORMAL | READ_BAND) != 0 {
        interest |= Readiness::READABLE;
    }
    if events & (WRITE_NORMAL | WRITE_BAND) != 0 {
        interest |= Readiness::WRITABLE;
    }
    interest
}

/// Waits until `attempt` gives something other than zero, trying again whenever one of the files may have become ready.
fn wait_any(
    kernel: &Arc<Kernel>,
    asked: Vec<Asked>,
    deadline: u64,
    mut attempt: impl FnMut(&[Asked], bool) -> Result<usize> + Send + 'static,
) -> Outcome {
    match attempt(&asked, deadline == 0) {
        Ok(0) if deadline != 0 => {}
        result => return result.into(),
    }
    let kernel = Arc::clone(kernel);
    Outcome::wait(Restart::Never, async move {
        let watcher = Arc::new(WakeWatcher::default());
        let _watches: Vec<Watch> = asked
            .iter()
            .filter_map(|asked| {
                let file: &Arc<dyn File> = &asked.file.as_ref()?.file;
                Watch::new(
                    file,
                    interest(asked.events),
                    Arc::clone(&watcher) as Arc<dyn Watcher>,
                )
            })
            .collect();
        let ready = core::future::poll_fn(|context| {
            watcher.set(context.waker());
            match attempt(&asked, false) {
                Ok(0) => core::task::Poll::Pending,
                result => core::task::Poll::Ready(result),
            }
        });
        let result = match timeout(&kernel, deadline, ready).await {
            Some(result) => result,
            None => attempt(&asked, true),
        };
        result.map(|count| count as u64)
    })
}

fn poll_files(call: &Call<'_>, deadline: u64, finish: impl Fn() + Send + 'static) -> Outcome {
    let (address, count) = (call.raw(0), call.raw(1));
    if count > call.process().limit(linux::RLIMIT_NOFILE) {
        return Outcome::fail(Errno::EINVAL);
    }
    let requests: Vec<linux::pollfd> = attempt!(user::read_many(address, count as usize));
    let mut asked = Vec::with_capacity(requests.len());
    // Where the answers go; negative descriptors are passed over, with nothing as the answer.
    let mut places = Vec::with_capacity(requests.len());
    {
        let files = call.process().files.lock();
        for (index, request) in requests.iter().enumerate() {
            if request.fd >= 0 {
                asked.push(Asked {
                    file: files
                        .get(request.fd)
                        .ok()
                        .filter(|file| !is_path(file))
                        .cloned(),
                    events: u32::from(request.events.cast_unsigned()),
                });
                places.push(index);
            }
        }
    }
    let mut requests = requests;
    for request in &mut requests {
        request.revents = 0;
    }
    wait_any(call.kernel(), asked, deadline, move |asked, last| {
        let mut ready = 0;
        for (asked, &place) in asked.iter().zip(&places) {
            let bits = answer(asked);
            if let Some(request) = requests.get_mut(place) {
                request.revents = bits.cast_signed();
            }
            ready += usize::from(bits != 0);
        }
        if ready > 0 || last {
            for (index, request) in requests.iter().enumerate() {
                user::write(address + (index * 8) as u64 + 6, &request.revents)?;
            }
            finish();
        }
        Ok(ready)
    })
}

fn is_path(file: &OpenFile) -> bool {
    file.flags().contains(crate::file::OpenFlags::PATH)
}

fn poll(call: &mut Call<'_>) -> Outcome {
    let deadline = deadline_after_milliseconds(call.kernel(), call.int(2));
    poll_files(call, deadline, || {})
}

/// The deadline that a length of time means.
fn deadline_after(kernel: &Kernel, duration: Option<u64>) -> u64 {
    match duration {
        None => NEVER,
        Some(0) => 0,
        Some(duration) => kernel.clock.monotonic().saturating_add(duration),
    }
}

/// Tells the program how much of its time is left, as Linux does; an address that cannot be written is passed over.
fn tell_rest(
    kernel: &Arc<Kernel>,
    address: u64,
    deadline: u64,
    microseconds: bool,
) -> impl Fn() + Send + 'static {
    let kernel = Arc::clone(kernel);
    move || {
        if address != 0 && deadline != NEVER {
            let rest = deadline.saturating_sub(kernel.clock.monotonic());
            let _ = if microseconds {
                user::write(address, &to_timeval(rest))
            } else {
                user::write(address, &to_timespec(rest))
            };
        }
    }
}

fn read_duration(address: u64) -> Result<Option<u64>> {
    if address == 0 {
        return Ok(None);
    }
    user::read::<linux::timespec>(address)
        .and_then(|time| from_timespec(&time))
        .map(Some)
}

fn ppoll(call: &mut Call<'_>) -> Outcome {
    let address = call.raw(2);
    let duration = attempt!(read_duration(address));
    attempt!(set_mask(call, call.raw(3), call.raw(4)));
    let deadline = deadline_after(call.kernel(), duration);
    poll_files(
        call,
        deadline,
        tell_rest(call.kernel(), address, deadline, false),
    )
}

const SET_BITS: usize = 64;
/// Highest number of descriptors in a set that is looked at.
const SET_LIMIT: usize = 1 << 20;

/// Which of the three sets a descriptor is in, as bits 0 (read), 1 (write), 2 (exceptional).
fn select_files(call: &Call<'_>, deadline: u64, finish: impl Fn() + Send + 'static) -> Outcome {
    let count = attempt!(usize::try_from(call.int(0)).map_err(|_| Errno::EINVAL)).min(SET_LIMIT);
    let words = count.div_ceil(SET_BITS);
    let addresses = [call.raw(1), call.raw(2), call.raw(3)];
    let mut sets: [Vec<u64>; 3] = Default::default();
    for (set, &address) in sets.iter_mut().zip(&addresses) {
        if address != 0 {
            *set = attempt!(user::read_many(address, words));
        }
    }
    const EVENTS: [u32; 3] = [linux::EPOLLIN, linux::EPOLLOUT, linux::EPOLLPRI];
    let mut asked = Vec::new();
    let mut numbers = Vec::new();
    {
        let files = call.process().files.lock();
        for number in 0..count {
            let (word, bit) = (number / SET_BITS, 1u64 << (number % SET_BITS));
            let mut events = 0;
            for (set, event) in sets.iter().zip(EVENTS) {
                if set.get(word).is_some_and(|word| word & bit != 0) {
                    events |= event;
                }
            }
            if events != 0 {
                let file = attempt!(files.get(number as i32).cloned());
                asked.push(Asked {
                    file: Some(file),
                    events,
                });
                numbers.push(number);
            }
        }
    }
    for (set, &address) in sets.iter().zip(&addresses) {
        attempt!(UserRange::new(address, (set.len() * 8) as u64));
    }
    wait_any(call.kernel(), asked, deadline, move |asked, last| {
        let mut answers: [Vec<u64>; 3] = core::array::from_fn(|_| alloc::vec![0; words]);
        let mut ready = 0;
        for (asked, &number) in asked.iter().zip(&numbers) {
            let bits = u32::from(answer(asked));
            let (word, bit) = (number / SET_BITS, 1u64 << (number % SET_BITS));
            let readable = bits & (linux::EPOLLIN | linux::EPOLLHUP | linux::EPOLLERR) != 0;
            let writable = bits & (linux::EPOLLOUT | linux::EPOLLERR) != 0;
            let exceptional = bits & linux::EPOLLPRI != 0;
            for ((answers, event), is_ready) in
                answers
                    .iter_mut()
                    .zip(EVENTS)
                    .zip([readable, writable, exceptional])
            {
                if is_ready
                    && asked.events & event != 0
                    && let Some(word) = answers.get_mut(word)
                {
                    *word |= bit;
                    ready += 1;
                }
            }
        }
        if ready > 0 || last {
            for (answers, &address) in answers.iter().zip(&addresses) {
                if address != 0 {
                    for (index, word) in answers.iter().enumerate() {
                        user::write(address + (index * 8) as u64, word)?;
                    }
                }
            }
            finish();
        }
        Ok(ready)
    })
}

fn select(call: &mut Call<'_>) -> Outcome {
    let address = call.raw(4);
    let duration = match address {
        0 => None,
        address => Some(attempt!(
            user::read::<linux::timeval>(address).and_then(|time| from_timeval(&time))
        )),
    };
    let deadline = deadline_after(call.kernel(), duration);
    select_files(
        call,
        deadline,
        tell_rest(call.kernel(), address, deadline, true),
    )
}

fn pselect6(call: &mut Call<'_>) -> Outcome {
    let address = call.raw(4);
    let duration = attempt!(read_duration(address));
    if call.raw(5) != 0 {
        // Address and size of the set, as one argument.
        let [mask, size]: [u64; 2] = attempt!(user::read(call.raw(5)));
        attempt!(set_mask(call, mask, size));
    }
    let deadline = deadline_after(call.kernel(), duration);
    select_files(
        call,
        deadline,
        tell_rest(call.kernel(), address, deadline, false),
    )
}
