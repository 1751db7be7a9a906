//! What the shim knows while the kernel runs.

use core::ops::Range;

use kiln_abi::host::CpuArea;
use kiln_shim_vm::memory::{AccessError, Memory};

use crate::cell::Global;
use crate::clock::Clock;
use crate::cpu::{Features, ProcessorTlb};

/// What the kernel has registered.
#[derive(Clone, Debug)]
pub struct Registered {
    /// Address of the kernel's [`CpuArea`].
    pub cpu: usize,
    /// Where upcalls go.
    pub upcall_entry: usize,
    /// Where the kernel's own faults go.
    pub fault_entry: usize,
    /// The last stretch before a program.
    pub resume: Range<usize>,
    /// The instructions that may fault on the program's memory.
    pub user_copy: Range<usize>,
    /// Where such a fault goes.
    pub user_copy_fault: usize,
}

/// The machine.
#[derive(Debug)]
pub struct Machine {
    /// The lower half.
    pub memory: Memory<ProcessorTlb>,
    /// Time.
    pub clock: Clock,
    /// What the processor can do.
    pub features: Features,
    /// The kernel's image.
    pub kernel: Range<usize>,
    /// The kernel's text.
    pub kernel_text: Range<usize>,
    /// The page of stubs as mapped for ring 3.
    pub stubs: Range<usize>,
    /// The part of it with the clocks, which programs may call as well.
    pub clocks: Range<usize>,
    /// The kernel's registration.
    pub registered: Option<Registered>,
    /// The kernel has had a fault of its own.
    pub kernel_faulted: bool,
}

static MACHINE: Global<Option<Machine>> = Global::new(None);

impl Machine {
    /// The machine, once it is set up.
    ///
    /// # Safety
    ///
    /// As [`Global::get`].
    pub unsafe fn get() -> &'static mut Self {
        // SAFETY: the caller's promise.
        match unsafe { MACHINE.get() } {
            Some(machine) => machine,
            None => panic!("a trap before the machine was set up"),
        }
    }

    /// Puts the machine in place, with no kernel yet.
    ///
    /// # Safety
    ///
    /// As [`Global::get`].
    pub unsafe fn install(
        memory: Memory<ProcessorTlb>,
        clock: Clock,
        features: Features,
    ) -> &'static mut Self {
        // SAFETY: the caller's promise.
        unsafe { MACHINE.get() }.insert(Self {
            memory,
            clock,
            features,
            kernel: 0..0,
            kernel_text: 0..0,
            stubs: 0..0,
            clocks: 0..0,
            registered: None,
            kernel_faulted: false,
        })
    }

    /// Tells the kernel that there is something to see to.
    pub fn set_pending(&mut self) -> Result<(), AccessError> {
        match &self.registered {
            Some(registered) => self.memory.write(
                registered.cpu + core::mem::offset_of!(CpuArea, pending),
                &1u32.to_le_bytes(),
            ),
            None => Ok(()),
        }
    }

    /// Whether the kernel has been told and has not looked yet.
    pub fn is_pending(&mut self) -> bool {
        let Some(registered) = &self.registered else {
            return false;
        };
        let mut bytes = [0; 4];
        let address = registered.cpu + core::mem::offset_of!(CpuArea, pending);
        self.memory.read(address, &mut bytes).is_ok() && bytes != [0; 4]
    }
}
