//! The life of a unit as plain data: every event in every state has a defined outcome, and nothing here waits, sends or
//! measures time.
//!
//! [`Machine::handle`] takes what has happened and says what is to be done. Whoever drives it ([`super::runner`]) does that,
//! and calls [`Machine::handle`] with [`Event::Tick`] when [`Machine::deadline`] has come.
//!
//! What always holds:
//! * A unit that somebody asks for is running, on its way there, or says when it will try again.
//! * A unit that nobody needs is on its way to an end, unless it is to be kept.
//! * There is never more than one instance of a unit.
//! * While no instance accepts the unit's connections, its sockets are watched or a start is under way or due.

use std::time::Duration;

/// A point in time: since some fixed moment.
pub type Moment = Duration;

/// How a unit ends when nobody needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// At once; nothing of the instance stays.
    Destroy,
    /// SIGTERM, and an end after the grace period.
    Shutdown,
    /// It stops using the processor, and goes on when it is asked for.
    Suspend,
}

/// What the machine has to know of a unit's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Without a query and without traffic for so long, it ends.
    pub idle: Duration,
    /// How.
    pub ending: Ending,
    /// Queries wait until it is ready.
    pub wait: bool,
    /// A start that takes longer has failed.
    pub ready_timeout: Duration,
    /// It is started without being asked for, and again when it has ended, and is not ended for idleness.
    pub keep: bool,
    /// It is not ended to make room either.
    pub protected: bool,
}

/// Where a unit is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing of it runs.
    Cold,
    /// Nothing of it runs, and it is not started before a moment because the last start failed.
    BackingOff {
        /// That moment.
        until: Moment,
    },
    /// It was started and is not ready yet.
    Starting {
        /// When that will have failed.
        deadline: Moment,
    },
    /// It is ready.
    Ready {
        /// The instance has been asked how busy it is, and this is why.
        asked: Option<Check>,
    },
    /// It has been told to suspend.
    Suspending,
    /// Nothing of it uses the processor; memory and connections stay.
    Suspended,
    /// It has been told to end.
    Stopping,
    /// It is removed and nothing of it is left.
    Gone,
}

/// Why an instance is asked how busy it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// To see traffic.
    Sample,
    /// To end it if there is none; it accepts no connections meanwhile.
    End,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody has asked for one of its names.
    Query,
    /// A connection or a datagram waits at one of its sockets.
    Knock,
    /// Somebody wants it started.
    Start,
    /// Somebody wants it ended now.
    Stop,
    /// The room is needed: end if there is no open connection.
    Evict,
    /// The start has brought it to readiness.
    Ready,
    /// There is no instance: the start failed before there was one.
    NotStarted,
    /// The instance has ended.
    Ended {
        /// Not by its own will, nor ours.
        crashed: bool,
    },
    /// How busy the instance is.
    Activity {
        /// Of the action that asked: an answer to an older question is not taken for one to a newer.
        ticket: u64,
        /// Open connections.
        connections: u64,
        /// Bytes that ever went in or out.
        bytes: u64,
    },
    /// The instance cannot say how busy it is, or refuses to suspend now.
    Refused {
        /// Of the action that asked.
        ticket: u64,
    },
    /// The instance has suspended.
    Suspended,
    /// The instance goes on.
    Resumed,
    /// Somebody wants to see how busy it is.
    Look,
    /// The time of [`Machine::deadline`] has come.
    Tick,
    /// Its configuration has changed.
    Configure {
        /// What the machine has to know of it.
        settings: Settings,
        /// An instance of the old configuration is to be replaced when nobody is connected.
        stale: bool,
    },
    /// It is no longer wanted.
    Remove,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Watch its sockets for connections and datagrams.
    Watch,
    /// Watch them no longer.
    Unwatch,
    /// Start an instance.
    Start,
    /// Queries that wait are to be answered (true) or to fail.
    Release(bool),
    /// Ask how busy the instance is, without a pause.
    Sample(u64),
    /// Have the instance accept no connections, and ask how busy it is.
    Pause(u64),
    /// Have it accept connections again.
    Continue,
    /// Have the instance suspend.
    Suspend(u64),
    /// Have it go on.
    Resume,
    /// End the instance at once: it is not ready in time.
    GiveUp,
    /// End the instance; true: at once.
    End(bool),
}

