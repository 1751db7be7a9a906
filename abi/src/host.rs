//! The host interface: everything the kernel asks of the machine below it.
//!
//! A *shim* implements it: the process shim with system calls of the host's Linux, the VM shim with
//! privileged instructions. The kernel is the same binary above both, and always unprivileged
//! (ring 3).
//!
//! # Calls
//!
//! [`HostInterface`] is a table of functions in the System V calling convention, which the kernel
//! calls on its own stack. They return a value that is zero or positive, or a negated Linux error
//! number. Addresses and lengths are in bytes and, where memory is mapped, multiples of
//! [`PAGE_SIZE`]; a misaligned or out of range argument gives `-EINVAL`.
//!
//! # Traps
//!
//! While program code runs, the shim catches system calls, faults and events (the timer, a device).
//! For each it
//!
//! 1. stores general registers, instruction pointer, stack pointer and flags of the program in the
//!    [`Context`] that [`CpuArea::context`] points to, and what happened in [`Context::trap`];
//! 2. leaves the vector registers and the FS base as the program had them;
//! 3. continues at [`Registration::upcall_entry`] in ring 3 with the stack pointer
//!    [`CpuArea::upcall_stack`], direction flag clear.
//!
//! The kernel resumes a program without the shim: it loads the registers and jumps. It keeps the GS
//! base at the [`CpuArea`]; programs do not get to use GS.
//!
//! # Events and races
//!
//! What happens when an event (not a fault) arrives depends on the interrupted instruction pointer:
//!
//! * in the kernel's text or the shim: [`CpuArea::pending`] is set to 1 and the kernel goes on;
//! * in [`Registration::resume`], the last stretch of the kernel's way back to the program: the
//!   shim makes an upcall with [`TrapKind::Event`] but does **not** store registers, because the
//!   context still holds all of them (this closes the race between the kernel's last look at
//!   `pending` and the jump to the program);
//! * elsewhere (program text): an upcall with [`TrapKind::Event`], registers stored.
//!
//! A fault at an instruction in [`Registration::user_copy`] continues at
//! [`Registration::user_copy_fault`] with all other registers kept: so the kernel turns a program's
//! bad pointer into `EFAULT`. A fault elsewhere in the kernel is a bug: the shim stores the registers in
//! [`CpuArea::fault_context`] and continues at [`Registration::fault_entry`] on
//! [`CpuArea::fault_stack`].

/// Version of this interface. A kernel refuses to start on a shim with another one.
pub const VERSION: u32 = 2;

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// Lowest address that the kernel may map for a program: page zero and its neighbours stay
/// unmapped.
pub const PROGRAM_START: usize = 0x1_0000;

/// End (exclusive) of the addresses that the kernel may map for a program. The shim keeps everything
/// of its own and the kernel's image above.
pub const PROGRAM_END: usize = 0x5000_0000_0000;

/// First address of the range that the kernel uses for its own mappings (heap, stacks, windows).
pub const KERNEL_RANGE_START: usize = 0x6000_0000_0000;

/// End (exclusive) of the kernel's own mappings. The kernel's image itself may be mapped by the shim
/// anywhere at or above [`PROGRAM_END`] outside this range.
pub const KERNEL_RANGE_END: usize = 0x7000_0000_0000;

bitflags::bitflags! {
    /// Access allowed to a mapping. Never both `WRITE` and `EXECUTE`: the shim answers `-EACCES`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct Protection: u32 {
        /// Loads.
        const READ = 1;
        /// Stores.
        const WRITE = 2;
        /// Instruction fetches.
        const EXECUTE = 4;
    }
}

/// Where the contents of a mapping come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Source {
    /// Zero bytes; pages are reserved now and provided by the shim on first touch. Private.
    Zero = 0,
    /// The image's root file system, from `offset` bytes after its start. Stores go to a private copy.
    Root = 1,
    /// The shared pool, from `offset` bytes after its start: pages that can be mapped at several
    /// addresses at once, zero until first written. Stores are seen through every mapping.
    Pool = 2,
}

/// Which engine the kernel runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Engine {
    /// A confined process of the host's Linux.
    Process = 1,
    /// A virtual machine, with the VM shim in ring 0.
    Vm = 2,
}

/// Something that happened to a descriptor or a device, from [`HostInterface::wait`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// Descriptor number (process), or interrupt line of the device (VM).
    pub source: u32,
    /// [`event_flags`]; zero for a device interrupt.
    pub flags: u32,
}

