# The guest of vmm.py, in real mode: it registers a time page by WRMSR, reads its clock, and shows each reading.
# At its start: EBX is the page's address, EAX the same with bit 0, which enables it, EDI where a reading goes (its TSC
# and the clock's ns, 64 bits each).
# As any guest of KVM's clock it reads version, TSC and line, and begins anew if the version was odd or has changed.

	.code16
	mov	$0x4b564d01, %ecx	# MSR_KVM_SYSTEM_TIME_NEW
	cdq				# the address's upper half: none
	wrmsr
read:
	mov	(%bx), %esi		# version
	test	$1, %si
	jnz	read
	lfence
	rdtsc
	mov	%eax, (%di)
	mov	%edx, 4(%di)
	sub	8(%bx), %eax		# ticks since tsc_timestamp, in EDX:EAX
	sbb	12(%bx), %edx
	mov	28(%bx), %cl		# tsc_shift
	test	%cl, %cl
	js	right
	shld	%cl, %eax, %edx
	shl	%cl, %eax
	jmp	multiply
right:
	neg	%cl
	shrd	%cl, %edx, %eax
	shr	%cl, %edx
multiply:				# by tsc_to_system_mul, 32 bits after the point
	mov	%edx, %ecx
	mull	24(%bx)
	xchg	%edx, %ecx
	mov	%edx, %eax
	mull	24(%bx)
	add	%ecx, %eax
	adc	$0, %edx
	add	16(%bx), %eax		# system_time
	adc	20(%bx), %edx
	cmp	%esi, (%bx)
	jne	read
	mov	%eax, 8(%di)
	mov	%edx, 12(%di)
	out	%al, $0x10		# here is a reading
	jmp	read
