/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#define _GNU_SOURCE
#include "linux_team.h"

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>

enum { STACK_BYTES = 256 << 10 };

/* One call of run(). */
struct joint_work {
    struct linux_team *team;
    void (*work)(void *argument, unsigned cpu);
    void *argument;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned pinned;                    /* threads that are on their CPU, or could not get there */
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

static bool pin(int cpu)
{
    large_cpu_set set = {0};

    CPU_SET_S((size_t)cpu, sizeof(set), set.part);
    return !sched_setaffinity(0, sizeof(set), set.part);
}

/* Say that this thread is where it is to be, and wait for the others; whether all are. */
static bool all_are_pinned(struct joint_work *joint)
{
    bool begin;

    pthread_mutex_lock(&joint->lock);
    joint->pinned++;
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
    int number = joint->team->cpus->number[member->cpu];

    if (!pin(number))
        joint->team->lost_cpu = number;
    if (all_are_pinned(joint)) {
        joint->work(joint->argument, member->cpu);
        if (sched_getcpu() != number)
            joint->team->lost_cpu = number;
    }
    return NULL;
}

/* Start a thread for each of `members`; the count of those that there are. */
static unsigned start_threads(struct joint_work *joint, uint64_t members, struct member *threads)
{
    pthread_attr_t attributes;
    unsigned count = 0;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    for (unsigned cpu = 0; cpu < joint->team->cpus->count; cpu++) {
        if (!(members >> cpu & 1))
            continue;
        threads[count] = (struct member){.joint = joint, .cpu = cpu};
        if (pthread_create(&threads[count].thread, &attributes, thread_of, &threads[count]))
            joint->team->lost_cpu = joint->team->cpus->number[cpu];
        else
            count++;
    }
    pthread_attr_destroy(&attributes);
    return count;
}

static void give_order(struct joint_work *joint, unsigned threads)
{
    pthread_mutex_lock(&joint->lock);
    while (joint->pinned < threads)
        pthread_cond_wait(&joint->changed, &joint->lock);
    joint->order = joint->team->lost_cpu < 0 ? BEGIN : ABANDON;
    pthread_cond_broadcast(&joint->changed);
    pthread_mutex_unlock(&joint->lock);
}

static void run(struct probe_team *team, uint64_t members, void (*work)(void *argument, unsigned cpu), void *argument)
{
    struct joint_work joint = {.team = team->state,
                               .work = work,
                               .argument = argument,
                               .lock = PTHREAD_MUTEX_INITIALIZER,
                               .changed = PTHREAD_COND_INITIALIZER};
    struct member threads[PROBE_CPUS_MAX];
    unsigned count;

    if (joint.team->lost_cpu >= 0)
        return;
    count = start_threads(&joint, members, threads);
    give_order(&joint, count);
    for (unsigned i = 0; i < count; i++)
        pthread_join(threads[i].thread, NULL);
}

void linux_team_begin(struct probe_team *team, struct linux_team *state, const struct cpu_list *cpus)
{
    state->cpus = cpus;
    state->lost_cpu = -1;
    team->cpus = cpus->count;
    team->run = run;
    team->state = state;
}

int lost_cpu(const struct probe_team *team)
{
    const struct linux_team *state = team->state;

    return state->lost_cpu;
}
