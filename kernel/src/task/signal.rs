//! Signals: sending, masking, and calling handlers (`signal(7)`).
//!
//! A signal is queued on a thread or on the process. Before a thread goes back to its program it looks for signals it
//! does not block ([`deliver`]): one that is to be handled gets a frame on the program's stack, laid out as Linux lays
//! it out for x86-64, and the handler's `rt_sigreturn` takes it off again ([`leave_handler`]).

use alloc::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    vec::Vec,
};
use core::sync::atomic::Ordering;

use linux_raw_sys::general as linux;

use super::{Process, Thread, exception::Latest};
use crate::{
    Errno, Result,
    cpu::UserContext,
    file::{Readiness, WatchList},
    memory::user,
};

/// Highest signal number.
pub const MAX_SIGNAL: u8 = 64;
/// Most signals that may be queued on a thread or process.
pub const MAX_QUEUED: usize = 4096;

/// A signal number, 1 to 64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Signal(u8);

macro_rules! signals {
    ($($name:ident = $value:ident),* $(,)?) => {
        impl Signal {
            $(
                #[doc = concat!("`", stringify!($value), "`.")]
                pub const $name: Signal = Signal(linux::$value as u8);
            )*
            /// Linux's name.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Signal::$name => stringify!($value),)*
                    _ => "real-time signal",
                }
            }
        }
    };
}

signals! {
    HUP = SIGHUP, INT = SIGINT, QUIT = SIGQUIT, ILL = SIGILL, TRAP = SIGTRAP, ABRT = SIGABRT, BUS = SIGBUS,
    FPE = SIGFPE, KILL = SIGKILL, USR1 = SIGUSR1, SEGV = SIGSEGV, USR2 = SIGUSR2, PIPE = SIGPIPE, ALRM = SIGALRM,
    TERM = SIGTERM, STKFLT = SIGSTKFLT, CHLD = SIGCHLD, CONT = SIGCONT, STOP = SIGSTOP, TSTP = SIGTSTP,
    TTIN = SIGTTIN, TTOU = SIGTTOU, URG = SIGURG, XCPU = SIGXCPU, XFSZ = SIGXFSZ, VTALRM = SIGVTALRM,
    PROF = SIGPROF, WINCH = SIGWINCH, IO = SIGIO, PWR = SIGPWR, SYS = SIGSYS,
}

impl core::fmt::Debug for Signal {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(formatter, "{} ({})", self.name(), self.0)
    }
}

/// What happens to a signal without a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DefaultAction {
    Terminate,
    Ignore,
    Stop,
}

impl Signal {
    /// From a number.
    ///
    /// # Errors
    /// `EINVAL` outside 1 to 64.
    pub fn new(number: u64) -> Result<Signal> {
        match u8::try_from(number) {
            Ok(number @ 1..=MAX_SIGNAL) => Ok(Signal(number)),
            _ => Err(Errno::EINVAL),
        }
    }

    /// The number.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }

    fn default_action(self) -> DefaultAction {
        match self {
            Signal::CHLD | Signal::URG | Signal::WINCH | Signal::CONT => DefaultAction::Ignore,
            Signal::STOP | Signal::TSTP | Signal::TTIN | Signal::TTOU => DefaultAction::Stop,
            _ => DefaultAction::Terminate,
        }
    }

    fn is_real_time(self) -> bool {
        self.0 >= 32
    }
}

/// A set of signals, as Linux's `sigset_t`: bit `n - 1` for signal `n`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SignalSet(pub u64);

impl SignalSet {
    /// Signals that cannot be blocked.
    const UNBLOCKABLE: u64 = 1 << (linux::SIGKILL - 1) | 1 << (linux::SIGSTOP - 1);

    /// The set as a mask: without `SIGKILL` and `SIGSTOP`.
    #[must_use]
    pub fn as_mask(self) -> SignalSet {
        SignalSet(self.0 & !Self::UNBLOCKABLE)
    }

    /// Whether a signal is in it.
    #[must_use]
    pub fn contains(self, signal: Signal) -> bool {
        self.0 & 1 << (signal.0 - 1) != 0
    }

    /// Puts a signal in.
    pub fn insert(&mut self, signal: Signal) {
        self.0 |= 1 << (signal.0 - 1);
    }
}

