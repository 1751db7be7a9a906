//! The way from the boot loader into Rust.
//!
//! A PVH boot loader enters at `shim_entry` in 32-bit protected mode, paging off, EBX pointing to the start information. The
//! code here maps the first 2 MiB of memory, which hold the whole shim, at their physical addresses and at
//! [`VIRTUAL_OFFSET`], switches to 64 bits and calls `start`. The tables are the ones that stay in use; `tables.rs` gives them
//! their final contents.

use core::arch::global_asm;

/// Virtual less physical addresses of the shim.
pub const VIRTUAL_OFFSET: usize = 0xffff_ffff_8000_0000;

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18                          // XEN_ELFNOTE_PHYS32_ENTRY
    .ascii "Xen\0"
    .quad shim_entry

    .section .boot, "ax"
    .code32
    .globl shim_entry
shim_entry:
    cld
    // Highest table: entries 0 and 511 lead to the same table below, whose entries 0 and 510 lead to the same large page.
    movl $(SHIM_TABLE_HIGH - {offset} + 3), %eax
    movl %eax, SHIM_TABLE_TOP - {offset}
    movl %eax, SHIM_TABLE_TOP - {offset} + 511 * 8
    movl $(SHIM_TABLE_HIGH_SECOND - {offset} + 3), %eax
    movl %eax, SHIM_TABLE_HIGH - {offset}
    movl %eax, SHIM_TABLE_HIGH - {offset} + 510 * 8
    movl $0x83, SHIM_TABLE_HIGH_SECOND - {offset}
    movl $(SHIM_TABLE_TOP - {offset}), %eax
    movl %eax, %cr3
    movl $0x6a0, %eax                       // CR4: PAE, PGE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx                  // EFER: SCE, LME, NXE
    rdmsr
    orl $0x901, %eax
    wrmsr
    movl $0x80010033, %eax                  // CR0: PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    lgdt boot_descriptors_pointer
    ljmp $8, $boot_long
    .code64
boot_long:
    xorl %eax, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %fs
    movl %eax, %gs
    movl ${data}, %eax
    movl %eax, %ss
    movabsq $shim_call_stack_top, %rsp
    movl %ebx, %edi
    movabsq $start, %rax
    call *%rax
    ud2
    .balign 8
boot_descriptors:
    .quad 0
    .quad 0x00af9b000000ffff                // 64-bit code, ring 0
    .quad 0x00cf93000000ffff                // data, ring 0
boot_descriptors_pointer:
    .word 23
    .long boot_descriptors
    .text
"#,
    offset = const VIRTUAL_OFFSET,
    data = const crate::descriptors::DATA as i32,
    options(att_syntax),
);
