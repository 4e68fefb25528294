/*
 * ptrace(2) for a User Mode Linux that is older than its processor.
 *
 * UML keeps the floating point state of a process in 2696 bytes. Where the processor has more (Intel AMX), Linux gives
 * it that much and takes only a whole state back: UML's PTRACE_SETREGSET fails with EFAULT. What is missing then is what
 * the process has now; UML's guests cannot use it.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define LARGEST 65536
#define HEADER 512 /* of an XSAVE area, in its standard format: XSTATE_BV, a bit for each component */
#define TILES (UINT64_C(3) << 17)

static long set_whole(pid_t pid, const struct iovec *given)
{
	static _Thread_local unsigned char state[LARGEST];
	struct iovec whole = {state, sizeof state};
	uint64_t now, wanted;

	if (syscall(SYS_ptrace, PTRACE_GETREGSET, pid, NT_X86_XSTATE, &whole) < 0)
		return -1;
	if (given->iov_len < HEADER + sizeof now || given->iov_len >= whole.iov_len) {
		errno = EFAULT;
		return -1;
	}
	memcpy(&now, state + HEADER, sizeof now);
	memcpy(state, given->iov_base, given->iov_len);
	memcpy(&wanted, state + HEADER, sizeof wanted);
	wanted = (wanted & ~TILES) | (now & TILES);
	memcpy(state + HEADER, &wanted, sizeof wanted);
	return syscall(SYS_ptrace, PTRACE_SETREGSET, pid, NT_X86_XSTATE, &whole);
}

long ptrace(enum __ptrace_request request, ...)
{
	va_list arguments;
	va_start(arguments, request);
	pid_t pid = va_arg(arguments, pid_t);
	void *address = va_arg(arguments, void *);
	void *data = va_arg(arguments, void *);
	va_end(arguments);

	long peeked, result;
	if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER) {
		/* the system call stores the word, the library's function returns it */
		if (syscall(SYS_ptrace, request, pid, address, &peeked) < 0)
			return -1;
		errno = 0;
		return peeked;
	}
	result = syscall(SYS_ptrace, request, pid, address, data);
	/* whatever errno says: UML's threads share one, and another may have failed at something else since */
	if (result < 0 && request == PTRACE_SETREGSET && (uintptr_t)address == NT_X86_XSTATE)
		result = set_whole(pid, data);
	return result;
}