/// A signal with what is told about it: Linux's `siginfo_t`.
#[derive(Clone, Copy, Debug)]
pub struct SignalInfo {
    /// The signal.
    pub signal: Signal,
    /// `si_code`.
    pub code: i32,
    /// `si_errno`.
    pub errno: i32,
    /// Bytes 16 to 31 of `siginfo_t`: what they mean depends on the code.
    pub fields: [u64; 2],
}

/// Size of `siginfo_t` in bytes.
pub const INFO_SIZE: usize = 128;

impl SignalInfo {
    /// A signal that the kernel sends of itself (`SI_KERNEL`).
    #[must_use]
    pub fn from_kernel(signal: Signal) -> SignalInfo {
        SignalInfo {
            signal,
            code: 0x80,
            errno: 0,
            fields: [0; 2],
        }
    }

    /// A signal sent with `kill(2)` (`code` = `SI_USER`) or `tgkill(2)` (`SI_TKILL`).
    #[must_use]
    pub fn from_user(signal: Signal, code: i32, process: u32, uid: u32) -> SignalInfo {
        SignalInfo {
            signal,
            code,
            errno: 0,
            fields: [u64::from(process) | u64::from(uid) << 32, 0],
        }
    }

    /// A signal for a fault at an address.
    #[must_use]
    pub fn fault(signal: Signal, code: i32, address: u64) -> SignalInfo {
        SignalInfo {
            signal,
            code,
            errno: 0,
            fields: [address, 0],
        }
    }

    /// The bytes of `siginfo_t`.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; INFO_SIZE] {
        let mut bytes = [0; INFO_SIZE];
        bytes[0..4].copy_from_slice(&i32::from(self.signal.0).to_le_bytes());
        bytes[4..8].copy_from_slice(&self.errno.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.code.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.fields[0].to_le_bytes());
        bytes[24..32].copy_from_slice(&self.fields[1].to_le_bytes());
        bytes
    }

    /// From the bytes that a program gave (`rt_sigqueueinfo(2)`).
    #[must_use]
    pub fn from_bytes(signal: Signal, bytes: &[u8; INFO_SIZE]) -> SignalInfo {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        SignalInfo {
            signal,
            errno: (word(0) >> 32) as i32,
            code: word(8) as i32,
            fields: [word(16), word(24)],
        }
    }
}

/// What a program wants done with a signal: Linux's `struct sigaction`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Action {
    /// Handler's address; 0 is the default, 1 is to ignore.
    pub handler: u64,
    /// `SA_*`.
    pub flags: u64,
    /// Where a handler returns to.
    pub restorer: u64,
    /// Blocked while the handler runs.
    pub mask: u64,
}

const DEFAULT: u64 = 0;
const IGNORE: u64 = 1;

/// Queued signals: standard ones once each, real-time ones each time.
#[derive(Default)]
pub struct SignalQueue {
    set: SignalSet,
    queue: VecDeque<SignalInfo>,
}

impl SignalQueue {
    fn push(&mut self, info: SignalInfo) {
        if !info.signal.is_real_time() && self.set.contains(info.signal) {
            return;
        }
        if self.queue.len() < MAX_QUEUED {
            self.set.insert(info.signal);
            self.queue.push_back(info);
        }
    }

    fn take(&mut self, allowed: impl Fn(Signal) -> bool) -> Option<SignalInfo> {
        // Lowest number first, and first come first served within a number.
        let (index, _) = self
            .queue
            .iter()
            .enumerate()
            .filter(|(_, info)| allowed(info.signal))
            .min_by_key(|(index, info)| (info.signal, *index))?;
        let info = self.queue.remove(index)?;
        if !self.queue.iter().any(|other| other.signal == info.signal) {
            self.set.0 &= !(1 << (info.signal.0 - 1));
        }
        Some(info)
    }

    fn discard(&mut self, signal: Signal) {
        self.queue.retain(|info| info.signal != signal);
        self.set.0 &= !(1 << (signal.0 - 1));
    }

    /// Which signals are queued.
    #[must_use]
    pub fn set(&self) -> SignalSet {
        self.set
    }
}

/// Signals of a process.
pub struct ProcessSignals {
    actions: [Action; MAX_SIGNAL as usize],
    pending: SignalQueue,
    /// Told of every signal that is queued: `signalfd(2)`.
    watchers: Arc<WatchList>,
}

