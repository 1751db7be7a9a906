//! The life of a thread: run the program, handle its traps, go on.

use alloc::{borrow::Cow, boxed::Box, string::String, sync::Arc};
use core::{
    future::{Future, poll_fn},
    sync::atomic::Ordering,
    task::Poll,
};

use kiln_abi::host::{TrapKind, exit_code};

use super::{
    Signal, Thread, exception,
    executor::yield_now,
    signal::{self, Delivery, Interrupted},
};
use crate::{
    Errno,
    boot::symbols,
    cpu::UserContext,
    memory::user,
    syscall::{self, Call, Outcome, Restart},
    trace::{
        self,
        unwind::{Frame, Module},
    },
};

/// System calls after which a thread lets the main loop look at events, even if none is known: so that a program that
/// never waits still sees the world. (The timer does the same for one that makes no calls.)
const CALLS_PER_TURN: u32 = 64;

/// Runs a thread until it ends.
pub async fn run(thread: Arc<Thread>, mut context: Box<UserContext>) {
    let waker = poll_fn(|task| Poll::Ready(task.waker().clone())).await;
    *thread.waker.lock() = Some(waker);
    {
        let mut life = core::pin::pin!(life(&thread, &mut context));
        let clock = &thread.kernel().clock;
        poll_fn(|task| {
            let before = clock.monotonic();
            thread.running_since.store(before, Ordering::Relaxed);
            let state = life.as_mut().poll(task);
            thread.running_since.store(0, Ordering::Relaxed);
            thread
                .cpu_time
                .fetch_add(clock.monotonic().saturating_sub(before), Ordering::Relaxed);
            state
        })
        .await;
    }
    thread.kernel().cpu.forget(&mut context);
    end(&thread);
}

async fn life(thread: &Arc<Thread>, context: &mut UserContext) {
    let kernel = Arc::clone(thread.kernel());
    let mut calls = 0;
    loop {
        if thread.has_attention() && !attend(thread, context, None).await {
            return;
        }
        kernel.arm_tick();
        let (kind, trap) = kernel.cpu.run(context);
        match kind {
            TrapKind::SystemCall => {
                if !system_call(thread, context).await {
                    return;
                }
                calls += 1;
                if calls >= CALLS_PER_TURN || kernel.cpu.has_pending() {
                    calls = 0;
                    kernel.request_events();
                    yield_now().await;
                }
            }
            TrapKind::Event => {
                calls = 0;
                kernel.request_events();
                yield_now().await;
            }
            _ => exception::take(thread, context, kind, trap),
        }
    }
}

