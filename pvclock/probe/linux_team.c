/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#define _GNU_SOURCE
#include "linux_team.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "linux_fail.h"

enum { STACK_BYTES = 256 << 10 };

/* One call of run(). */
struct joint_work {
    const struct cpu_list *cpus;
    void (*work)(void *argument, unsigned cpu);
    void *argument;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned ready;                      /* threads that are on their CPU, or could not get there */
    atomic_int lost_cpu;                 /* the number of a CPU that could not be had, or -1 */
    atomic_int refusal;                  /* the error number by which no thread may be pinned, or 0 */
    enum { WAIT, BEGIN, ABANDON } order; /* a thread without its partner would wait for it forever */
};

struct member {
    struct joint_work *joint;
    unsigned cpu;
    pthread_t thread;
};

/* A set of CPUs that is large enough for any kernel: it refuses a smaller one than it may need. */
typedef struct {
    cpu_set_t part[(CPU_NUMBER_MAX + 1) / CPU_SETSIZE];
} large_cpu_set;

/* Empty where the kernel does not say. */
static large_cpu_set own_affinity(void)
{
    large_cpu_set set;

    if (sched_getaffinity(0, sizeof(set), set.part))
        return (large_cpu_set){0};
    return set;
}

bool may_run_on(int number)
{
    large_cpu_set set = own_affinity();

    return number >= 0 && number <= CPU_NUMBER_MAX && CPU_ISSET_S((size_t)number, sizeof(set), set.part);
}

struct cpu_list allowed_cpus(void)
{
    large_cpu_set set = own_affinity();
    struct cpu_list allowed = {.count = 0};

    for (int cpu = 0; cpu <= CPU_NUMBER_MAX && allowed.count < PROBE_CPUS_MAX; cpu++)
        if (CPU_ISSET_S((size_t)cpu, sizeof(set), set.part))
            allowed.number[allowed.count++] = cpu;
    return allowed;
}

int cpu_place(const struct cpu_list *cpus, int number)
{
    for (unsigned place = 0; place < cpus->count; place++)
        if (cpus->number[place] == number)
            return (int)place;
    return -1;
}

/* 0, or an error number: EINVAL is of a CPU that is offline or forbidden. */
static int pin(int cpu)
{
    large_cpu_set set = {0};

    CPU_SET_S((size_t)cpu, sizeof(set), set.part);
    return sched_setaffinity(0, sizeof(set), set.part) ? errno : 0;
}

static void pin_member(struct joint_work *joint, int number)
{
    int error = pin(number);

    if (error == EINVAL)
        joint->lost_cpu = number;
    else if (error)
        joint->refusal = error;
}

/* Say that this thread is where it is to be, and wait for the others; whether all are. */
static bool all_are_pinned(struct joint_work *joint)
{
    bool begin;

    pthread_mutex_lock(&joint->lock);
    joint->ready++;
    pthread_cond_broadcast(&joint->changed);
    while (joint->order == WAIT)
        pthread_cond_wait(&joint->changed, &joint->lock);
    begin = joint->order == BEGIN;
    pthread_mutex_unlock(&joint->lock);
    return begin;
}

/* A CPU that is unplugged loses its threads to another, whatever they are pinned to. */
static void *thread_of(void *argument)
{
    struct member *member = argument;
    struct joint_work *joint = member->joint;
    int number = joint->cpus->number[member->cpu];

    pin_member(joint, number);
    if (all_are_pinned(joint)) {
        joint->work(joint->argument, member->cpu);
        if (sched_getcpu() != number)
            joint->lost_cpu = number;
    }
    return NULL;
}

static void start_thread(struct member *member, const pthread_attr_t *attributes)
{
    int error = pthread_create(&member->thread, attributes, thread_of, member);

    if (error)
        fail("no thread for CPU %d: %s", member->joint->cpus->number[member->cpu], strerror(error));
}

/* Start a thread for each of `members`; their count. */
static unsigned start_threads(struct joint_work *joint, uint64_t members, struct member *threads)
{
    pthread_attr_t attributes;
    unsigned count = 0;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    for (unsigned cpu = 0; cpu < joint->cpus->count; cpu++)
        if (members >> cpu & 1) {
            threads[count] = (struct member){.joint = joint, .cpu = cpu};
            start_thread(&threads[count++], &attributes);
        }
    pthread_attr_destroy(&attributes);
    return count;
}

static void give_order(struct joint_work *joint, unsigned threads)
{
    pthread_mutex_lock(&joint->lock);
    while (joint->ready < threads)
        pthread_cond_wait(&joint->changed, &joint->lock);
    joint->order = joint->lost_cpu < 0 && !joint->refusal ? BEGIN : ABANDON;
    pthread_cond_broadcast(&joint->changed);
    pthread_mutex_unlock(&joint->lock);
}

static void run(struct probe_team *team, uint64_t members, void (*work)(void *argument, unsigned cpu), void *argument)
{
    struct joint_work joint = {.cpus = team->state,
                               .work = work,
                               .argument = argument,
                               .lock = PTHREAD_MUTEX_INITIALIZER,
                               .changed = PTHREAD_COND_INITIALIZER,
                               .lost_cpu = -1};
    struct member threads[PROBE_CPUS_MAX];
    unsigned count = start_threads(&joint, members, threads);

    give_order(&joint, count);
    for (unsigned i = 0; i < count; i++)
        pthread_join(threads[i].thread, NULL);
    if (joint.refusal)
        fail("no thread may be pinned to a CPU here (sched_setaffinity: %s); a seccomp filter may be why",
             strerror(joint.refusal));
    if (joint.lost_cpu >= 0)
        fail("CPU %d was not to be had to the end: it went offline, or this process may not run on it any more",
             joint.lost_cpu);
}

void linux_team_begin(struct probe_team *team, const struct cpu_list *cpus)
{
    team->cpus = cpus->count;
    team->run = run;
    team->state = (void *)cpus;
}