/// Bits of [`Event::flags`], with the values of Linux's `EPOLL*`.
pub mod event_flags {
    /// There is something to read.
    pub const READABLE: u32 = 0x001;
    /// There is room to write.
    pub const WRITABLE: u32 = 0x004;
    /// The descriptor has an error.
    pub const ERROR: u32 = 0x008;
    /// Both directions are shut down.
    pub const HANGUP: u32 = 0x010;
    /// The peer has shut down its sending direction.
    pub const READ_HANGUP: u32 = 0x2000;
}

/// One piece of memory for [`HostInterface::descriptor_send`] and its receiving twin: Linux's `struct iovec`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Slice {
    /// Address.
    pub address: usize,
    /// Length in bytes.
    pub length: usize,
}

/// A message for [`HostInterface::descriptor_send`] and [`HostInterface::descriptor_receive`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Message {
    /// First of the pieces to send, or to fill.
    pub slices: *const Slice,
    /// How many pieces.
    pub slice_count: usize,
    /// A `struct sockaddr` for datagrams, or null. Receiving writes the sender's here.
    pub address: *mut u8,
    /// Bytes at `address`; receiving replaces it by the length written.
    pub address_length: u32,
    /// Room for descriptors that come along (`SCM_RIGHTS`), or null. Only for receiving.
    pub descriptors: *mut i32,
    /// How many descriptors fit; receiving replaces it by how many came.
    pub descriptor_count: u32,
    /// Linux's `MSG_*` flags. `MSG_DONTWAIT` and `MSG_NOSIGNAL` are always added by the shim.
    pub flags: u32,
}

/// The table of calls. See the module's text for what holds for all of them.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct HostInterface {
    /// Tells the shim where traps go. Called once, before the first program instruction.
    pub register: extern "C" fn(registration: &Registration) -> isize,

    /// Maps `length` bytes at `address`, replacing what was there.
    /// `protection` is a [`Protection`], `source` a [`Source`].
    /// `-ENOMEM` when the memory limit or the address space is exhausted.
    pub map: extern "C" fn(
        address: usize,
        length: usize,
        protection: u32,
        source: u32,
        offset: u64,
    ) -> isize,
    /// Removes mappings; what was not mapped is passed over.
    pub unmap: extern "C" fn(address: usize, length: usize) -> isize,
    /// Changes the access allowed to mapped pages.
    pub protect: extern "C" fn(address: usize, length: usize, protection: u32) -> isize,
    /// Gives the memory of private pages back; they read as their source again (zeros, or the root's bytes).
    /// For pool mappings, the pool's pages themselves become zeros.
    pub discard: extern "C" fn(address: usize, length: usize) -> isize,
    /// Bytes of memory in use by private and pool pages, for `/proc/meminfo` and the limit.
    pub memory_used: extern "C" fn() -> u64,

    /// Nanoseconds since some fixed point before the start; never goes back.
    pub monotonic: extern "C" fn() -> u64,
    /// Nanoseconds since 1970-01-01 00:00 UTC.
    pub realtime: extern "C" fn() -> u64,
    /// Asks for an event at `deadline` (as of `monotonic`); replaces the earlier one. `u64::MAX`: none.
    pub set_timer: extern "C" fn(deadline: u64),

    /// Collects up to `capacity` events. Blocks until there is one, until [`CpuArea::pending`] is set, or
    /// until `deadline` (0: does not block; `u64::MAX`: no limit). Returns how many were stored.
    pub wait: extern "C" fn(events: *mut Event, capacity: usize, deadline: u64) -> isize,

    /// Writes to the console. Returns the bytes written.
    pub console_write: extern "C" fn(bytes: *const u8, length: usize) -> isize,
    /// Fills memory with random bytes fit for keys.
    pub entropy: extern "C" fn(bytes: *mut u8, length: usize) -> isize,
    /// Ends the instance. Codes 0 to 255 are the program's; see [`exit_code`].
    pub exit: extern "C" fn(code: i32) -> !,

    /// Process only (others: `-ENOSYS`): starts edge-triggered events for a descriptor, for all
    /// [`event_flags`].
    pub descriptor_watch: extern "C" fn(descriptor: i32) -> isize,
    /// Process only: `sendmsg(2)`.
    pub descriptor_send: extern "C" fn(descriptor: i32, message: &Message) -> isize,
    /// Process only: `recvmsg(2)`. 0 is the end of the stream.
    pub descriptor_receive: extern "C" fn(descriptor: i32, message: &mut Message) -> isize,
    /// Process only: `shutdown(2)`; `how` is `SHUT_RD`, `SHUT_WR` or `SHUT_RDWR`.
    pub descriptor_shutdown: extern "C" fn(descriptor: i32, how: u32) -> isize,
    /// Process only: `close(2)`.
    pub descriptor_close: extern "C" fn(descriptor: i32) -> isize,
}

