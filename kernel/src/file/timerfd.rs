//! Timers as files: `timerfd_create(2)`.

use alloc::{
    string::String,
    sync::{Arc, Weak},
    task::Wake,
};
use core::{
    any::Any,
    future::Future,
    pin::Pin,
    task::{Context, Waker},
};

use super::{File, OpenFlags, Readiness, Sink, WatchList, anonymous_metadata};
use crate::{
    Errno, Kernel, Result,
    fs::{Kind, Metadata},
    sync::Mutex,
    time::{self, Sleep},
};

struct Setting {
    /// Monotonic time of the next expiration; `None` when disarmed.
    deadline: Option<u64>,
    /// Between expirations; 0 for one only.
    interval: u64,
    /// Wakes the watchers at the deadline.
    sleep: Option<Sleep>,
}

/// A timer that can be read and waited for.
pub struct TimerFile {
    this: Weak<TimerFile>,
    kernel: Arc<Kernel>,
    /// Whether times given to it are of the wall clock.
    realtime: bool,
    setting: Mutex<Setting>,
    watchers: WatchList,
}

/// Time until the next expiration and interval, in nanoseconds; 0 when disarmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimerValue {
    /// Until the next expiration.
    pub remaining: u64,
    /// Between expirations.
    pub interval: u64,
}

struct Alarm(Weak<TimerFile>);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        if let Some(timer) = self.0.upgrade() {
            timer.watchers.notify(Readiness::READABLE);
        }
    }
}

impl TimerFile {
    /// A disarmed timer.
    #[must_use]
    pub fn new(kernel: &Arc<Kernel>, realtime: bool) -> Arc<TimerFile> {
        Arc::new_cyclic(|this| TimerFile {
            this: Weak::clone(this),
            kernel: Arc::clone(kernel),
            realtime,
            setting: Mutex::new(Setting {
                deadline: None,
                interval: 0,
                sleep: None,
            }),
            watchers: WatchList::new(),
        })
    }

    /// Whether times given to it are of the wall clock.
    #[must_use]
    pub fn is_realtime(&self) -> bool {
        self.realtime
    }

    /// Arms it for a monotonic time, or disarms it. Returns what was set before.
    pub fn set(&self, deadline: Option<u64>, interval: u64) -> TimerValue {
        let before = self.value();
        {
            let mut setting = self.setting.lock();
            setting.deadline = deadline;
            setting.interval = interval;
        }
        self.arm();
        before
    }

    /// What is set.
    #[must_use]
    pub fn value(&self) -> TimerValue {
        let now = self.kernel.clock.monotonic();
        let setting = self.setting.lock();
        let Some(deadline) = setting.deadline else {
            return TimerValue::default();
        };
        let remaining = if deadline > now {
            deadline - now
        } else if setting.interval > 0 {
            setting.interval - (now - deadline) % setting.interval
        } else {
            0
        };
        TimerValue {
            remaining,
            interval: setting.interval,
        }
    }

    /// Sees to it that the watchers hear of the next deadline.
    fn arm(&self) {
        let mut setting = self.setting.lock();
        setting.sleep = None;
        let Some(deadline) = setting.deadline else {
            return;
        };
        let mut sleep = time::sleep_until(&self.kernel, deadline);
        drop(setting);
        let waker = Waker::from(Arc::new(Alarm(Weak::clone(&self.this))));
        let over = Pin::new(&mut sleep)
            .poll(&mut Context::from_waker(&waker))
            .is_ready();
        self.setting.lock().sleep = Some(sleep);
        if over {
            self.watchers.notify(Readiness::READABLE);
        }
    }
}

impl File for TimerFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn read(&self, sink: &mut Sink<'_>, _: OpenFlags) -> Result<usize> {
        if sink.remaining() < 8 {
            return Err(Errno::EINVAL);
        }
        let now = self.kernel.clock.monotonic();
        let expirations;
        {
            let mut setting = self.setting.lock();
            let deadline = setting
                .deadline
                .filter(|&deadline| deadline <= now)
                .ok_or(Errno::EAGAIN)?;
            match (now - deadline).checked_div(setting.interval) {
                Some(more) => {
                    expirations = 1 + more;
                    let passed = expirations.saturating_mul(setting.interval);
                    setting.deadline = Some(deadline.saturating_add(passed));
                }
                None => {
                    expirations = 1;
                    setting.deadline = None;
                }
            }
        }
        self.arm();
        sink.put(&expirations.to_ne_bytes())
    }

    fn readiness(&self) -> Readiness {
        let deadline = self.setting.lock().deadline;
        match deadline {
            Some(deadline) if deadline <= self.kernel.clock.monotonic() => Readiness::READABLE,
            _ => Readiness::empty(),
        }
    }

    fn watch_list(&self) -> Option<&WatchList> {
        Some(&self.watchers)
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(anonymous_metadata(Kind::Regular, 0o600, 8))
    }

    fn describe(&self) -> String {
        String::from("anon_inode:[timerfd]")
    }
}