/// How a query is to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Now.
    Now,
    /// When [`Action::Release`] says so.
    Wait,
    /// It fails.
    Fail,
}

/// First pause after a failed start.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Longest pause after failed starts.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// An instance that crashes sooner after its readiness counts as a failed start, if that happens time and again.
const YOUNG: Duration = Duration::from_secs(5);
/// How often it has to happen.
const CRASHES: u32 = 3;
/// Traffic is looked for so many times in the time after which a unit ends.
const SAMPLES: u32 = 8;
/// How soon it is looked again whether a removed or replaced unit still has connections.
const LEAVING: Duration = Duration::from_millis(500);

/// A unit's life.
#[derive(Clone, Debug)]
pub struct Machine {
    settings: Settings,
    state: State,
    /// When somebody last showed interest.
    interest: Moment,
    /// The last look at the traffic: when, how many connections, how many bytes.
    sample: (Moment, u64, u64),
    /// When it became ready.
    ready_since: Moment,
    /// Number of the last question to the instance.
    ticket: u64,
    /// Failed starts in a row.
    failures: u32,
    /// Ends soon after readiness, in a row.
    crashes: u32,
    /// Start again after the end that is under way.
    again: bool,
    /// The end that is under way is that of a failed start.
    failing: bool,
    /// Queries wait.
    waiting: bool,
    /// It is to go.
    removed: bool,
    /// The instance is of an older configuration.
    stale: bool,
    /// When it was last tried to end it because it is removed or stale.
    left_look: Moment,
    /// The room is needed.
    evicted: bool,
    /// It was ended by hand or to make room: it waits to be asked for, even if it is to be kept.
    halted: bool,
}

impl Machine {
    /// A unit of which nothing runs. Its sockets are watched from the start.
    #[must_use]
    pub fn new(settings: Settings, now: Moment) -> (Self, Vec<Action>) {
        let mut machine = Self {
            settings,
            state: State::Cold,
            interest: now,
            sample: (now, 0, 0),
            ready_since: now,
            ticket: 0,
            failures: 0,
            crashes: 0,
            again: false,
            failing: false,
            waiting: false,
            removed: false,
            stale: false,
            left_look: Moment::ZERO,
            evicted: false,
            halted: false,
        };
        let mut actions = vec![Action::Watch];
        if settings.keep {
            machine.start(now, &mut actions);
        }
        (machine, actions)
    }

    /// A unit of which an instance runs already, or is suspended.
    #[must_use]
    pub fn adopt(settings: Settings, suspended: bool, now: Moment) -> Self {
        let (mut machine, _) = Self::new(
            Settings {
                keep: false,
                ..settings
            },
            now,
        );
        machine.settings = settings;
        machine.state = if suspended {
            State::Suspended
        } else {
            State::Ready { asked: None }
        };
        machine
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// When somebody last showed interest.
    #[must_use]
    pub fn interest(&self) -> Moment {
        self.interest
    }

    /// Connections at the last look.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.sample.1
    }

    /// Whether an instance exists or is being made.
    #[must_use]
    pub fn occupies(&self) -> bool {
        !matches!(
            self.state,
            State::Cold | State::BackingOff { .. } | State::Gone
        )
    }

    /// Whether it may be ended to make room for others.
    #[must_use]
    pub fn can_be_evicted(&self) -> bool {
        !self.settings.protected
            && matches!(
                self.state,
                State::Ready { .. } | State::Suspended | State::Suspending
            )
    }

