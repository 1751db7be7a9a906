//! Units: the life of each as a state machine ([`machine`]), and the task that lives it ([`runner`]).

pub mod machine;
pub mod runner;
mod session;

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kiln_monitor::arguments::Publish;
use kiln_monitor::state::{InstanceConfiguration, now_microseconds};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::configuration;
use crate::dns::{self, Asked, NotReady};
use crate::metrics::UnitMetrics;
use crate::store::Statistics;
use crate::timeline::{Cause, Event as Mark, Timeline};
use machine::{Action, Answer, Ending, Event, Machine, Moment, Settings, State};
use runner::Input;

/// A unit with everything that its start needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// What was asked for.
    pub unit: configuration::Unit,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its instance; or why there can be none (its source cannot be built).
    pub instance: Result<InstanceConfiguration, String>,
}

/// The ports of a unit at its addresses: its sockets, and the published ports of its instance, are in this order.
#[must_use]
pub fn published(unit: &configuration::Unit, addresses: &[IpAddr]) -> Vec<Publish> {
    let at = |address: &IpAddr| {
        let address = Some(*address);
        unit.ports.iter().map(move |port| Publish {
            address,
            host: port.host,
            guest: port.guest,
            protocol: port.protocol,
        })
    };
    addresses.iter().flat_map(at).collect()
}

impl Prepared {
    /// What the unit's state machine has to know.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let unit = &self.unit;
        Settings {
            idle: unit.idle,
            ending: match unit.stop {
                configuration::Stop::Destroy => Ending::Destroy,
                configuration::Stop::Shutdown => Ending::Shutdown,
                configuration::Stop::Suspend => Ending::Suspend,
            },
            // Where no socket is held, an early client would be refused.
            wait: unit.answer == configuration::Answer::Ready
                || (unit.ports.is_empty() && unit.fronts.is_empty()),
            ready_timeout: unit.ready_timeout,
            keep: unit.always || unit.min_running > 0,
            protected: unit.always,
        }
    }
}

struct Core {
    machine: Machine,
    waiters: Vec<oneshot::Sender<Result<(), NotReady>>>,
    statistics: Statistics,
    /// Why the last start failed or the last instance crashed.
    trouble: Option<String>,
    /// The present or last summons.
    timeline: Option<Timeline>,
    /// The name that stands for all in a timeline.
    asked_name: String,
}

/// A unit as others see it: the name server, the fronts, commands.
pub struct Unit {
    name: String,
    clock: Instant,
    core: Mutex<Core>,
    metrics: UnitMetrics,
    inbox: mpsc::UnboundedSender<Input>,
    /// Its task has ended, and nothing of it is left.
    left: AtomicBool,
}

/// What `kiln summon ps` shows of a unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its name; its instance is called so too.
    pub name: String,
    /// Its DNS names.
    pub dns: Vec<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its ports, as `80`, `8080->80` or `53/udp`.
    pub ports: Vec<String>,
    /// Where it is in its life.
    pub state: String,
    /// Seconds until the next try, if it is backing off.
    pub retry: Option<u64>,
    /// Open connections at the last look.
    pub connections: u64,
    /// What it has done so far.
    #[serde(flatten)]
    pub statistics: Statistics,
    /// Why the last start failed or the last instance crashed.
    pub trouble: Option<String>,
}