impl Default for ProcessSignals {
    fn default() -> ProcessSignals {
        ProcessSignals {
            actions: [Action::default(); MAX_SIGNAL as usize],
            pending: SignalQueue::default(),
            watchers: Arc::new(WatchList::new()),
        }
    }
}

/// Signals of a thread.
pub struct ThreadSignals {
    mask: SignalSet,
    /// The mask to go back to when a temporary one ends.
    saved_mask: Option<SignalSet>,
    pending: SignalQueue,
    alternate: AlternateStack,
    /// Signals that `sigtimedwait(2)` waits for now.
    awaited: SignalSet,
    /// What handlers are told of the latest exception.
    pub exception: Latest,
}

/// `sigaltstack(2)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AlternateStack {
    /// Lowest address.
    pub base: u64,
    /// Bytes; 0: none.
    pub size: u64,
    /// `SS_AUTODISARM` if asked for.
    pub flags: u32,
}

const SS_AUTODISARM: u32 = 1 << 31;

impl AlternateStack {
    fn contains(&self, stack_pointer: u64) -> bool {
        self.size != 0 && stack_pointer > self.base && stack_pointer - self.base <= self.size
    }

    /// `ss_flags` as told to the program whose stack pointer this is.
    #[must_use]
    pub fn state(&self, stack_pointer: u64) -> u32 {
        if self.size == 0 {
            linux::SS_DISABLE
        } else if self.contains(stack_pointer) && self.flags & SS_AUTODISARM == 0 {
            linux::SS_ONSTACK | self.flags
        } else {
            self.flags
        }
    }
}

impl ThreadSignals {
    /// No signal pending.
    #[must_use]
    pub fn new(mask: SignalSet) -> ThreadSignals {
        ThreadSignals {
            mask,
            saved_mask: None,
            pending: SignalQueue::default(),
            alternate: AlternateStack::default(),
            awaited: SignalSet::default(),
            exception: Latest::default(),
        }
    }

    /// Blocked signals.
    #[must_use]
    pub fn mask(&self) -> SignalSet {
        self.mask
    }
}

/// A list of watchers told whenever a signal is queued for `process`.
pub fn watchers(process: &Process) -> Arc<WatchList> {
    Arc::clone(&process.signals.lock().watchers)
}

/// Whether a signal without anybody blocking or awaiting it would be dropped.
fn is_ignored(process: &Process, signal: Signal) -> bool {
    let action = process.signals.lock().actions[usize::from(signal.0 - 1)];
    match action.handler {
        IGNORE => true,
        DEFAULT => signal.default_action() == DefaultAction::Ignore,
        _ => false,
    }
}

/// Sends a signal to one thread.
pub fn send_to_thread(thread: &Thread, info: SignalInfo) {
    {
        let mut signals = thread.signals.lock();
        let wanted = signals.mask.contains(info.signal)
            || signals.awaited.contains(info.signal)
            || signals
                .saved_mask
                .is_some_and(|mask| mask.contains(info.signal));
        if !wanted && is_ignored(&thread.process, info.signal) {
            return;
        }
        signals.pending.push(info);
    }
    let watchers = watchers(&thread.process);
    watchers.notify(Readiness::READABLE);
    thread.wake();
}

/// Sends a signal to a process: any of its threads that does not block it takes it.
pub fn send_to_process(process: &Process, info: SignalInfo) {
    let threads: Vec<Arc<Thread>> = process.threads.lock().values().cloned().collect();
    let blocked_everywhere = threads.iter().all(|thread| {
        let signals = thread.signals.lock();
        signals.mask.contains(info.signal) || signals.awaited.contains(info.signal)
    });
    if !blocked_everywhere && is_ignored(process, info.signal) {
        return;
    }
    let watchers = {
        let mut signals = process.signals.lock();
        signals.pending.push(info);
        Arc::clone(&signals.watchers)
    };
    watchers.notify(Readiness::READABLE);
    // Wake one that can take it; if all block it, it stays queued.
    let taker = threads.iter().find(|thread| {
        let signals = thread.signals.lock();
        signals.awaited.contains(info.signal) || !signals.mask.contains(info.signal)
    });
    if let Some(taker) = taker {
        taker.wake();
    }
}

