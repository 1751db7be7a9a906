//! The processor's privileged instructions and what it says about itself, each as a small function.

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, _rdtsc};
use core::num::NonZeroU64;

use kiln_shim_vm::memory::Tlb;

/// Model-specific registers.
pub mod msr {
    /// Selectors of SYSCALL and SYSRET.
    pub const STAR: u32 = 0xc000_0081;
    /// Where SYSCALL goes.
    pub const LSTAR: u32 = 0xc000_0082;
    /// Flags that SYSCALL clears.
    pub const FMASK: u32 = 0xc000_0084;
    /// GS base in use.
    pub const GS_BASE: u32 = 0xc000_0101;
    /// GS base that SWAPGS brings.
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    /// Local interrupt controller: base address and mode.
    pub const APIC_BASE: u32 = 0x1b;
}

/// Bits of CR4.
mod cr4 {
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// What the processor can do, as far as it matters here.
#[derive(Clone, Copy, Debug, Default)]
pub struct Features {
    /// The FS and GS bases can be set in ring 3.
    pub fsgsbase: bool,
    /// Ring 0 is kept from ring 3's memory.
    pub smap: bool,
    /// Pages of 1 GiB.
    pub gigabyte_pages: bool,
    /// RDRAND.
    pub rdrand: bool,
    /// RDSEED.
    pub rdseed: bool,
    /// A hypervisor says that it is there.
    pub hypervisor: bool,
    /// Highest leaf of CPUID.
    pub highest_leaf: u32,
    /// State components enabled in XCR0; 0 without XSAVE.
    pub xsave_mask: u64,
    /// Bytes that XSAVE needs for them.
    pub xsave_size: u32,
}

/// Finds the features and switches them on.
pub fn enable_features() -> Features {
    let basic = __cpuid_count(1, 0);
    let highest_leaf = __cpuid_count(0, 0).eax;
    let (ebx, ecx) = if highest_leaf >= 7 {
        let extended = __cpuid_count(7, 0);
        (extended.ebx, extended.ecx)
    } else {
        (0, 0)
    };
    let bit = |word: u32, number: u32| word >> number & 1 != 0;
    let mut features = Features {
        fsgsbase: bit(ebx, 0),
        smap: bit(ebx, 20),
        gigabyte_pages: bit(__cpuid_count(0x8000_0001, 0).edx, 26),
        rdrand: bit(basic.ecx, 30),
        rdseed: bit(ebx, 18),
        hypervisor: bit(basic.ecx, 31),
        highest_leaf,
        ..Features::default()
    };
    let xsave = bit(basic.ecx, 26);
    let mut control: u64;
    // SAFETY: reads a control register.
    unsafe { asm!("mov {}, cr4", out(reg) control, options(nomem, nostack)) };
    control |= cr4::FSGSBASE * u64::from(features.fsgsbase);
    control |= cr4::SMAP * u64::from(features.smap);
    control |= cr4::SMEP * u64::from(bit(ebx, 7));
    control |= cr4::UMIP * u64::from(bit(ecx, 2));
    control |= cr4::OSXSAVE * u64::from(xsave);
    // SAFETY: only features that the processor has; the shim runs from supervisor pages and touches no others unasked.
    unsafe { asm!("mov cr4, {}", in(reg) control, options(nostack)) };
    if xsave {
        // x87 and SSE always; AVX, and on top of that the three parts of AVX-512, as they are there.
        let supported = u64::from(__cpuid_count(13, 0).eax);
        let mut mask = 0b11;
        if supported & 0b100 != 0 {
            mask |= 0b100;
            if supported & 0xe0 == 0xe0 {
                mask |= 0xe0;
            }
        }
        // SAFETY: XSAVE is on and the components exist in valid combination.
        unsafe {
            asm!("xsetbv", in("ecx") 0, in("eax") mask as u32, in("edx") 0, options(nomem, nostack))
        };
        features.xsave_mask = mask;
        features.xsave_size = __cpuid_count(13, 0).ebx;
    }
    features
}

/// Frequencies in Hz, where CPUID says them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Frequencies {
    /// Of the time stamp counter.
    pub counter: Option<NonZeroU64>,
    /// Of the local interrupt controller's timer.
    pub timer: Option<NonZeroU64>,
}

