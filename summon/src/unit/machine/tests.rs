//! No order of events leaves a unit unreachable or running for ever.

use super::*;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

fn settings(ending: Ending, wait: bool, keep: bool) -> Settings {
    Settings {
        idle: 10 * SECOND,
        ending,
        wait,
        ready_timeout: 30 * SECOND,
        keep,
        protected: false,
    }
}

/// What the world does with a machine's actions: an instance that exists or not, sockets that are watched or not.
#[derive(Debug)]
struct World {
    machine: Machine,
    now: Moment,
    /// An instance was started and has not ended.
    instance: bool,
    /// It has told that it is ready.
    ready: bool,
    accepts: bool,
    stopped: bool,
    watched: bool,
    /// Queries that wait for an answer.
    waiting: usize,
    /// Answers that the instance owes.
    owed: Vec<Action>,
    connections: u64,
    bytes: u64,
    starts: usize,
    /// The end that is under way may cut connections: it was asked for by hand, or the instance was not at work.
    may_cut: bool,
}

/// What can happen in the world.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Query,
    Connect,
    Disconnect,
    Traffic,
    StartCommand,
    StopCommand,
    Evict,
    Look,
    BecomesReady,
    CannotStart,
    Crashes,
    Exits,
    /// The instance does what it was told to.
    Obeys,
    /// It says that it cannot.
    Refuses,
    Passes(u64),
    Reload {
        ending: usize,
        wait: bool,
        keep: bool,
        stale: bool,
    },
    Remove,
    AddAgain,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => Just(Happening::Query),
        4 => Just(Happening::Connect),
        3 => Just(Happening::Disconnect),
        2 => Just(Happening::Traffic),
        1 => Just(Happening::StartCommand),
        1 => Just(Happening::StopCommand),
        1 => Just(Happening::Evict),
        1 => Just(Happening::Look),
        5 => Just(Happening::BecomesReady),
        1 => Just(Happening::CannotStart),
        1 => Just(Happening::Crashes),
        1 => Just(Happening::Exits),
        6 => Just(Happening::Obeys),
        1 => Just(Happening::Refuses),
        6 => (0..20_000u64).prop_map(Happening::Passes),
        1 => (0..3usize, any::<bool>(), any::<bool>(), any::<bool>())
            .prop_map(|(ending, wait, keep, stale)| Happening::Reload { ending, wait, keep, stale }),
        1 => Just(Happening::Remove),
        1 => Just(Happening::AddAgain),
    ]
}

const ENDINGS: [Ending; 3] = [Ending::Destroy, Ending::Shutdown, Ending::Suspend];

impl World {
    fn new(settings: Settings) -> Self {
        let now = 1000 * SECOND;
        let (machine, actions) = Machine::new(settings, now);
        let mut world = Self {
            machine,
            now,
            instance: false,
            ready: false,
            accepts: true,
            stopped: false,
            watched: false,
            waiting: 0,
            owed: Vec::new(),
            connections: 0,
            bytes: 0,
            starts: 0,
            may_cut: false,
        };
        world.take(actions);
        world
    }

