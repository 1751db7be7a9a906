//! From a frame of the program's stack to the one that called it, for the report of a crash.
//!
//! Programs are compiled without frame pointers, but with tables that say for each instruction where the registers of the
//! caller are (`.eh_frame`; System V ABI for AMD64, section 3.7, and DWARF 5, section 6.4): exceptions need them, so they are
//! there in stripped programs as well. Where there is none (Go, assembly) the chain of frame pointers is followed.
//!
//! Everything read here is the program's, which has just crashed: nothing is believed, and each frame has to lie above the one
//! before it.

use elf::{ElfBytes, endian::LittleEndian};
use gimli::{
    BaseAddresses, CfaRule, EhFrame, EndianSlice, Evaluation, EvaluationResult, Register,
    RegisterRule, UnwindContext, UnwindExpression, UnwindSection as _, Value,
};
use kiln_abi::host::Context;

/// A section of a file.
type Bytes<'a> = EndianSlice<'a, gimli::LittleEndian>;

/// Most operations of one expression: a table may hold a loop that never ends.
const OPERATIONS: u32 = 1000;
/// Farthest that a frame pointer may be from the stack pointer: a register that holds something else is hardly so near.
const LONGEST_FRAME: u64 = 1 << 20;
/// The numbers that tables have for registers.
const RBP: usize = 6;
const RSP: usize = 7;
const RIP: usize = 16;

/// One frame: where its function is, and the registers as that function has left them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// In the order of DWARF's numbers for AMD64.
    registers: [u64; 17],
    /// The instruction itself is meant, not the one behind a call: the first frame, and one that a signal has interrupted.
    pub exact: bool,
}

/// The file that a frame's instruction comes from.
pub struct Module<'a> {
    /// The whole file.
    pub bytes: &'a [u8],
    /// Offset in the file of the instruction, or for a return address of the call before it.
    pub offset: u64,
}

impl Frame {
    /// The frame that the registers are those of.
    #[must_use]
    pub fn new(r: &Context) -> Frame {
        Frame {
            registers: [
                r.rax, r.rdx, r.rcx, r.rbx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11,
                r.r12, r.r13, r.r14, r.r15, r.rip,
            ],
            exact: true,
        }
    }

