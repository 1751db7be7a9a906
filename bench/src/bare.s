# The smallest PVH kernel: writes one byte to QEMU's debug console and stops. What QEMU itself needs to start.

    .section .note.Xen, "a", @note
    .long 4                 # length of the name
    .long 8                 # length of the description
    .long 18                # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad entry

    .text
    .code32
    .globl entry
entry:
    mov $'!', %al
    outb %al, $0xe9
1:  hlt
    jmp 1b