    fn take(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Watch => self.watched = true,
                Action::Unwatch => self.watched = false,
                Action::Start => {
                    assert!(!self.instance, "a second instance: {self:?}");
                    self.instance = true;
                    self.ready = false;
                    self.accepts = true;
                    self.stopped = false;
                    self.connections = 0;
                    self.bytes = 0;
                    self.starts += 1;
                    self.owed.clear();
                }
                Action::Release(_) => self.waiting = 0,
                Action::Pause(_) | Action::Continue => self.owed.push(action),
                Action::Sample(_)
                | Action::Suspend(_)
                | Action::Resume
                | Action::GiveUp
                | Action::End(_) => {
                    assert!(self.instance, "{action:?} for nobody: {self:?}");
                    self.owed.push(action);
                }
            }
        }
    }

    fn event(&mut self, event: Event) {
        let before = self.machine.state();
        let actions = self.machine.handle(self.now, event);
        if self.machine.state() == State::Stopping && before != State::Stopping {
            self.may_cut = event == Event::Stop || !matches!(before, State::Ready { .. });
        }
        self.take(actions);
    }

    fn gone(&mut self, crashed: bool) {
        self.instance = false;
        self.ready = false;
        self.connections = 0;
        self.owed.clear();
        self.event(Event::Ended { crashed });
    }

    fn obey(&mut self) {
        if self.owed.is_empty() {
            return;
        }
        let action = self.owed.remove(0);
        if matches!(action, Action::Pause(_)) {
            self.accepts = false;
        }
        match action {
            Action::Continue => self.accepts = true,
            Action::Sample(ticket) | Action::Pause(ticket) => {
                if !self.stopped {
                    self.event(Event::Activity {
                        ticket,
                        connections: self.connections,
                        bytes: self.bytes,
                    });
                } else {
                    self.event(Event::Refused { ticket });
                }
            }
            Action::Suspend(_) => {
                self.stopped = true;
                self.accepts = true;
                self.event(Event::Suspended);
            }
            Action::Resume => {
                if std::mem::take(&mut self.stopped) {
                    self.event(Event::Resumed);
                }
            }
            Action::GiveUp | Action::End(_) => {
                assert!(
                    self.connections == 0 || self.may_cut,
                    "a connection is cut: {self:?}"
                );
                self.gone(false);
            }
            _ => unreachable!(),
        }
    }

    /// Time passes, with a tick whenever one is due, and with an instance that obeys when `obeys`.
    fn pass(&mut self, time: Duration, obeys: bool) {
        let end = self.now + time;
        for _ in 0..10_000 {
            match self.machine.deadline() {
                Some(deadline) if deadline <= end => {
                    self.now = self.now.max(deadline);
                    self.event(Event::Tick);
                    if obeys {
                        self.settle();
                    }
                }
                _ => {
                    self.now = end;
                    return;
                }
            }
        }
        panic!("ticks without end: {self:?}");
    }

    fn happen(&mut self, happening: Happening) {
        self.happens(happening);
        self.check();
    }

    fn happens(&mut self, happening: Happening) {
        match happening {
            Happening::Query => {
                let (answer, actions) = self.machine.query(self.now);
                // The one who asks is registered before anything else happens.
                if answer == Answer::Wait {
                    self.waiting += 1;
                }
                self.take(actions);
            }
            Happening::Connect => {
                if self.instance && self.ready && self.accepts {
                    if std::mem::take(&mut self.stopped) {
                        self.event(Event::Resumed);
                    }
                    self.connections += 1;
                    self.bytes += 100;
                } else if self.watched {
                    self.event(Event::Knock);
                }
            }
            Happening::Disconnect => self.connections = self.connections.saturating_sub(1),
            Happening::Traffic if self.instance && self.connections > 0 => {
                if std::mem::take(&mut self.stopped) {
                    self.event(Event::Resumed);
                }
                self.bytes += 7;
            }
            Happening::Traffic => {}
            Happening::StartCommand => self.event(Event::Start),
            Happening::StopCommand => self.event(Event::Stop),
            Happening::Evict => self.event(Event::Evict),
            Happening::Look => self.event(Event::Look),
            Happening::BecomesReady => {
                if self.instance && !self.ready && !self.stopped {
                    self.ready = true;
                    self.event(Event::Ready);
                }
            }
            Happening::CannotStart => {
                if self.instance && !self.ready {
                    self.instance = false;
                    self.owed.clear();
                    self.event(Event::NotStarted);
                }
            }
            Happening::Crashes if self.instance => self.gone(true),
            Happening::Exits if self.instance => self.gone(false),
            Happening::Crashes | Happening::Exits => {}
            Happening::Obeys => self.obey(),
            Happening::Refuses => {
                if matches!(
                    self.owed.first(),
                    Some(Action::Sample(_) | Action::Pause(_) | Action::Suspend(_))
                ) {
                    let ticket = match self.owed.remove(0) {
                        Action::Sample(ticket) | Action::Suspend(ticket) => ticket,
                        Action::Pause(ticket) => {
                            self.accepts = false;
                            ticket
                        }
                        _ => unreachable!(),
                    };
                    self.event(Event::Refused { ticket });
                }
            }
            Happening::Passes(milliseconds) => {
                self.pass(Duration::from_millis(milliseconds), false);
            }
            Happening::Reload {
                ending,
                wait,
                keep,
                stale,
            } => self.event(Event::Configure {
                settings: settings(ENDINGS[ending], wait, keep),
                stale,
            }),
            Happening::Remove => self.event(Event::Remove),
            Happening::AddAgain => {
                let settings = self.machine.settings;
                self.event(Event::Configure {
                    settings,
                    stale: false,
                });
            }
        }
    }

    fn check(&self) {
        let state = self.machine.state();
        assert_eq!(
            self.instance,
            self.machine.occupies(),
            "what the machine believes of the instance is wrong: {self:?}"
        );
        match state {
            State::Cold => assert!(self.watched, "nobody hears a connection: {self:?}"),
            State::BackingOff { .. } => assert!(self.machine.deadline().is_some()),
            State::Starting { .. } => {
                assert!(self.machine.deadline().is_some());
            }
            State::Ready { asked: None } => {
                assert!(
                    self.accepts || self.owed.contains(&Action::Continue),
                    "ready, and accepts nothing: {self:?}"
                );
                assert!(
                    self.machine.settings.keep || self.machine.deadline().is_some(),
                    "it would run for ever: {self:?}"
                );
            }
            State::Ready { asked: Some(_) } => assert!(
                self.owed
                    .iter()
                    .any(|action| matches!(action, Action::Sample(_) | Action::Pause(_))),
                "waits for an answer that nobody owes: {self:?}"
            ),
            State::Suspending => assert!(
                self.owed
                    .iter()
                    .any(|action| matches!(action, Action::Suspend(_)))
            ),
            State::Suspended => {}
            State::Stopping => assert!(
                self.owed
                    .iter()
                    .any(|action| matches!(action, Action::End(_) | Action::GiveUp)),
                "nobody ends it: {self:?}"
            ),
            State::Gone => assert!(!self.instance),
        }
        if self.waiting > 0 {
            assert!(
                matches!(state, State::Starting { .. } | State::Stopping),
                "a query waits for nothing: {self:?}"
            );
        }
    }

    /// From here on everything works: what was told is done, and starts succeed.
    fn settle(&mut self) {
        for _ in 0..100 {
            while !self.owed.is_empty() {
                self.obey();
            }
            if self.instance && !self.ready && !self.stopped {
                self.ready = true;
                self.event(Event::Ready);
            } else {
                return;
            }
        }
        panic!("never settles: {self:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_happens_a_unit_can_be_reached_and_comes_to_rest(
        ending in 0..3usize,
        wait in any::<bool>(),
        keep in any::<bool>(),
        happenings in prop::collection::vec(happening(), 0..60),
    ) {
        let mut world = World::new(settings(ENDINGS[ending], wait, keep));
        world.check();
        for happening in happenings {
            world.happen(happening);
        }
        world.settle();
        world.check();
        if world.machine.removed {
            world.connections = 0;
            world.pass(120 * SECOND, true);
            world.settle();
            world.pass(120 * SECOND, true);
            prop_assert_eq!(world.machine.state(), State::Gone, "{:?}", world);
            return Ok(());
        }
        // Reachable: after the longest back-off a query or a connection brings it up, whatever was before.
        world.pass(LONGEST_BACKOFF + SECOND, true);
        world.settle();
        if world.watched {
            world.happen(Happening::Connect);
        } else {
            world.happen(Happening::Query);
        }
        world.settle();
        prop_assert!(
            matches!(world.machine.state(), State::Ready { .. }) && world.ready && !world.stopped,
            "cannot be reached: {:?}",
            world
        );
        prop_assert_eq!(world.waiting, 0);
        // And it does not run for ever.
        world.connections = 0;
        world.pass(60 * SECOND, true);
        let at_rest = matches!(world.machine.state(), State::Cold | State::Suspended);
        prop_assert!(at_rest != world.machine.settings.keep, "{:?}", world);
    }
}

