//! The seccomp filter of the engine `process`: all that an instance can ask of the host.
//!
//! The filter is the boundary around kernel *and* program: whoever runs code in the instance can make these calls,
//! with the descriptors that the instance holds, and no others. Everything else kills the instance. The calls on
//! the path of each request (`recvfrom`, `recvmsg`, `epoll_pwait2`) have no condition, for Linux allows such
//! calls without running the filter.
//!
//! | call | condition | for |
//! |---|---|---|
//! | `mmap` | never writable and executable; anonymous, the image (private) or the pool (shared) | memory |
//! | `mprotect` | never writable and executable | memory |
//! | `munmap` | | memory |
//! | `madvise` | `MADV_DONTNEED`, `MADV_REMOVE` | memory |
//! | `pread64` | of its own `/proc/PID/statm` | memory limit |
//! | `fstat` | of the pool | memory limit |
//! | `clock_gettime` | | time, where the vDSO cannot |
//! | `timer_settime` | | timer |
//! | `rt_sigreturn` | | end of a signal handler |
//! | `epoll_pwait2` | | wait |
//! | `epoll_ctl` | its own epoll descriptor | wait |
//! | `write` | to the console | console |
//! | `getrandom` | | entropy |
//! | `sendto` | no address, no `MSG_FASTOPEN` | link, frames, sockets |
//! | `sendmsg` | no `MSG_FASTOPEN`, which could connect a socket | datagrams, scattered data |
//! | `recvfrom`, `recvmsg` | | link, frames, sockets |
//! | `shutdown`, `close` | | sockets |
//! | `exit_group` | | end |

use std::collections::BTreeMap;

use kiln_abi::process::descriptor;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, Le, MaskedEq};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// A condition on an argument: its number, how much of it counts, comparison, value.
type Condition = (u8, SeccompCmpArgLen, SeccompCmpOp, u64);

/// Conditions that together allow a call.
type Rule = Vec<Condition>;

/// `PROT_READ | PROT_EXEC`: above it come `PROT_WRITE | PROT_EXEC` and what does not exist.
const HIGHEST_PROTECTION: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;

fn descriptor_value(number: i32) -> u64 {
    u64::from(number.unsigned_abs())
}

/// The calls, each with the rules of which one must hold; none: always.
fn calls() -> Vec<(libc::c_long, Vec<Rule>)> {
    let on = |argument, number| vec![vec![(argument, Dword, Eq, descriptor_value(number))]];
    let mapping = |flags: i32, file: Option<i32>| {
        let mut rule = vec![
            (2, Qword, Le, HIGHEST_PROTECTION),
            (
                3,
                Qword,
                Eq,
                u64::from((flags | libc::MAP_FIXED).unsigned_abs()),
            ),
        ];
        rule.extend(file.map(|number| (4, Dword, Eq, descriptor_value(number))));
        rule
    };
    let private = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let fast_open = u64::from(libc::MSG_FASTOPEN.unsigned_abs());
    vec![
        (
            libc::SYS_mmap,
            vec![
                mapping(private | libc::MAP_ANONYMOUS, None),
                mapping(private, Some(descriptor::IMAGE)),
                mapping(libc::MAP_SHARED, Some(descriptor::POOL)),
            ],
        ),
        (
            libc::SYS_mprotect,
            vec![vec![(2, Qword, Le, HIGHEST_PROTECTION)]],
        ),
        (libc::SYS_munmap, vec![]),
        (
            libc::SYS_madvise,
            [libc::MADV_DONTNEED, libc::MADV_REMOVE]
                .map(|advice| vec![(2, Dword, Eq, u64::from(advice.unsigned_abs()))])
                .into(),
        ),
        (libc::SYS_pread64, on(0, descriptor::STATM)),
        (libc::SYS_fstat, on(0, descriptor::POOL)),
        (libc::SYS_clock_gettime, vec![]),
        (libc::SYS_timer_settime, vec![]),
        (libc::SYS_rt_sigreturn, vec![]),
        (libc::SYS_epoll_pwait2, vec![]),
        (libc::SYS_epoll_ctl, on(0, descriptor::EPOLL)),
        (libc::SYS_write, on(0, descriptor::CONSOLE)),
        (libc::SYS_getrandom, vec![]),
        (
            libc::SYS_sendto,
            vec![vec![(3, Dword, MaskedEq(fast_open), 0), (4, Qword, Eq, 0)]],
        ),
        (
            libc::SYS_sendmsg,
            vec![vec![(2, Dword, MaskedEq(fast_open), 0)]],
        ),
        (libc::SYS_recvfrom, vec![]),
        (libc::SYS_recvmsg, vec![]),
        (libc::SYS_shutdown, vec![]),
        (libc::SYS_close, vec![]),
        (libc::SYS_exit_group, vec![]),
    ]
}

/// The filter as Linux takes it: an array of `struct sock_filter`.
///
/// # Errors
/// None for the rules above, unless the crate that compiles them has limits that we do not know.
pub fn filter() -> Result<Vec<u8>, BackendError> {
    let mut rules = BTreeMap::new();
    for (call, alternatives) in calls() {
        let mut compiled = Vec::new();
        for rule in alternatives {
            let conditions: Result<Vec<_>, _> = rule
                .into_iter()
                .map(|(argument, length, operator, value)| {
                    SeccompCondition::new(argument, length, operator, value)
                })
                .collect();
            compiled.push(SeccompRule::new(conditions?)?);
        }
        rules.insert(call, compiled);
    }
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    let program: BpfProgram = filter.try_into()?;
    Ok(program
        .iter()
        .flat_map(|instruction| {
            let [a, b] = instruction.code.to_ne_bytes();
            let [c, d, e, f] = instruction.k.to_ne_bytes();
            [a, b, instruction.jt, instruction.jf, c, d, e, f]
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::{calls, filter};

    #[test]
    fn the_filter_compiles_and_fits() {
        let bytes = filter().unwrap();
        assert_eq!(bytes.len() % 8, 0);
        assert!(bytes.len() / 8 < 4096);
    }

    #[test]
    fn the_table_above_lists_every_call() {
        assert_eq!(calls().len(), 21);
        let source = include_str!("filter.rs");
        let listed = source
            .lines()
            .filter(|line| line.starts_with("//! | `"))
            .count();
        // Two lines of the table name two calls.
        assert_eq!(listed + 2, calls().len());
    }
}
