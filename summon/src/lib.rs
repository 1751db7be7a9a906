//! Unikernels that exist only while somebody asks for them: a name server starts a unit when its name is looked up or its
//! port is connected to, and stops it when nobody needs it.
//!
//! * [`configuration`]: `summon.toml` and the flags of single units, checked as a whole.
//! * [`address`]: the pool from which each unit has its own address.
//! * [`dns`]: the name server in front.
//! * [`summoner`]: brings all of it together; [`control`] is how commands speak to it.
//! * [`front`]: ports that several units share. [`interface`]: addresses on a bridge.
//! * [`unit`]: the life of each unit: a state machine, and the task that does what it says.
//! * [`room`]: ceilings for all units together.
//! * [`store`]: what survives the summoner's own end.
//! * [`timeline`]: what happened when in one summons.
//! * [`metrics`]: counters and times for Prometheus.
//!
//! Not here: running an instance (`kiln-monitor`) and building its image (`kiln-image`).
#![forbid(unsafe_code)]

pub mod address;
pub mod configuration;
pub mod control;
pub mod dns;
pub mod front;
pub mod interface;
pub mod metrics;
pub mod room;
pub mod store;
pub mod summoner;
pub mod timeline;
pub mod unit;
