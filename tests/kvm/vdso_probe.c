/*
 * Reads CLOCK_MONOTONIC where the system call for it would be the end of the process: what it prints came from the vDSO.
 *
 * Strict seccomp mode would take RDTSC away, too, so this is a filter of its own.
 */
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>

enum { READS = 1000000 };

static int forbid_clock_gettime(void) {
    struct sock_filter steps[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clock_gettime, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof steps / sizeof *steps, steps};

    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter);
}

int main(void) {
    struct timespec last = {0, 0}, now;
    long back = 0;

    if (forbid_clock_gettime() != 0)
        return 2;
    for (int i = 0; i < READS; i++) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        back += now.tv_sec < last.tv_sec || (now.tv_sec == last.tv_sec && now.tv_nsec < last.tv_nsec);
        last = now;
    }
    printf("vdso reads %d back %ld\n", READS, back);
    return 0;
}