/// Takes a queued signal out of `set`, thread's first, whether blocked or not (`sigtimedwait`, `signalfd`).
pub fn take_from(thread: &Thread, set: SignalSet) -> Option<SignalInfo> {
    let own = thread
        .signals
        .lock()
        .pending
        .take(|signal| set.contains(signal));
    own.or_else(|| {
        thread
            .process
            .signals
            .lock()
            .pending
            .take(|signal| set.contains(signal))
    })
}

/// Signals queued for the thread or its process.
pub fn pending(thread: &Thread) -> SignalSet {
    let own = thread.signals.lock().pending.set();
    SignalSet(own.0 | thread.process.signals.lock().pending.set().0)
}

/// Declares which signals `sigtimedwait(2)` waits for.
pub fn set_awaited(thread: &Thread, set: SignalSet) {
    thread.signals.lock().awaited = set;
}

/// Changes the mask (`rt_sigprocmask(2)`); returns the old one.
///
/// # Errors
/// `EINVAL` for an unknown `how`.
pub fn change_mask(thread: &Thread, how: u32, set: SignalSet) -> Result<()> {
    let mut signals = thread.signals.lock();
    let new = match how {
        linux::SIG_BLOCK => signals.mask.0 | set.0,
        linux::SIG_UNBLOCK => signals.mask.0 & !set.0,
        linux::SIG_SETMASK => set.0,
        _ => return Err(Errno::EINVAL),
    };
    signals.mask = SignalSet(new).as_mask();
    drop(signals);
    thread.attention.store(true, Ordering::Relaxed);
    Ok(())
}

/// See [`Thread::set_temporary_mask`].
pub fn set_temporary_mask(thread: &Thread, mask: SignalSet) {
    let mut signals = thread.signals.lock();
    let old = signals.mask;
    signals.saved_mask.get_or_insert(old);
    signals.mask = mask.as_mask();
    drop(signals);
    thread.attention.store(true, Ordering::Relaxed);
}

/// Ends a temporary mask that no handler took over.
pub fn end_temporary_mask(thread: &Thread) {
    let mut signals = thread.signals.lock();
    if let Some(mask) = signals.saved_mask.take() {
        signals.mask = mask;
        drop(signals);
        thread.attention.store(true, Ordering::Relaxed);
    }
}

/// Reads and replaces the action of a signal.
///
/// # Errors
/// `EINVAL` for `SIGKILL` and `SIGSTOP`.
pub fn action(process: &Process, signal: Signal, new: Option<Action>) -> Result<Action> {
    if new.is_some() && matches!(signal, Signal::KILL | Signal::STOP) {
        return Err(Errno::EINVAL);
    }
    let old = {
        let mut signals = process.signals.lock();
        let slot = &mut signals.actions[usize::from(signal.0 - 1)];
        let old = *slot;
        if let Some(new) = new {
            *slot = new;
        }
        old
    };
    if new.is_some() && is_ignored(process, signal) {
        process.signals.lock().pending.discard(signal);
        for thread in process.threads.lock().values() {
            thread.signals.lock().pending.discard(signal);
        }
    }
    Ok(old)
}

/// Reads and replaces the alternate stack.
///
/// # Errors
/// `EPERM` while running on it, `ENOMEM` when too small, `EINVAL` for unknown flags.
pub fn alternate_stack(
    thread: &Thread,
    stack_pointer: u64,
    new: Option<(u64, u64, u32)>,
) -> Result<AlternateStack> {
    let mut signals = thread.signals.lock();
    let old = signals.alternate;
    if let Some((base, size, flags)) = new {
        if old.contains(stack_pointer) && old.flags & SS_AUTODISARM == 0 {
            return Err(Errno::EPERM);
        }
        let mode = flags & !SS_AUTODISARM;
        signals.alternate = match mode {
            linux::SS_DISABLE => AlternateStack::default(),
            0 | linux::SS_ONSTACK => {
                if size < u64::from(linux::MINSIGSTKSZ) {
                    return Err(Errno::ENOMEM);
                }
                AlternateStack {
                    base,
                    size,
                    flags: flags & SS_AUTODISARM,
                }
            }
            _ => return Err(Errno::EINVAL),
        };
    }
    Ok(old)
}