#[test]
fn a_unit_ends_when_its_time_has_come_after_the_query_though_there_was_traffic_soon_after_it() {
    let mut world = World::new(settings(Ending::Shutdown, false, false));
    world.happen(Happening::Query);
    world.pass(SECOND / 50, true);
    world.happen(Happening::BecomesReady);
    world.happen(Happening::Connect);
    world.happen(Happening::Disconnect);
    world.pass(10 * SECOND, true);
    assert_eq!(world.machine.state(), State::Cold);
}

#[test]
fn an_open_connection_keeps_a_unit_and_its_end_begins_the_wait() {
    let mut world = World::new(settings(Ending::Shutdown, false, false));
    world.happen(Happening::Query);
    world.happen(Happening::BecomesReady);
    world.happen(Happening::Connect);
    world.pass(1000 * SECOND, true);
    assert!(matches!(world.machine.state(), State::Ready { .. }));
    world.happen(Happening::Disconnect);
    world.pass(9 * SECOND, true);
    assert!(matches!(world.machine.state(), State::Ready { .. }));
    world.pass(3 * SECOND, true);
    assert_eq!(world.machine.state(), State::Cold);
}

#[test]
fn an_idle_connection_does_not_keep_a_unit_from_being_suspended_and_its_traffic_resumes_it() {
    let mut world = World::new(settings(Ending::Suspend, false, false));
    world.happen(Happening::Connect);
    world.happen(Happening::BecomesReady);
    world.happen(Happening::Connect);
    world.pass(12 * SECOND, true);
    assert_eq!(world.machine.state(), State::Suspended);
    world.happen(Happening::Traffic);
    assert!(matches!(world.machine.state(), State::Ready { .. }));
    assert_eq!(world.connections, 1);
    world.pass(20 * SECOND, true);
    world.happen(Happening::Query);
    world.settle();
    assert!(matches!(world.machine.state(), State::Ready { .. }));
    assert_eq!(world.starts, 1);
}