/// Looks at signals and at the end of the process. False when the thread is to end.
async fn attend(
    thread: &Arc<Thread>,
    context: &mut UserContext,
    interrupted: Option<Interrupted>,
) -> bool {
    if thread.process.exiting().is_some() {
        return false;
    }
    match signal::deliver(thread, context, interrupted) {
        Delivery::Continue => true,
        Delivery::Terminate(end) => {
            report_end(thread, context, end);
            thread
                .process
                .exit(exit_code::SIGNAL_BASE + i32::from(end.signal.number()));
            false
        }
        Delivery::Stop => {
            // Stopped: only SIGCONT or SIGKILL get it going again.
            let waiting = Arc::clone(thread);
            poll_fn(move |_| {
                let wanted = {
                    let mut set = super::SignalSet::default();
                    set.insert(Signal::CONT);
                    set.insert(Signal::KILL);
                    set
                };
                if signal::pending(&waiting).0 & wanted.0 != 0
                    || waiting.process.exiting().is_some()
                {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            })
            .await;
            thread.attention.store(true, Ordering::Relaxed);
            true
        }
    }
}

/// Makes the system call that the registers describe. False when the thread is to end.
async fn system_call(thread: &Arc<Thread>, context: &mut UserContext) -> bool {
    let registers = &context.registers;
    let number = registers.rax;
    let arguments = [
        registers.rdi,
        registers.rsi,
        registers.rdx,
        registers.r10,
        registers.r8,
        registers.r9,
    ];
    let outcome = syscall::table::dispatch(
        &mut Call {
            thread,
            context,
            arguments,
        },
        number,
    );
    let result = match outcome {
        Outcome::Done(result) => result,
        Outcome::Registers => return true,
        Outcome::Exit => return false,
        Outcome::Wait(mut future, restart) => {
            let waited = poll_fn(|task| {
                if let Poll::Ready(result) = future.as_mut().poll(task) {
                    return Poll::Ready(Some(result));
                }
                if thread.has_attention() && needs_interruption(thread) {
                    return Poll::Ready(None);
                }
                Poll::Pending
            })
            .await;
            drop(future);
            match waited {
                Some(result) => result,
                None => {
                    trace::system_call(thread, number, &arguments, None);
                    let interrupted = Interrupted {
                        number,
                        restartable: restart == Restart::WithFlag,
                    };
                    return attend(thread, context, Some(interrupted)).await;
                }
            }
        }
    };
    trace::system_call(thread, number, &arguments, Some(result));
    context.registers.rax = match result {
        Ok(value) => value,
        Err(error) => (-i64::from(error.number())) as u64,
    };
    true
}

/// Whether a waiting call must be given up: the end, or a signal that is not blocked.
fn needs_interruption(thread: &Thread) -> bool {
    if thread.process.exiting().is_some() {
        return true;
    }
    let mask = thread.signals.lock().mask();
    signal::pending(thread).0 & !mask.0 != 0
}

/// Says on the log what Linux's log would: which signal, where, the registers, and how the program got there.
fn report_end(thread: &Arc<Thread>, context: &UserContext, end: signal::SignalInfoEnd) {
    let fatal = matches!(
        end.signal,
        Signal::SEGV
            | Signal::BUS
            | Signal::ILL
            | Signal::FPE
            | Signal::TRAP
            | Signal::SYS
            | Signal::ABRT
    );
    if !fatal {
        trace::info!("program ended by {:?}", end.signal);
        return;
    }
    let r = &context.registers;
    let name = thread.name();
    // A code above zero is a fault's, with an address; the others say that a process sent it: the program itself.
    let cause = match end.code {
        1.. => alloc::format!("at address {:#x}", end.address),
        _ => alloc::format!("sent by process {}", end.address as u32),
    };
    let mut frame = Frame::new(r);
    let mut module = LoadedFile::at(thread, &frame);
    trace::error!(
        "{name}[{}]: {:?} (code {}) {cause}, instruction {:#x}{}",
        thread.id,
        end.signal,
        end.code,
        r.rip,
        place(&frame, module.as_ref())
    );
    trace::error!(
        "rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}",
        r.rax,
        r.rbx,
        r.rcx,
        r.rdx
    );
    trace::error!(
        "rsi {:016x} rdi {:016x} rbp {:016x} rsp {:016x}",
        r.rsi,
        r.rdi,
        r.rbp,
        r.rsp
    );
    trace::error!(
        "r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}",
        r.r8,
        r.r9,
        r.r10,
        r.r11
    );
    trace::error!(
        "r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}",
        r.r12,
        r.r13,
        r.r14,
        r.r15
    );
    trace::error!("flags {:08x} fs {:016x}", r.rflags, context.fs_base);
    for depth in 0..=BACKTRACE {
        let source = module.as_ref().map(LoadedFile::module);
        let Some(caller) = frame.caller(source.as_ref(), &|address| user::read(address).ok())
        else {
            break;
        };
        if depth == BACKTRACE {
            trace::error!("  ... and more");
            break;
        }
        module = LoadedFile::at(thread, &caller);
        let address = caller.address();
        trace::error!("  #{depth} {address:#x}{}", place(&caller, module.as_ref()));
        frame = caller;
    }
}

/// Most callers that a crash names.
const BACKTRACE: usize = 40;

/// The mapped file that a frame's instruction comes from.
struct LoadedFile {
    /// In the program's file tree.
    path: String,
    /// Offset in the file of the instruction that is meant: for an address to return to the call, which lies before it. The next function
    /// may begin there, when the call never returns.
    offset: u64,
    bytes: Cow<'static, [u8]>,
}

impl LoadedFile {
    fn at(thread: &Thread, frame: &Frame) -> Option<LoadedFile> {
        let address = frame.address().checked_sub(frame.behind())?;
        let address = usize::try_from(address).ok()?;
        let (path, offset) = thread.process.memory.lock().file_at(address)?;
        let bytes = symbols::contents(thread.kernel(), &path).unwrap_or_default();
        Some(LoadedFile {
            path,
            offset,
            bytes,
        })
    }

    fn module(&self) -> Module<'_> {
        Module {
            bytes: &self.bytes,
            offset: self.offset,
        }
    }
}