/// Exit codes of an instance beyond the program's own 0 to 255.
pub mod exit_code {
    /// The kernel panicked or hit a fault of its own; the command exits with this.
    pub const KERNEL_PANIC: i32 = 254;
    /// The program was ended by a signal: 128 plus its number, as a shell says it.
    pub const SIGNAL_BASE: i32 = 128;
    /// The program could not be started (no such file, not executable).
    pub const CANNOT_START: i32 = 127;
}

/// What a shim says to the kernel's entry point (a pointer in the first argument register).
#[repr(C)]
pub struct BootInformation {
    /// [`BOOT_MAGIC`].
    pub magic: u64,
    /// [`VERSION`] of the shim.
    pub version: u32,
    /// An [`Engine`].
    pub engine: u32,
    /// The calls.
    pub host: HostInterface,
    /// Where the kernel's image is mapped.
    pub kernel: MemoryRange,
    /// The kernel's executable text.
    pub kernel_text: MemoryRange,
    /// The kernel's ELF file as stored in the image (symbols for backtraces), mapped read-only.
    pub kernel_file: MemoryRange,
    /// What the image says about its program ([`crate::manifest::Program`]), mapped read-only.
    pub program: MemoryRange,
    /// The run's configuration ([`crate::configuration::RunConfiguration::to_bytes`]), mapped read-only;
    /// empty when an image is started by hand.
    pub configuration: MemoryRange,
    /// The root file system (EROFS), mapped read-only.
    pub root: MemoryRange,
    /// Bytes of memory the instance may use.
    pub memory_limit: u64,
    /// Memory that devices can reach: virtual address and length. VM only.
    pub dma: MemoryRange,
    /// Physical address of `dma`. VM only.
    pub dma_physical: u64,
    /// Descriptor of the link to the monitor (`-1`: none). Process only.
    pub link_descriptor: i32,
    /// Descriptor of the frame stream of `--net direct` (`-1`: none). Process only.
    pub network_descriptor: i32,
    /// How many of `devices` are valid.
    pub device_count: u32,
    /// Bytes that XSAVE needs for all enabled state components (0: only FXSAVE).
    pub xsave_size: u32,
    /// State components enabled in XCR0 that the kernel is to save.
    pub xsave_mask: u64,
    /// Virtio devices on a memory-mapped bus. VM only.
    pub devices: [MmioDevice; MAX_DEVICES],
}

/// [`BootInformation::magic`].
pub const BOOT_MAGIC: u64 = u64::from_le_bytes(*b"KilnBoot");

/// Room in [`BootInformation::devices`].
pub const MAX_DEVICES: usize = 32;

/// A virtio device whose registers (virtio 1.2, section 4.2) are mapped for the kernel.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct MmioDevice {
    /// Virtual address of the registers.
    pub registers: usize,
    /// Length of the register window in bytes.
    pub length: usize,
    /// Interrupt line; [`Event::source`] of its events.
    pub interrupt: u32,
    /// Virtio device kind (1 network, 3 console, 4 entropy).
    pub kind: u32,
}

/// A range of virtual addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MemoryRange {
    /// First address.
    pub start: usize,
    /// Length in bytes.
    pub length: usize,
}

/// What the kernel tells the shim with [`HostInterface::register`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Registration {
    /// The CPU area; the shim sets the GS base to it.
    pub cpu: *mut CpuArea,
    /// Where upcalls enter the kernel.
    pub upcall_entry: usize,
    /// Where faults of the kernel itself enter it.
    pub fault_entry: usize,
    /// The last stretch before a jump to the program (see the module's text).
    pub resume: MemoryRange,
    /// The instructions that touch program memory for the kernel.
    pub user_copy: MemoryRange,
    /// Where a fault in `user_copy` continues.
    pub user_copy_fault: usize,
}