/// Asks for the frequencies.
pub fn frequencies(features: &Features) -> Frequencies {
    let mut frequencies = Frequencies::default();
    // The leaf by which hypervisors tell frequencies in kHz.
    let timing = 0x4000_0010;
    if features.hypervisor && (timing..0x4000_1000).contains(&__cpuid_count(0x4000_0000, 0).eax) {
        let told = __cpuid_count(timing, 0);
        frequencies.counter = NonZeroU64::new(u64::from(told.eax) * 1000);
        frequencies.timer = NonZeroU64::new(u64::from(told.ebx) * 1000);
    }
    if features.highest_leaf >= 0x15 {
        let ratio = __cpuid_count(0x15, 0);
        let crystal = u64::from(ratio.ecx) * u64::from(ratio.ebx);
        let counter = crystal.checked_div(u64::from(ratio.eax)).unwrap_or(0);
        frequencies.counter = NonZeroU64::new(counter).or(frequencies.counter);
    }
    frequencies
}

/// The time stamp counter.
pub fn counter() -> u64 {
    // SAFETY: every x86-64 processor has it.
    unsafe { _rdtsc() }
}

/// Writes a model-specific register.
///
/// # Safety
///
/// The register exists and the value keeps the machine sound.
pub unsafe fn write_msr(register: u32, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
    }
}

/// Reads a model-specific register.
///
/// # Safety
///
/// The register exists.
pub unsafe fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's promise.
    unsafe { asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a byte to an input/output port.
///
/// # Safety
///
/// The device behind the port must not change memory by it.
pub unsafe fn write_port(port: u16, value: u8) {
    // SAFETY: the caller's promise.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Writes four bytes to an input/output port.
///
/// # Safety
///
/// As [`write_port`].
pub unsafe fn write_port_long(port: u16, value: u32) {
    // SAFETY: the caller's promise.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

/// Writes two bytes to an input/output port.
///
/// # Safety
///
/// As [`write_port`].
pub unsafe fn write_port_word(port: u16, value: u16) {
    // SAFETY: the caller's promise.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) };
}

/// Reads a byte from an input/output port; 0xff where there is no device.
///
/// # Safety
///
/// As [`write_port`].
pub unsafe fn read_port(port: u16) -> u8 {
    let value;
    // SAFETY: the caller's promise.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// Waits for an interrupt and takes it. Interrupts are off before and after.
///
/// # Safety
///
/// The interrupt handlers must be set up, and the caller must hold no reference to what they change.
pub unsafe fn halt() {
    // SAFETY: the caller's promise. No interrupt comes between STI and HLT.
    unsafe { asm!("sti", "hlt", "cli") };
}

/// 64 random bits from the processor's generator, `None` without one or when it gives none.
pub fn random(features: &Features) -> Option<u64> {
    for _ in 0..64 {
        let (value, good): (u64, u8);
        if features.rdseed {
            // SAFETY: the processor has the instruction.
            unsafe {
                asm!("rdseed {}", "setc {}", out(reg) value, out(reg_byte) good, options(nomem, nostack))
            };
        } else if features.rdrand {
            // SAFETY: the processor has the instruction.
            unsafe {
                asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) good, options(nomem, nostack))
            };
        } else {
            return None;
        }
        if good != 0 {
            return Some(value);
        }
    }
    None
}

/// Address of the last page fault.
pub fn fault_address() -> usize {
    let address;
    // SAFETY: reads a control register.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack)) };
    address
}

/// Makes the processor read the tables anew, but for global pages.
pub fn reload_tables() {
    // SAFETY: the same tables as before.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack)) };
}

/// The processor's own cache of the page tables.
#[derive(Debug)]
pub struct ProcessorTlb;

impl Tlb for ProcessorTlb {
    fn forget(&mut self, address: usize) {
        // SAFETY: affects only the cache.
        unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack)) };
    }

    fn forget_all(&mut self) {
        reload_tables();
    }
}