/// An interrupted system call, should it be made again.
#[derive(Clone, Copy, Debug)]
pub struct Interrupted {
    /// Its number.
    pub number: u64,
    /// Whether `SA_RESTART` makes it again.
    pub restartable: bool,
}

/// What a thread does after looking at its signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Goes on (perhaps in a handler).
    Continue,
    /// The process ends by this signal.
    Terminate(SignalInfoEnd),
    /// Stops until `SIGCONT`.
    Stop,
}

/// The signal that ended a process, and where it hurt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalInfoEnd {
    /// The signal.
    pub signal: Signal,
    /// `si_code`.
    pub code: i32,
    /// `si_addr`, for faults.
    pub address: u64,
}

/// Length of the frame's fixed part: return address, `ucontext`, `siginfo`.
const FRAME: usize = 8 + UCONTEXT + INFO_SIZE;
/// Length of `struct ucontext` as the kernel lays it out.
const UCONTEXT: usize = 8 + 8 + 24 + SIGCONTEXT + 8;
/// Length of `struct sigcontext`.
const SIGCONTEXT: usize = 256;
/// `fpstate` pointer in the frame.
const FPSTATE_AT: usize = 8 + 40 + 23 * 8;
/// Signal mask in the frame.
const MASK_AT: usize = 8 + 40 + SIGCONTEXT;
/// Bytes below the stack pointer that a program may use without moving it (System V ABI).
const RED_ZONE: u64 = 128;
/// Marks an XSAVE image in a frame: `FP_XSTATE_MAGIC1` and `2`.
const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
/// `UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS`.
const UC_FLAGS: u64 = 0x7;

/// Looks for signals and acts on the first that is to be handled. Called before a thread goes back to its program.
pub fn deliver(
    thread: &Arc<Thread>,
    context: &mut UserContext,
    mut interrupted: Option<Interrupted>,
) -> Delivery {
    thread.attention.store(false, Ordering::Relaxed);
    let mut handled = false;
    let delivery = loop {
        let mask = thread.signals.lock().mask;
        let Some(info) = take_from(thread, SignalSet(!mask.0)) else {
            break Delivery::Continue;
        };
        let slot = usize::from(info.signal.0 - 1);
        let action = thread.process.signals.lock().actions[slot];
        let fatal = Delivery::Terminate(SignalInfoEnd {
            signal: info.signal,
            code: info.code,
            address: info.fields[0],
        });
        match action.handler {
            IGNORE => continue,
            DEFAULT => match info.signal.default_action() {
                DefaultAction::Ignore => continue,
                DefaultAction::Stop => break Delivery::Stop,
                DefaultAction::Terminate => break fatal,
            },
            _ => {}
        }
        if let Some(call) = interrupted.take() {
            finish_interrupted(
                context,
                call,
                action.flags & u64::from(linux::SA_RESTART) != 0,
            );
        }
        if enter_handler(thread, context, &action, &info).is_err() {
            // No room on the stack: Linux ends the program with SIGSEGV.
            break Delivery::Terminate(SignalInfoEnd {
                signal: Signal::SEGV,
                code: 0x80,
                address: context.registers.rsp,
            });
        }
        if action.flags & u64::from(linux::SA_RESETHAND) != 0 {
            thread.process.signals.lock().actions[slot] = Action::default();
        }
        handled = true;
    };
    if let Some(call) = interrupted {
        // No handler ran: the call is made again as if nothing had happened.
        finish_interrupted(
            context,
            Interrupted {
                restartable: true,
                ..call
            },
            true,
        );
    } else if !handled {
        end_temporary_mask(thread);
    }
    delivery
}

fn finish_interrupted(context: &mut UserContext, call: Interrupted, restart: bool) {
    if restart && call.restartable {
        // Back onto the two bytes of the `syscall` instruction.
        context.registers.rip = context.registers.rip.wrapping_sub(2);
        context.registers.rax = call.number;
    } else {
        context.registers.rax = (-i64::from(Errno::EINTR.number())) as u64;
    }
}