impl Unit {
    fn lock(&self) -> MutexGuard<'_, Core> {
        // Nothing is left half done in it by a panic: the machine changes in one step.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn now(&self) -> Moment {
        self.clock.elapsed()
    }

    fn send(&self, actions: Vec<Action>) {
        if !actions.is_empty() {
            // The task has ended only when the unit is gone.
            let _ = self.inbox.send(Input::Actions(actions));
        }
    }

    /// Something has happened to it.
    pub fn event(&self, event: Event) {
        let cause = match event {
            Event::Start => Cause::Command,
            _ => Cause::Floor,
        };
        self.event_by(event, cause);
    }

    /// Something has happened to it; if that starts it, this is why.
    pub fn event_by(&self, event: Event, cause: Cause) {
        if event == Event::Knock {
            self.metrics.knocks.inc();
        }
        let mut core = self.lock();
        let before = core.machine.state();
        let deadline = core.machine.deadline();
        let actions = core.machine.handle(self.now(), event);
        self.follow(&mut core, &actions, cause);
        let after = core.machine.state();
        let sooner = core
            .machine
            .deadline()
            .is_some_and(|new| deadline.is_none_or(|old| new < old));
        // Sent while the lock is held: actions reach the task in the order of the events.
        if actions.is_empty() && sooner {
            // The task sleeps until the old deadline: an input wakes it.
            let _ = self.inbox.send(Input::Actions(actions));
        } else {
            self.send(actions);
        }
        drop(core);
        if before != after {
            tracing::debug!(unit = self.name, ?event, ?before, ?after, "state");
        }
    }

    /// Keeps what others see in step with the machine.
    fn follow(&self, core: &mut Core, actions: &[Action], cause: Cause) {
        let starts = actions.contains(&Action::Start);
        if starts {
            core.statistics.starts += 1;
            self.metrics.starts.inc();
        }
        if starts || actions.contains(&Action::Resume) {
            core.timeline = Some(Timeline::new(self.name.clone(), cause, now_microseconds()));
        }
        self.metrics
            .connections
            .set(i64::try_from(core.machine.connections()).unwrap_or(i64::MAX));
        self.metrics.set_state(state_name(core.machine.state()));
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> State {
        self.lock().machine.state()
    }

    /// When it was last needed, if it may be ended to make room.
    #[must_use]
    pub fn evictable(&self) -> Option<Moment> {
        let core = self.lock();
        core.machine
            .can_be_evicted()
            .then(|| core.machine.interest())
    }

    /// Whether nothing is under way that was asked of it.
    #[must_use]
    pub fn settled(&self) -> bool {
        matches!(
            self.state(),
            State::Cold | State::BackingOff { .. } | State::Ready { asked: None } | State::Gone
        )
    }

    /// Whether it was removed and nothing of it is left: no process, no socket, no folder.
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }

    /// Whether an instance exists or is on its way.
    #[must_use]
    pub fn occupies(&self) -> bool {
        self.lock().machine.occupies()
    }

    /// A connection that was accepted elsewhere, for a port of the program. It is handed over when the instance runs.
    pub fn deliver(
        &self,
        connection: std::os::fd::OwnedFd,
        guest: u16,
        peer: Option<std::net::SocketAddr>,
        port: u16,
    ) {
        let _ = self.inbox.send(Input::Deliver {
            connection,
            guest,
            peer,
        });
        self.event_by(Event::Knock, Cause::Connection(port));
    }

    /// Another configuration for it. `stale`: its present instance is to be replaced when nobody is connected.
    pub fn configure(&self, prepared: Prepared, stale: bool) {
        let settings = prepared.settings();
        // First, so that a start finds it.
        let _ = self.inbox.send(Input::Configure(Box::new(prepared)));
        self.event(Event::Configure { settings, stale });
    }

    /// The present or last summons.
    #[must_use]
    pub fn timeline(&self) -> Option<Timeline> {
        self.lock().timeline.clone()
    }

    /// Why the last start failed or the last instance crashed.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.lock().trouble.clone()
    }

    /// What to show of it.
    #[must_use]
    pub fn status(&self, prepared: &Prepared) -> Status {
        let now = self.now();
        let core = self.lock();
        let retry = match core.machine.state() {
            State::BackingOff { until } => {
                Some(until.saturating_sub(now).as_secs_f64().ceil() as u64)
            }
            _ => None,
        };
        Status {
            name: self.name.clone(),
            dns: prepared.unit.dns.clone(),
            addresses: prepared.addresses.clone(),
            ports: prepared.unit.ports.iter().map(port_text).collect(),
            state: state_name(core.machine.state()).to_owned(),
            retry,
            connections: core.machine.connections(),
            statistics: core.statistics,
            trouble: core.trouble.clone(),
        }
    }
}

fn port_text(port: &configuration::UnitPort) -> String {
    let suffix = match port.protocol {
        configuration::Protocol::Tcp => "",
        configuration::Protocol::Udp => "/udp",
    };
    if port.host == port.guest {
        format!("{}{suffix}", port.host)
    } else {
        format!("{}->{}{suffix}", port.host, port.guest)
    }
}

/// A state in a word.
fn state_name(state: State) -> &'static str {
    match state {
        State::Cold | State::Gone => "stopped",
        State::BackingOff { .. } => "failed",
        State::Starting { .. } => "starting",
        State::Ready { .. } | State::Suspending => "ready",
        State::Suspended => "suspended",
        State::Stopping => "stopping",
    }
}

impl Core {
    /// Notes an event of the present summons, the first time.
    fn note(&mut self, mark: Mark, at: u64) {
        if let Some(timeline) = &mut self.timeline {
            timeline.note(mark, at);
        }
    }

    fn release(&mut self, outcome: &Result<(), NotReady>) {
        for waiter in self.waiters.drain(..) {
            // Who asked may have given up.
            let _ = waiter.send(outcome.clone());
        }
    }
}

impl dns::Unit for Unit {
    fn asked(&self) -> Asked {
        self.metrics.queries.inc();
        let mut core = self.lock();
        let now = now_microseconds();
        core.statistics.last_query = Some(now);
        let (answer, actions) = core.machine.query(self.now());
        if !actions.is_empty() {
            let cause = Cause::Query(core.asked_name.clone());
            self.follow(&mut core, &actions, cause);
            if answer == Answer::Now {
                core.note(Mark::Answered, now_microseconds());
            }
        }
        let asked = match answer {
            Answer::Now => Asked::Answer,
            Answer::Fail => Asked::Fail,
            Answer::Wait => {
                let (sender, receiver) = oneshot::channel();
                core.waiters.push(sender);
                Asked::Wait(receiver)
            }
        };
        self.send(actions);
        asked
    }

    fn answered(&self) {
        self.lock().note(Mark::Answered, now_microseconds());
    }
}

/// A shared unit.
pub type Handle = Arc<Unit>;
