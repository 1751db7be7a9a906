//! The seccomp filter of the engine `process`: all that an instance can ask of the host.
//!
//! The filter is the boundary around kernel *and* program: whoever runs code in the instance can make these calls,
//! with the descriptors that the instance holds, and no others. Everything else kills the instance. The calls on
//! the path of each request (`recvfrom`, `recvmsg`, `epoll_pwait2`) have no condition, for Linux allows such
//! calls without running the filter.
//!
//! `CONFINEMENT.md` lists the calls with their reasons.

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

/// A system call by name and number, from the name of its constant.
macro_rules! call {
    ($constant:ident) => {
        (
            stringify!($constant).trim_start_matches("SYS_"),
            libc::$constant,
        )
    };
}

/// A system call: its name and number; and the rules of which one must hold (none: always).
type Call = ((&'static str, libc::c_long), Vec<Rule>);

fn descriptor_value(number: i32) -> u64 {
    u64::from(number.unsigned_abs())
}

/// All calls.
fn calls() -> Vec<Call> {
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
            call!(SYS_mmap),
            vec![
                mapping(private | libc::MAP_ANONYMOUS, None),
                mapping(private, Some(descriptor::IMAGE)),
                mapping(libc::MAP_SHARED, Some(descriptor::POOL)),
            ],
        ),
        (
            call!(SYS_mprotect),
            vec![vec![(2, Qword, Le, HIGHEST_PROTECTION)]],
        ),
        (call!(SYS_munmap), vec![]),
        (
            call!(SYS_madvise),
            [libc::MADV_DONTNEED, libc::MADV_REMOVE]
                .map(|advice| vec![(2, Dword, Eq, u64::from(advice.unsigned_abs()))])
                .into(),
        ),
        (call!(SYS_pread64), on(0, descriptor::STATM)),
        (call!(SYS_fstat), on(0, descriptor::POOL)),
        (call!(SYS_clock_gettime), vec![]),
        (call!(SYS_timer_settime), vec![]),
        (call!(SYS_rt_sigreturn), vec![]),
        (call!(SYS_epoll_pwait2), vec![]),
        (call!(SYS_epoll_ctl), on(0, descriptor::EPOLL)),
        (call!(SYS_write), on(0, descriptor::CONSOLE)),
        (call!(SYS_getrandom), vec![]),
        (
            call!(SYS_sendto),
            vec![vec![(3, Dword, MaskedEq(fast_open), 0), (4, Qword, Eq, 0)]],
        ),
        (
            call!(SYS_sendmsg),
            vec![vec![(2, Dword, MaskedEq(fast_open), 0)]],
        ),
        (call!(SYS_recvfrom), vec![]),
        (call!(SYS_recvmsg), vec![]),
        (call!(SYS_shutdown), vec![]),
        (call!(SYS_close), vec![]),
        (call!(SYS_exit_group), vec![]),
    ]
}

/// The filter as Linux takes it: an array of `struct sock_filter`.
///
/// # Errors
/// None for the rules above, unless the crate that compiles them has limits that we do not know.
pub fn filter() -> Result<Vec<u8>, BackendError> {
    let mut rules = BTreeMap::new();
    for ((_, call), alternatives) in calls() {
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
    fn the_documentation_lists_every_call() {
        let document = include_str!("../../../../CONFINEMENT.md");
        let listed: Vec<&str> = document
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
            .map(|(name, _)| name)
            .collect();
        let calls: Vec<&str> = calls().iter().map(|((name, _), _)| *name).collect();
        assert_eq!(listed, calls);
    }
}