    /// Where it is: an instruction, or the one that it returns to.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.registers[RIP]
    }

    /// How far behind the instruction that is meant the address lies.
    #[must_use]
    pub fn behind(&self) -> u64 {
        u64::from(!self.exact)
    }

    /// The frame that called this one. `module`: what its instruction comes from; `read`: eight bytes of the program's memory.
    #[must_use]
    pub fn caller(
        &self,
        module: Option<&Module<'_>>,
        read: &dyn Fn(u64) -> Option<u64>,
    ) -> Option<Frame> {
        let next = match module {
            Some(module) => self
                .by_tables(module, read)
                .unwrap_or_else(|| self.by_frame_pointer(read)),
            // A call of something that is no code: what it pushed is all that has happened since.
            None if self.exact => self.at(self.registers[RSP], read),
            None => None,
        }?;
        // A signal's handler may have a stack of its own.
        let above = next.exact || next.registers[RSP] > self.registers[RSP];
        (above && next.address() != 0).then_some(next)
    }

    /// The caller, if its address to return to is at `place`, and nothing else is known.
    fn at(&self, place: u64, read: &dyn Fn(u64) -> Option<u64>) -> Option<Frame> {
        let mut next = *self;
        next.registers[RIP] = read(place)?;
        next.registers[RSP] = place.wrapping_add(8);
        next.exact = false;
        Some(next)
    }

    fn by_frame_pointer(&self, read: &dyn Fn(u64) -> Option<u64>) -> Option<Frame> {
        let (pointer, stack) = (self.registers[RBP], self.registers[RSP]);
        if pointer.checked_sub(stack)? > LONGEST_FRAME {
            return None;
        }
        let mut next = self.at(pointer.wrapping_add(8), read)?;
        next.registers[RBP] = read(pointer)?;
        Some(next)
    }

    /// `None`: no table covers it. `Some(None)`: the table says that there is no caller, or makes no sense.
    fn by_tables(
        &self,
        module: &Module<'_>,
        read: &dyn Fn(u64) -> Option<u64>,
    ) -> Option<Option<Frame>> {
        let file = ElfBytes::<LittleEndian>::minimal_parse(module.bytes).ok()?;
        let address = crate::boot::symbols::address(&file, module.offset)?;
        let section = file.section_header_by_name(".eh_frame").ok()??;
        let (data, _) = file.section_data(&section).ok()?;
        let mut tables = EhFrame::new(data, gimli::LittleEndian);
        tables.set_address_size(8);
        let bases = BaseAddresses::default().set_eh_frame(section.sh_addr);
        let entry = tables
            .fde_for_address(&bases, address, EhFrame::cie_from_offset)
            .ok()?;
        let mut context = UnwindContext::new();
        let row = entry
            .unwind_info_for_address(&tables, &bases, &mut context, address)
            .ok()?;
        let encoding = entry.cie().encoding();
        let evaluate = |expression: &UnwindExpression<usize>, start: Option<u64>| {
            let expression = expression.get(&tables).ok()?;
            self.evaluate(expression.evaluation(encoding), start, read)
        };
        let restore = || {
            let top = match row.cfa() {
                CfaRule::RegisterAndOffset { register, offset } => {
                    self.register(*register)?.wrapping_add_signed(*offset)
                }
                CfaRule::Expression(expression) => evaluate(expression, None)?,
            };
            let mut next = *self;
            // The address to return to has a rule of its own; without one there is no caller.
            next.registers[RIP] = 0;
            next.registers[RSP] = top;
            next.exact = entry.is_signal_trampoline();
            for (register, rule) in row.registers() {
                let value = match rule {
                    RegisterRule::Undefined => 0,
                    RegisterRule::SameValue => self.register(*register)?,
                    RegisterRule::Offset(offset) => read(top.wrapping_add_signed(*offset))?,
                    RegisterRule::ValOffset(offset) => top.wrapping_add_signed(*offset),
                    RegisterRule::Register(other) => self.register(*other)?,
                    RegisterRule::Expression(expression) => read(evaluate(expression, Some(top))?)?,
                    RegisterRule::ValExpression(expression) => evaluate(expression, Some(top))?,
                    _ => continue,
                };
                if let Some(place) = next.registers.get_mut(usize::from(register.0)) {
                    *place = value;
                }
            }
            Some(next)
        };
        Some(restore())
    }

    fn register(&self, register: Register) -> Option<u64> {
        self.registers.get(usize::from(register.0)).copied()
    }

    /// The value of an expression; `start` is on its stack in the beginning.
    fn evaluate(
        &self,
        mut evaluation: Evaluation<Bytes<'_>>,
        start: Option<u64>,
        read: &dyn Fn(u64) -> Option<u64>,
    ) -> Option<u64> {
        if let Some(start) = start {
            evaluation.set_initial_value(start);
        }
        evaluation.set_max_iterations(OPERATIONS);
        let mut state = evaluation.evaluate().ok()?;
        loop {
            state = match state {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresRegister { register, .. } => {
                    let value = Value::Generic(self.register(register)?);
                    evaluation.resume_with_register(value).ok()?
                }
                EvaluationResult::RequiresMemory { address, size, .. } => {
                    let mask = u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)));
                    let value = Value::Generic(read(address)? & mask);
                    evaluation.resume_with_memory(value).ok()?
                }
                _ => return None,
            };
        }
        // What is left on the stack: the value, or the place of the value.
        match evaluation.as_result().first()?.location {
            gimli::Location::Address { address } => Some(address),
            gimli::Location::Value { value } => value.to_u64(u64::MAX).ok(),
            _ => None,
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use alloc::{string::String, vec::Vec};
    use std::{fs, println};

    /// The registers that a frame is made of, as of here.
    #[inline(always)]
    fn here() -> Context {
        let mut context = Context::default();
        // SAFETY: registers are read, nothing is changed.
        unsafe {
            core::arch::asm!(
                "lea {}, [rip]", "mov {}, rsp", "mov {}, rbp", "mov {}, rbx",
                out(reg) context.rip, out(reg) context.rsp, out(reg) context.rbp, out(reg) context.rbx,
                options(nomem, nostack, preserves_flags)
            );
            core::arch::asm!(
                "mov {}, r12", "mov {}, r13", "mov {}, r14", "mov {}, r15",
                out(reg) context.r12, out(reg) context.r13, out(reg) context.r14, out(reg) context.r15,
                options(nomem, nostack, preserves_flags)
            );
        }
        context
    }

    /// The file and the offset in it that an address of this process comes from.
    fn file_at(address: u64) -> Option<(String, u64)> {
        let maps = fs::read_to_string("/proc/self/maps").ok()?;
        maps.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let number = |text: &str| u64::from_str_radix(text, 16).ok();
            let (start, end) = (number(start)?, number(end)?);
            let offset = number(words.nth(1)?)?;
            let path = words.nth(2).filter(|path| path.starts_with('/'))?;
            (start..end)
                .contains(&address)
                .then(|| (path.into(), offset + (address - start)))
        })
    }

    /// The names of the functions that called, of this process; `change` damages the file before it is read.
    fn walk(mut frame: Frame, change: &dyn Fn(&mut Vec<u8>)) -> Vec<String> {
        let mut names = Vec::new();
        for _ in 0..100 {
            let Some((path, offset)) = file_at(frame.address() - frame.behind()) else {
                break;
            };
            let mut bytes = fs::read(path).unwrap();
            let name = crate::boot::symbols::lookup(&bytes, offset);
            names.push(name.map_or_else(String::new, |(name, _)| name));
            change(&mut bytes);
            let module = Module {
                bytes: &bytes,
                offset,
            };
            // SAFETY: the addresses come from tables that the compiler made for this very stack.
            let read = |address: u64| Some(unsafe { (address as *const u64).read() });
            match frame.caller(Some(&module), &read) {
                Some(caller) => frame = caller,
                None => break,
            }
        }
        names
    }

    #[inline(never)]
    fn first(depth: u32) -> Vec<String> {
        let mut names = second(depth);
        names.retain(|name| !name.is_empty());
        names
    }

    #[inline(never)]
    fn second(depth: u32) -> Vec<String> {
        if depth > 0 {
            let mut names = second(depth - 1);
            names.push(String::new());
            return names;
        }
        walk(Frame::new(&here()), &|_| {})
    }

    #[test]
    fn the_callers_of_a_function_are_found_by_the_tables() {
        let names = first(3);
        println!("{names:?}");
        let place = names.iter().rposition(|name| name.ends_with("::first"));
        let before = &names[..place.expect("the caller has a name")];
        let times = before
            .iter()
            .filter(|name| name.ends_with("::second"))
            .count();
        assert_eq!(times, 4, "{names:?}");
        // As far as the thread's beginning.
        assert!(names.len() > 6, "{names:?}");
    }

    #[test]
    fn damaged_tables_name_no_caller_and_do_no_harm() {
        let bytes = fs::read("/proc/self/exe").unwrap();
        let file = ElfBytes::<LittleEndian>::minimal_parse(&bytes).unwrap();
        let section = file.section_header_by_name(".eh_frame").unwrap().unwrap();
        let (start, length) = (section.sh_offset as usize, section.sh_size as usize);
        let context = here();
        let (_, offset) = file_at(context.rip).unwrap();
        let frame = Frame::new(&context);
        let mut state = 1u64;
        for round in 0..40 {
            let mut damaged = bytes.clone();
            for byte in &mut damaged[start..start + length] {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                if state >> 40 & 63 <= round {
                    *byte = (state >> 56) as u8;
                }
            }
            let module = Module {
                bytes: &damaged,
                offset,
            };
            let _ = frame.caller(Some(&module), &|_| Some(round));
        }
    }

    #[test]
    fn a_call_of_nothing_returns_to_what_it_pushed() {
        let context = Context {
            rip: 0,
            rsp: 0x1000,
            ..Context::default()
        };
        let read = |address| (address == 0x1000).then_some(0x5555);
        let caller = Frame::new(&context).caller(None, &read).unwrap();
        assert_eq!((caller.address(), caller.behind()), (0x5555, 1));
        // From there nothing is known.
        assert_eq!(caller.caller(None, &read), None);
    }
}