    /// A query: how to answer it, and what else to do.
    pub fn query(&mut self, now: Moment) -> (Answer, Vec<Action>) {
        let actions = self.handle(now, Event::Query);
        let answer = match self.state {
            State::Gone | State::BackingOff { .. } => Answer::Fail,
            State::Starting { .. } | State::Stopping | State::Cold if self.settings.wait => {
                self.waiting = true;
                Answer::Wait
            }
            _ => Answer::Now,
        };
        (answer, actions)
    }

    /// When [`Event::Tick`] is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Moment> {
        match self.state {
            State::BackingOff { until } => Some(until),
            State::Starting { deadline } => Some(deadline),
            State::Ready { asked: None } => {
                if self.leaving() {
                    return Some(self.left_look + LEAVING);
                }
                if self.settings.keep {
                    return None;
                }
                let end = self.interest + self.settings.idle;
                Some(end.min(self.sample.0 + self.settings.idle / SAMPLES))
            }
            _ => None,
        }
    }

    fn next_ticket(&mut self) -> u64 {
        self.ticket += 1;
        self.ticket
    }

    /// It is to end as soon as nobody is connected.
    fn leaving(&self) -> bool {
        self.removed || self.stale
    }

    fn start(&mut self, now: Moment, actions: &mut Vec<Action>) {
        self.again = false;
        self.stale = false;
        self.evicted = false;
        self.halted = false;
        self.failing = false;
        self.interest = now;
        self.state = State::Starting {
            deadline: now + self.settings.ready_timeout,
        };
        actions.push(Action::Unwatch);
        actions.push(Action::Start);
    }

    fn release(&mut self, ready: bool, actions: &mut Vec<Action>) {
        if std::mem::take(&mut self.waiting) {
            actions.push(Action::Release(ready));
        }
    }

    fn end(&mut self, actions: &mut Vec<Action>) {
        let at_once = self.settings.ending == Ending::Destroy;
        self.state = State::Stopping;
        actions.push(Action::End(at_once));
    }

    /// There is no instance any more, or never was one.
    fn rest(&mut self, now: Moment, failed: bool, actions: &mut Vec<Action>) {
        if self.removed {
            self.state = State::Gone;
            self.release(false, actions);
            return;
        }
        if !failed && now.saturating_sub(self.ready_since) >= YOUNG {
            self.failures = 0;
            self.crashes = 0;
        }
        if failed {
            let pause = FIRST_BACKOFF
                .saturating_mul(1 << self.failures.min(10))
                .min(LONGEST_BACKOFF);
            self.failures += 1;
            self.again = false;
            self.state = State::BackingOff { until: now + pause };
            self.release(false, actions);
            return;
        }
        if self.again || (self.settings.keep && !self.halted) {
            self.start(now, actions);
            return;
        }
        self.state = State::Cold;
        self.release(false, actions);
        actions.push(Action::Watch);
    }

    /// Something has happened: what is to be done now, in order.
    pub fn handle(&mut self, now: Moment, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Query | Event::Knock | Event::Start => self.wanted(now, event, &mut actions),
            Event::Stop => self.stop(now, &mut actions),
            Event::Evict => match self.state {
                State::Ready { asked } if !self.settings.protected => {
                    self.evicted = true;
                    if asked != Some(Check::End) {
                        self.state = State::Ready {
                            asked: Some(Check::End),
                        };
                        actions.push(Action::Pause(self.next_ticket()));
                    }
                }
                State::Suspended if !self.settings.protected => {
                    self.halted = true;
                    self.end(&mut actions);
                }
                State::Suspending if !self.settings.protected => self.evicted = true,
                _ => {}
            },
            Event::Ready => {
                if matches!(self.state, State::Starting { .. }) {
                    self.state = State::Ready { asked: None };
                    self.ready_since = now;
                    self.sample = (now, 0, 0);
                    // A slow start leaves some of the time too: who waits is to be served before it is over.
                    let earliest = now.saturating_sub(self.settings.idle / 2);
                    self.interest = self.interest.max(earliest);
                    self.release(true, &mut actions);
                }
            }
            Event::NotStarted => match self.state {
                State::Starting { .. } => self.rest(now, true, &mut actions),
                State::Stopping => {
                    let failed = std::mem::take(&mut self.failing);
                    self.rest(now, failed, &mut actions);
                }
                _ => {}
            },
            Event::Ended { crashed } => self.ended(now, crashed, &mut actions),
            Event::Activity { ticket, .. } | Event::Refused { ticket } if ticket != self.ticket => {
            }
            Event::Activity {
                connections, bytes, ..
            } => {
                self.busy(now, connections, bytes, &mut actions);
            }
            Event::Refused { .. } => self.refused(now, &mut actions),
            Event::Suspended => match self.state {
                State::Suspending => {
                    self.state = State::Suspended;
                    self.crashes = 0;
                    if self.removed || self.evicted || self.stale {
                        self.halted = self.evicted;
                        self.end(&mut actions);
                    } else if self.again {
                        self.again = false;
                        actions.push(Action::Resume);
                    }
                }
                State::Ready { .. } => self.state = State::Suspended,
                _ => {}
            },
            Event::Resumed => {
                if matches!(self.state, State::Suspending | State::Suspended) {
                    self.again = false;
                    self.interest = now;
                    self.sample.0 = now;
                    self.state = State::Ready { asked: None };
                }
            }
            Event::Look => {
                if self.state == (State::Ready { asked: None }) {
                    self.state = State::Ready {
                        asked: Some(Check::Sample),
                    };
                    actions.push(Action::Sample(self.next_ticket()));
                }
            }
            Event::Tick => self.tick(now, &mut actions),
            Event::Configure { settings, stale } => {
                self.settings = settings;
                self.removed = false;
                match self.state {
                    State::Cold | State::BackingOff { .. } if settings.keep && !self.halted => {
                        self.failures = 0;
                        self.start(now, &mut actions);
                    }
                    // A change may be the cure.
                    State::BackingOff { .. } if stale => {
                        self.failures = 0;
                        self.state = State::Cold;
                        actions.push(Action::Watch);
                    }
                    State::Gone => {
                        self.state = State::Cold;
                        actions.push(Action::Watch);
                    }
                    State::Cold | State::BackingOff { .. } => {}
                    State::Suspended if stale => {
                        // Its clients would otherwise wake the old one for ever.
                        self.end(&mut actions);
                    }
                    _ => self.stale |= stale,
                }
            }
            Event::Remove => {
                self.removed = true;
                match self.state {
                    State::Cold | State::BackingOff { .. } => {
                        actions.push(Action::Unwatch);
                        self.rest(now, false, &mut actions);
                    }
                    State::Starting { .. } | State::Suspended => self.end(&mut actions),
                    _ => {}
                }
            }
        }
        actions
    }

    /// Somebody wants it.
    fn wanted(&mut self, now: Moment, event: Event, actions: &mut Vec<Action>) {
        if self.removed {
            return;
        }
        self.interest = now;
        match self.state {
            State::Cold => self.start(now, actions),
            // A command is meant; what waits at a socket is served when the time has come.
            State::BackingOff { .. } if event == Event::Start => self.start(now, actions),
            State::Ready {
                asked: Some(Check::End),
            } if !self.evicted => {
                self.state = State::Ready { asked: None };
                self.sample.0 = now;
                actions.push(Action::Continue);
            }
            State::Suspending | State::Stopping => self.again = true,
            State::Suspended => actions.push(Action::Resume),
            State::BackingOff { .. }
            | State::Starting { .. }
            | State::Ready { .. }
            | State::Gone => {}
        }
    }

    fn stop(&mut self, now: Moment, actions: &mut Vec<Action>) {
        self.halted = true;
        match self.state {
            State::Starting { .. } | State::Ready { .. } | State::Suspended => self.end(actions),
            State::Suspending => {
                self.evicted = true;
                self.again = false;
            }
            State::Stopping => self.again = false,
            State::BackingOff { .. } => {
                self.failures = 0;
                self.again = false;
                self.rest(now, false, actions);
            }
            State::Cold | State::Gone => {}
        }
    }

    fn ended(&mut self, now: Moment, crashed: bool, actions: &mut Vec<Action>) {
        match self.state {
            State::Starting { .. } => self.rest(now, true, actions),
            State::Ready { .. } => {
                let young = now.saturating_sub(self.ready_since) < YOUNG;
                if young && (crashed || self.settings.keep) {
                    self.crashes += 1;
                } else {
                    self.crashes = 0;
                }
                self.rest(now, young && self.crashes >= CRASHES, actions);
            }
            State::Suspending | State::Suspended | State::Stopping => {
                if !crashed {
                    self.crashes = 0;
                }
                let failed = std::mem::take(&mut self.failing);
                self.rest(now, failed, actions);
            }
            State::Cold | State::BackingOff { .. } | State::Gone => {}
        }
    }

    fn busy(&mut self, now: Moment, connections: u64, bytes: u64, actions: &mut Vec<Action>) {
        let State::Ready { asked: Some(check) } = self.state else {
            return;
        };
        let (before, connections_before, bytes_before) = self.sample;
        let suspends = self.settings.ending == Ending::Suspend && !self.evicted && !self.leaving();
        if connections > 0 && !suspends {
            self.interest = self.interest.max(now);
        } else if connections_before > 0 && !suspends {
            // It closed some time since the last look.
            self.interest = self.interest.max(now);
        } else if bytes != bytes_before {
            // That was at some time since the last look; the earliest counts, so that a unit does not live longer than asked.
            self.interest = self.interest.max(before);
        }
        self.sample = (now, connections, bytes);
        self.state = State::Ready { asked: None };
        if check == Check::Sample {
            return;
        }
        let busy = connections > 0 && !suspends;
        let idle = now >= self.interest + self.settings.idle && !self.settings.keep;
        if !busy && (idle || self.evicted || self.leaving()) {
            if suspends {
                self.state = State::Suspending;
                actions.push(Action::Suspend(self.next_ticket()));
            } else {
                self.halted |= self.evicted;
                self.end(actions);
            }
            return;
        }
        self.evicted = false;
        actions.push(Action::Continue);
    }

    /// The instance could not say how busy it is, or does not suspend now: later, then.
    fn refused(&mut self, now: Moment, actions: &mut Vec<Action>) {
        match self.state {
            State::Ready { asked: Some(check) } => {
                self.state = State::Ready { asked: None };
                self.sample.0 = now;
                self.interest = now;
                self.evicted = false;
                if check == Check::End {
                    actions.push(Action::Continue);
                }
            }
            State::Suspending => {
                self.state = State::Ready { asked: None };
                self.sample.0 = now;
                self.interest = now;
                self.again = false;
                actions.push(Action::Continue);
                if self.evicted {
                    self.end(actions);
                }
            }
            _ => {}
        }
    }

    fn tick(&mut self, now: Moment, actions: &mut Vec<Action>) {
        if self.deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        match self.state {
            State::BackingOff { .. } => {
                if self.settings.keep {
                    self.start(now, actions);
                } else {
                    self.state = State::Cold;
                    actions.push(Action::Watch);
                }
            }
            State::Starting { .. } => {
                self.failing = true;
                self.state = State::Stopping;
                actions.push(Action::GiveUp);
            }
            State::Ready { .. } => {
                let due = now >= self.interest + self.settings.idle && !self.settings.keep;
                if due || self.leaving() {
                    self.left_look = now;
                    self.state = State::Ready {
                        asked: Some(Check::End),
                    };
                    actions.push(Action::Pause(self.next_ticket()));
                } else {
                    self.state = State::Ready {
                        asked: Some(Check::Sample),
                    };
                    actions.push(Action::Sample(self.next_ticket()));
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