fn enter_handler(
    thread: &Arc<Thread>,
    context: &mut UserContext,
    action: &Action,
    info: &SignalInfo,
) -> Result<()> {
    let cpu = &thread.kernel().cpu;
    let mut image = cpu.save_extended(context);
    let components = cpu.extended_mask();
    let size = image.len() as u32;
    if components != 0 {
        // The words of the FXSAVE area that software may use (`struct _fpx_sw_bytes`).
        image[464..468].copy_from_slice(&MAGIC1.to_le_bytes());
        image[468..472].copy_from_slice(&(size + 4).to_le_bytes());
        image[472..480].copy_from_slice(&components.to_le_bytes());
        image[480..484].copy_from_slice(&size.to_le_bytes());
        image[484..512].fill(0);
        image.extend_from_slice(&MAGIC2.to_le_bytes());
    }

    let mut signals = thread.signals.lock();
    let registers = &mut context.registers;
    let alternate = signals.alternate;
    let switch = action.flags & u64::from(linux::SA_ONSTACK) != 0
        && alternate.size != 0
        && !alternate.contains(registers.rsp);
    let top = if switch {
        alternate.base + alternate.size
    } else {
        registers.rsp.wrapping_sub(RED_ZONE)
    };
    let fpstate = top.wrapping_sub(image.len() as u64) & !63;
    let frame = (fpstate.wrapping_sub(FRAME as u64) & !15).wrapping_sub(8);

    let mut bytes = [0u8; FRAME];
    let mut put = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    put(0, action.restorer);
    put(
        8,
        if components != 0 {
            UC_FLAGS
        } else {
            UC_FLAGS & !1
        },
    );
    put(24, alternate.base);
    put(32, u64::from(alternate.state(registers.rsp)));
    put(40, alternate.size);
    let r = &registers;
    let words = [
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx,
        r.rax, r.rcx, r.rsp, r.rip, r.rflags,
    ];
    for (index, word) in words.into_iter().enumerate() {
        put(48 + index * 8, word);
    }
    // cs, gs, fs, ss: the selectors of a 64-bit program.
    put(48 + 18 * 8, 0x33 | 0x2b << 48);
    let exception = signals.exception;
    put(48 + 19 * 8, exception.error.into());
    put(48 + 20 * 8, exception.number.into());
    let restore_mask = signals.saved_mask.unwrap_or(signals.mask);
    put(48 + 21 * 8, restore_mask.0);
    put(48 + 22 * 8, exception.address);
    put(FPSTATE_AT, fpstate);
    put(MASK_AT, restore_mask.0);
    bytes[8 + UCONTEXT..].copy_from_slice(&info.to_bytes());

    user::write_bytes(fpstate, &image)?;
    user::write_bytes(frame, &bytes)?;

    cpu.reset_extended(context);
    let registers = &mut context.registers;
    registers.rsp = frame;
    registers.rip = action.handler;
    registers.rax = 0;
    registers.rdi = u64::from(info.signal.0);
    registers.rsi = frame + 8 + UCONTEXT as u64;
    registers.rdx = frame + 8;
    // Direction, trap, resume flags off.
    registers.rflags &= !0x1_0500;

    let mut mask = signals.mask.0 | action.mask;
    if action.flags & u64::from(linux::SA_NODEFER) == 0 {
        mask |= 1 << (info.signal.0 - 1);
    }
    signals.mask = SignalSet(mask).as_mask();
    signals.saved_mask = None;
    if switch && alternate.flags & SS_AUTODISARM != 0 {
        signals.alternate = AlternateStack::default();
    }
    Ok(())
}

