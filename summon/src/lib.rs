//! Unikernels that exist only while somebody asks for them: a name server starts a unit when its name is looked up or its
//! port is connected to, and stops it when nobody needs it.
//!
//! * [`configuration`]: `summon.toml` and the flags of single units, checked as a whole.
//! * [`address`]: the pool from which each unit has its own address.
//! * [`dns`]: the name server in front.
//! * [`store`]: what survives the summoner's own end.
//! * [`timeline`]: what happened when in one summons.
//! * [`metrics`]: counters and times for Prometheus.
//!
//! Not here: running an instance (`kiln-monitor`) and building its image (`kiln-image`).
#![forbid(unsafe_code)]

pub mod address;
pub mod configuration;
pub mod dns;
pub mod metrics;
pub mod store;
pub mod timeline;