#[test]
fn failed_starts_are_paused_longer_each_time() {
    let mut world = World::new(settings(Ending::Destroy, true, false));
    let mut pauses = Vec::new();
    for _ in 0..9 {
        world.happen(Happening::Query);
        assert_eq!(world.waiting, 1);
        world.happen(Happening::CannotStart);
        assert_eq!(world.waiting, 0);
        let State::BackingOff { until } = world.machine.state() else {
            panic!("{world:?}");
        };
        assert_eq!(world.machine.query(world.now).0, Answer::Fail);
        pauses.push((until - world.now).as_secs());
        world.pass(until - world.now, true);
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
}

#[test]
fn room_is_made_by_idle_units_only() {
    let mut world = World::new(settings(Ending::Suspend, false, false));
    world.happen(Happening::Connect);
    world.happen(Happening::BecomesReady);
    world.happen(Happening::Connect);
    world.happen(Happening::Evict);
    world.settle();
    assert!(matches!(world.machine.state(), State::Ready { .. }));
    world.happen(Happening::Disconnect);
    world.happen(Happening::Evict);
    world.settle();
    assert_eq!(world.machine.state(), State::Cold);
}

#[test]
fn only_crashes_with_no_good_end_between_them_are_failed_starts() {
    let mut world = World::new(settings(Ending::Shutdown, false, false));
    for _ in 0..5 {
        world.happen(Happening::Query);
        world.happen(Happening::BecomesReady);
        world.gone(true);
        assert_eq!(world.machine.state(), State::Cold);
        world.happen(Happening::Query);
        world.happen(Happening::BecomesReady);
        world.event(Event::Stop);
        world.settle();
        assert_eq!(world.machine.state(), State::Cold);
    }
    for crash in 1..=CRASHES {
        world.happen(Happening::Query);
        world.happen(Happening::BecomesReady);
        world.gone(true);
        let waits = matches!(world.machine.state(), State::BackingOff { .. });
        assert_eq!(waits, crash == CRASHES);
    }
}

#[test]
fn a_start_that_takes_longer_than_the_idle_time_is_not_in_vain() {
    let mut world = World::new(settings(Ending::Shutdown, false, false));
    world.happen(Happening::Query);
    world.pass(20 * SECOND, true);
    world.happen(Happening::BecomesReady);
    world.pass(4 * SECOND, true);
    assert!(matches!(world.machine.state(), State::Ready { .. }));
    world.pass(SECOND, true);
    assert_eq!(world.machine.state(), State::Cold);
}
