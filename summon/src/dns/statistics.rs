//! What the name server counts, since it was started.

use std::sync::atomic::{AtomicU64, Ordering};

use hickory_proto::{op::ResponseCode, rr::RecordType};

use super::answer::Sent;

macro_rules! counters {
    ($($(#[$meaning:meta])* $name:ident,)*) => {
        /// What has been counted.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Statistics {
            $($(#[$meaning])* pub $name: u64,)*
        }

        impl Statistics {
            /// All, by name: for metrics.
            pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }

        #[derive(Default)]
        pub(super) struct Counters {
            $(pub $name: AtomicU64,)*
        }

        impl Counters {
            pub fn read(&self) -> Statistics {
                Statistics {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                }
            }
        }
    };
}

counters! {
    /// Messages that came over UDP, whatever they were.
    udp,
    /// Messages that came over TCP.
    tcp,
    /// Queries for A that were answered from here.
    query_a,
    /// For AAAA.
    query_aaaa,
    /// For PTR.
    query_ptr,
    /// For SOA.
    query_soa,
    /// For NS.
    query_ns,
    /// For ANY.
    query_any,
    /// For other types.
    query_other,
    /// Answers without error, empty ones included.
    answer_noerror,
    /// "There is no such name."
    answer_nxdomain,
    /// SERVFAIL: a unit did not become ready, or no other name server answered.
    answer_servfail,
    /// REFUSED: not ours, and not to be asked of others.
    answer_refused,
    /// FORMERR: only the header could be read.
    answer_formerr,
    /// NOTIMP.
    answer_notimp,
    /// Others.
    answer_other,
    /// Answers that did not fit and said so.
    truncated,
    /// Queries passed on to other name servers.
    forwarded,
    /// Those of them to which no usable answer came.
    forward_failed,
    /// Answers that did not match what had been asked of others: mistaken or forged.
    forward_mismatched,
    /// Queries that waited for a unit.
    waited,
    /// Repeated by the client while it waited: answered once.
    repeated,
    /// Messages dropped because they were no queries: too short, or answers.
    dropped_malformed,
    /// Dropped because too many were waiting.
    dropped_busy,
    /// TCP connections.
    connections,
    /// TCP connections closed at once because there were too many.
    connections_refused,
    /// Answers that could not be sent.
    unsent,
}

/// One more.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    pub fn sent(&self, sent: Sent) {
        if let Some(kind) = sent.kind {
            count(match kind {
                RecordType::A => &self.query_a,
                RecordType::AAAA => &self.query_aaaa,
                RecordType::PTR => &self.query_ptr,
                RecordType::SOA => &self.query_soa,
                RecordType::NS => &self.query_ns,
                RecordType::ANY => &self.query_any,
                _ => &self.query_other,
            });
        }
        self.code(sent.code);
        if sent.truncated {
            count(&self.truncated);
        }
    }

    pub fn code(&self, code: ResponseCode) {
        count(match code {
            ResponseCode::NoError => &self.answer_noerror,
            ResponseCode::NXDomain => &self.answer_nxdomain,
            ResponseCode::ServFail => &self.answer_servfail,
            ResponseCode::Refused => &self.answer_refused,
            ResponseCode::FormErr => &self.answer_formerr,
            ResponseCode::NotImp => &self.answer_notimp,
            _ => &self.answer_other,
        });
    }
}