/// Which mapped file a frame lies in, and where in it; with the symbol if the file has symbols.
fn place(frame: &Frame, file: Option<&LoadedFile>) -> String {
    let Some(LoadedFile {
        path,
        offset,
        bytes,
    }) = file
    else {
        return String::new();
    };
    let behind = frame.behind();
    let symbol = symbols::lookup(bytes, *offset);
    let offset = offset + behind;
    match symbol {
        Some((name, distance)) => {
            let distance = distance + behind;
            alloc::format!(" ({name}+{distance:#x} in {path}+{offset:#x})")
        }
        None => alloc::format!(" ({path}+{offset:#x})"),
    }
}

/// The end of a thread: tells those who wait for it.
fn end(thread: &Arc<Thread>) {
    release_robust_futexes(thread);
    let clear = thread.clear_on_exit.load(Ordering::Relaxed);
    if clear != 0 && user::write(clear, &0u32).is_ok() {
        thread.process.futexes.wake(clear, 1, super::futex::ANY);
    }
    let process = &thread.process;
    process
        .cpu_time
        .fetch_add(thread.cpu_time(), Ordering::Relaxed);
    *thread.waker.lock() = None;
    let last = {
        let mut threads = process.threads.lock();
        threads.remove(&thread.id);
        threads.is_empty()
    };
    if last {
        let code = process.exiting().unwrap_or(0);
        thread.kernel().shut_down(process, code);
    }
}

/// Marks the futexes that a thread held as ownerless (`get_robust_list(2)`, `struct robust_list_head`).
fn release_robust_futexes(thread: &Thread) {
    const OWNER_DIED: u32 = 0x4000_0000;
    const WAITERS: u32 = 0x8000_0000;
    const OWNER: u32 = 0x3fff_ffff;
    let head = thread.robust_list.load(Ordering::Relaxed);
    if head == 0 {
        return;
    }
    let walk = || -> Result<(), Errno> {
        let offset = user::read::<i64>(head + 8)?;
        let pending = user::read::<u64>(head + 16)?;
        let release = |entry: u64| -> Result<(), Errno> {
            let address = (entry & !1).wrapping_add_signed(offset);
            let word = user::read::<u32>(address)?;
            if word & OWNER == thread.id {
                user::write(address, &((word & WAITERS) | OWNER_DIED))?;
                if word & WAITERS != 0 {
                    thread.process.futexes.wake(address, 1, super::futex::ANY);
                }
            }
            Ok(())
        };
        let mut entry = user::read::<u64>(head)?;
        // A list that the program broke may be circular: Linux gives up after this many, too.
        for _ in 0..2048 {
            if entry & !1 == head {
                break;
            }
            let next = user::read::<u64>(entry & !1)?;
            if entry != pending {
                release(entry)?;
            }
            entry = next;
        }
        if pending != 0 {
            release(pending)?;
        }
        Ok(())
    };
    // A bad pointer in the list ends the walk, as in Linux.
    let _ = walk();
}