/// `rt_sigreturn(2)`: takes the frame off again.
///
/// # Errors
/// `EFAULT` when the frame cannot be read: the program ends with `SIGSEGV`.
pub fn leave_handler(thread: &Arc<Thread>, context: &mut UserContext) -> Result<()> {
    // The handler's return took the return address off.
    let frame = context.registers.rsp.wrapping_sub(8);
    let mut bytes = [0u8; FRAME];
    user::UserRange::new(frame, FRAME as u64)?.read(&mut bytes)?;
    let get = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let fpstate = get(FPSTATE_AT);
    let cpu = &thread.kernel().cpu;
    if fpstate != 0 {
        let image = user::read_bytes(fpstate, cpu.extended_size())?;
        cpu.load_extended(context, &image)
            .map_err(|_| Errno::EFAULT)?;
    }
    let r = &mut context.registers;
    for (index, register) in [
        &mut r.r8,
        &mut r.r9,
        &mut r.r10,
        &mut r.r11,
        &mut r.r12,
        &mut r.r13,
        &mut r.r14,
        &mut r.r15,
        &mut r.rdi,
        &mut r.rsi,
        &mut r.rbp,
        &mut r.rbx,
        &mut r.rdx,
        &mut r.rax,
        &mut r.rcx,
        &mut r.rsp,
        &mut r.rip,
        &mut r.rflags,
    ]
    .into_iter()
    .enumerate()
    {
        *register = get(48 + index * 8);
    }
    // A jump to a non-canonical address would fault in the kernel's own last instruction.
    if r.rip >= 1 << 47 {
        return Err(Errno::EFAULT);
    }
    let stack = (get(24), get(40), get(32) as u32);
    let mut signals = thread.signals.lock();
    signals.mask = SignalSet(get(MASK_AT)).as_mask();
    if stack.1 != 0 {
        signals.alternate = AlternateStack {
            base: stack.0,
            size: stack.1,
            flags: stack.2 & SS_AUTODISARM,
        };
    }
    drop(signals);
    thread.attention.store(true, Ordering::Relaxed);
    Ok(())
}

/// A fault of the program's own: its signal cannot be blocked or ignored.
pub fn force(thread: &Arc<Thread>, info: SignalInfo) {
    let process = &thread.process;
    let slot = usize::from(info.signal.0 - 1);
    let blocked = thread.signals.lock().mask.contains(info.signal);
    {
        let mut signals = process.signals.lock();
        if blocked || signals.actions[slot].handler == IGNORE {
            signals.actions[slot] = Action::default();
        }
    }
    let mut signals = thread.signals.lock();
    signals.mask.0 &= !(1 << (info.signal.0 - 1));
    signals.pending.push(info);
    drop(signals);
    thread.attention.store(true, Ordering::Relaxed);
}

/// Timers that send signals.
#[derive(Default)]
pub struct ProcessTimers {
    /// `timer_create(2)`'s, by identifier.
    pub posix: BTreeMap<i32, PosixTimer>,
    /// `ITIMER_REAL`.
    pub real: PosixTimerState,
    /// Counts settings, so that a task of an older setting knows that it is stale.
    pub generation: u64,
}

/// A timer of `timer_create(2)`.
#[derive(Clone, Debug)]
pub struct PosixTimer {
    /// Clock (`CLOCK_*`).
    pub clock: u32,
    /// The signal to send, or none (`SIGEV_NONE`).
    pub signal: Option<Signal>,
    /// The thread to send it to (`SIGEV_THREAD_ID`).
    pub thread: Option<u32>,
    /// `sigev_value`.
    pub value: u64,
    /// When.
    pub state: PosixTimerState,
    /// Expirations that found the signal still queued.
    pub overrun: i32,
}

/// When a timer fires.
#[derive(Clone, Copy, Debug, Default)]
pub struct PosixTimerState {
    /// Monotonic time of the next expiration; 0: disarmed.
    pub deadline: u64,
    /// Nanoseconds between expirations; 0: once.
    pub interval: u64,
    /// Which setting of the timer this is.
    pub generation: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_signals_queue_once_and_lowest_goes_first() {
        let mut queue = SignalQueue::default();
        for number in [15, 15, 10, 34, 34] {
            queue.push(SignalInfo::from_kernel(Signal::new(number).unwrap()));
        }
        let order: Vec<u8> = core::iter::from_fn(|| queue.take(|_| true))
            .map(|info| info.signal.number())
            .collect();
        assert_eq!(order, [10, 15, 34, 34]);
        assert_eq!(queue.set(), SignalSet(0));
    }

    #[test]
    fn signal_information_survives_its_bytes() {
        let info = SignalInfo::from_user(Signal::TERM, 0, 7, 1000);
        let bytes = info.to_bytes();
        let again = SignalInfo::from_bytes(Signal::TERM, &bytes);
        assert_eq!(again.fields, info.fields);
        assert_eq!(again.code, info.code);
    }

    #[test]
    fn frame_offsets_are_linux_s() {
        // struct rt_sigframe: pretcode 8, ucontext (flags 8, link 8, stack 24, sigcontext 256, mask 8), siginfo 128.
        assert_eq!(FRAME, 440);
        assert_eq!(FPSTATE_AT, 232);
        assert_eq!(MASK_AT, 304);
    }
}
