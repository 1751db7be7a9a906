//! Ceilings for all units together: how many run, and how much memory they have.
//!
//! A start takes its place here first. If there is none, the unit that nobody has needed for the longest is asked to end,
//! then the next; units with open connections stay.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use crate::metrics::Metrics;
use crate::unit::machine::Event;
use crate::unit::{Handle, Unit};

/// How long a unit that was asked to end may take, before the next one is asked.
const PATIENCE: Duration = Duration::from_secs(15);

/// Most units and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ceilings {
    /// Most units running at once.
    pub units: Option<u32>,
    /// Most memory of all that run, in bytes.
    pub memory: Option<u64>,
}

#[derive(Default)]
struct Taken {
    ceilings: Ceilings,
    memory: HashMap<String, u64>,
    units: HashMap<String, Weak<Unit>>,
}

/// Room for instances.
pub struct Room {
    taken: Mutex<Taken>,
    freed: Notify,
    metrics: Arc<Metrics>,
}

/// A place in the room; dropping it frees the place.
pub struct Place {
    room: Arc<Room>,
    unit: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.room.lock().memory.remove(&self.unit);
        self.room.freed.notify_waiters();
    }
}

impl Taken {
    /// Why there is no place for one more; None: there is.
    fn shortage(&self, unit: &str, memory: u64) -> Option<String> {
        let others = || self.memory.iter().filter(|(name, _)| *name != unit);
        if let Some(most) = self.ceilings.units
            && others().count() >= usize::try_from(most).unwrap_or(usize::MAX)
        {
            return Some(format!("max_running = {most} units run already"));
        }
        let used: u64 = others().map(|(_, memory)| *memory).sum();
        if let Some(most) = self.ceilings.memory
            && used.saturating_add(memory) > most
        {
            return Some(format!(
                "max_memory = {} has no room for {} more",
                kiln_monitor::arguments::format_memory(most),
                kiln_monitor::arguments::format_memory(memory)
            ));
        }
        None
    }

    /// The unit that nobody has needed for the longest and that may be ended.
    fn victim(&self, unit: &str, asked: &[String]) -> Option<Handle> {
        self.memory
            .keys()
            .filter(|name| *name != unit && !asked.contains(name))
            .filter_map(|name| self.units.get(name)?.upgrade())
            .filter_map(|other| Some((other.evictable()?, other)))
            .min_by_key(|(interest, _)| *interest)
            .map(|(_, other)| other)
    }
}

impl Room {
    /// Room without ceilings. Units that have to make room are counted.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            taken: Mutex::default(),
            freed: Notify::new(),
            metrics,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the ceilings. What runs goes on.
    pub fn set(&self, ceilings: Ceilings) {
        self.lock().ceilings = ceilings;
        self.freed.notify_waiters();
    }

    /// Tells of a unit that may be asked to end.
    pub fn know(&self, unit: &Handle) {
        let mut taken = self.lock();
        taken.units.retain(|_, unit| unit.strong_count() > 0);
        taken
            .units
            .insert(unit.name().to_owned(), Arc::downgrade(unit));
    }

    /// Memory of all that run.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.lock().memory.values().sum()
    }

    /// A place for an instance that runs already, whatever the ceilings.
    pub fn occupy(self: &Arc<Self>, unit: &str, memory: u64) -> Place {
        self.lock().memory.insert(unit.to_owned(), memory);
        Place {
            room: Arc::clone(self),
            unit: unit.to_owned(),
        }
    }

    /// A place for one more instance, when there is one.
    ///
    /// # Errors
    /// Says which ceiling is reached, when all others are needed.
    pub async fn take(self: &Arc<Self>, unit: &str, memory: u64) -> Result<Place, String> {
        let mut asked = Vec::new();
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            let victim = {
                let mut taken = self.lock();
                let Some(shortage) = taken.shortage(unit, memory) else {
                    taken.memory.insert(unit.to_owned(), memory);
                    return Ok(Place {
                        room: Arc::clone(self),
                        unit: unit.to_owned(),
                    });
                };
                taken.victim(unit, &asked).ok_or_else(|| {
                    format!("{shortage}, and all of them are needed; raise it, or try again later")
                })?
            };
            tracing::info!(unit, victim = victim.name(), "making room");
            self.metrics.evictions.inc();
            asked.push(victim.name().to_owned());
            victim.event(Event::Evict);
            let waiting = async {
                loop {
                    tokio::select! {
                        () = freed.as_mut() => return,
                        () = tokio::time::sleep(Duration::from_millis(20)) => {
                            // It may have refused: somebody is connected.
                            if victim.occupies() && victim.settled() {
                                return;
                            }
                        }
                    }
                }
            };
            let _ = tokio::time::timeout(PATIENCE, waiting).await;
        }
    }
}
