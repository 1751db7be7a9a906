/*
 * The functions that programs find through AT_SYSINFO_EHDR (vdso(7)): clocks without a system call.
 *
 * They call the kernel as an ordinary function through the CPU area (GS), on the program's own stack, which is no more
 * than any library function does. A clock that the kernel does not know gives all ones: then the real system call says
 * what Linux would.
 */
	.intel_syntax noprefix
	.set CLOCK_FUNCTION, 120
	.set NR_clock_gettime, 228
	.set NR_gettimeofday, 96
	.set NR_time, 201
	.set NR_clock_getres, 229

	.text
	.globl	__vdso_clock_gettime
	.type	__vdso_clock_gettime, @function
__vdso_clock_gettime:
	.cfi_startproc
	push	rsi
	.cfi_adjust_cfa_offset 8
	push	rdi
	.cfi_adjust_cfa_offset 8
	sub	rsp, 8
	.cfi_adjust_cfa_offset 8
	call	qword ptr gs:[CLOCK_FUNCTION]
	add	rsp, 8
	.cfi_adjust_cfa_offset -8
	pop	rdi
	.cfi_adjust_cfa_offset -8
	pop	rsi
	.cfi_adjust_cfa_offset -8
	cmp	rax, -1
	je	1f
	mov	ecx, 1000000000
	xor	edx, edx
	div	rcx
	mov	[rsi], rax
	mov	[rsi + 8], rdx
	xor	eax, eax
	ret
1:	mov	eax, NR_clock_gettime
	syscall
	ret
	.cfi_endproc
	.size	__vdso_clock_gettime, . - __vdso_clock_gettime

	.globl	__vdso_gettimeofday
	.type	__vdso_gettimeofday, @function
__vdso_gettimeofday:
	.cfi_startproc
	/* A time zone is asked for by nobody: left to the system call. */
	test	rsi, rsi
	jne	1f
	test	rdi, rdi
	je	1f
	push	rdi
	.cfi_adjust_cfa_offset 8
	xor	edi, edi
	call	qword ptr gs:[CLOCK_FUNCTION]
	pop	rdi
	.cfi_adjust_cfa_offset -8
	mov	ecx, 1000000000
	xor	edx, edx
	div	rcx
	mov	[rdi], rax
	mov	eax, edx
	xor	edx, edx
	mov	ecx, 1000
	div	ecx
	mov	[rdi + 8], rax
	xor	eax, eax
	ret
1:	mov	eax, NR_gettimeofday
	syscall
	ret
	.cfi_endproc
	.size	__vdso_gettimeofday, . - __vdso_gettimeofday

	.globl	__vdso_time
	.type	__vdso_time, @function
__vdso_time:
	.cfi_startproc
	push	rdi
	.cfi_adjust_cfa_offset 8
	xor	edi, edi
	call	qword ptr gs:[CLOCK_FUNCTION]
	pop	rdi
	.cfi_adjust_cfa_offset -8
	mov	ecx, 1000000000
	xor	edx, edx
	div	rcx
	test	rdi, rdi
	je	1f
	mov	[rdi], rax
1:	ret
	.cfi_endproc
	.size	__vdso_time, . - __vdso_time

	.globl	__vdso_clock_getres
	.type	__vdso_clock_getres, @function
__vdso_clock_getres:
	.cfi_startproc
	mov	eax, NR_clock_getres
	syscall
	ret
	.cfi_endproc
	.size	__vdso_clock_getres, . - __vdso_clock_getres

	.globl	__vdso_getcpu
	.type	__vdso_getcpu, @function
__vdso_getcpu:
	.cfi_startproc
	test	rdi, rdi
	je	1f
	mov	dword ptr [rdi], 0
1:	test	rsi, rsi
	je	2f
	mov	dword ptr [rsi], 0
2:	xor	eax, eax
	ret
	.cfi_endproc
	.size	__vdso_getcpu, . - __vdso_getcpu

	.section .note.GNU-stack, "", @progbits