/// Per-CPU memory shared by kernel and shim, found through GS. Offsets are fixed: assembly uses them.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct CpuArea {
    /// Offset 0: address of this area.
    pub self_address: usize,
    /// Offset 8: where a rewritten system call site jumps (the kernel's fast entry).
    pub fast_entry: usize,
    /// Offset 16: stack for upcalls.
    pub upcall_stack: usize,
    /// Offset 24: registers of the program that runs now.
    pub context: *mut Context,
    /// Offset 32: stack for faults of the kernel itself.
    pub fault_stack: usize,
    /// Offset 40: registers at a fault of the kernel itself.
    pub fault_context: *mut Context,
    /// Offset 48: nonzero when an event arrived while the kernel ran. Set by the shim, cleared by the kernel.
    pub pending: u32,
    /// Offset 52: nonzero while a timer of [`HostInterface::set_timer`] is due but not yet delivered.
    pub reserved: u32,
    /// Offset 56: for the kernel's entry code.
    pub scratch: [usize; 9],
}

/// A program's registers. Offsets are fixed: assembly uses them.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Context {
    /// Offset 0.
    pub rax: u64,
    /// Offset 8.
    pub rbx: u64,
    /// Offset 16.
    pub rcx: u64,
    /// Offset 24.
    pub rdx: u64,
    /// Offset 32.
    pub rsi: u64,
    /// Offset 40.
    pub rdi: u64,
    /// Offset 48.
    pub rbp: u64,
    /// Offset 56.
    pub rsp: u64,
    /// Offset 64.
    pub r8: u64,
    /// Offset 72.
    pub r9: u64,
    /// Offset 80.
    pub r10: u64,
    /// Offset 88.
    pub r11: u64,
    /// Offset 96.
    pub r12: u64,
    /// Offset 104.
    pub r13: u64,
    /// Offset 112.
    pub r14: u64,
    /// Offset 120.
    pub r15: u64,
    /// Offset 128: instruction pointer; after a system call, that of the next instruction.
    pub rip: u64,
    /// Offset 136: flags.
    pub rflags: u64,
    /// Offset 144: what happened.
    pub trap: Trap,
}

/// Why a program stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Trap {
    /// A [`TrapKind`].
    pub kind: u64,
    /// Address concerned by a page fault.
    pub address: u64,
    /// Number of the processor's exception (Intel 64 manual, volume 3, section 6.3.1; [`exception`]).
    pub exception: u32,
    /// The processor's error code of the exception, 0 where it gives none.
    pub error: u32,
}

/// Kinds of traps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum TrapKind {
    /// Nothing yet.
    None = 0,
    /// A system call: number in `rax`, arguments in `rdi rsi rdx r10 r8 r9`.
    SystemCall = 1,
    /// The timer or a device.
    Event = 2,
    /// An exception of the processor. A page fault is one of an access that the mappings do not allow.
    Exception = 3,
    /// A page fault where a page is mapped, but cannot be provided: its file has become shorter, or there is no memory.
    Unavailable = 4,
    /// The memory limit is reached. The program was stopped at some instruction. Process only.
    Exhausted = 5,
}

/// Numbers of the processor's exceptions.
pub mod exception {
    /// Division error.
    pub const DIVIDE: u32 = 0;
    /// Single step.
    pub const DEBUG: u32 = 1;
    /// Breakpoint instruction.
    pub const BREAKPOINT: u32 = 3;
    /// Invalid instruction.
    pub const INVALID_INSTRUCTION: u32 = 6;
    /// An address that is not canonical, taken from a stack register.
    pub const STACK: u32 = 12;
    /// General protection: any other address that is not canonical, a privileged instruction and the like.
    pub const PROTECTION: u32 = 13;
    /// Page fault: [`page_fault`](super::page_fault) has the bits of its error code.
    pub const PAGE_FAULT: u32 = 14;
    /// Unmasked x87 exception.
    pub const X87: u32 = 16;
    /// Misaligned access where that is checked.
    pub const ALIGNMENT: u32 = 17;
    /// Unmasked SSE exception.
    pub const SIMD: u32 = 19;
}

/// Bits of the error code of a page fault.
pub mod page_fault {
    /// The page was there, but not for this access. What is mapped may not be there yet.
    pub const PRESENT: u32 = 1;
    /// The access was a store.
    pub const WRITE: u32 = 2;
    /// The access was made in user mode.
    pub const USER: u32 = 4;
    /// The access was an instruction fetch.
    pub const FETCH: u32 = 16;
}
