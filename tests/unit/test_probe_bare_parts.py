"""The parts of the bare probe that need no machine: what its command line asks for, and a vCPU that is lost."""

from __future__ import annotations

import pytest

from tests.unit.probe_parts import Compiled

pytestmark = pytest.mark.row("E18")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Programs of this file, in a folder of their own."""
    return Compiled(tmp_path_factory.mktemp("compiled"))


OPTIONS = r"""
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include "bare_options.h"

/* A command line, and how many CPUs there are. */
int main(int count, char *argument[])
{
    static struct bare_options options;

    (void)count;
    parse_options(argument[1], &options);
    ignore_faults_beyond(&options, (unsigned)atoi(argument[2]));
    printf("%" PRIu64 " ms, %u CPUs\n", options.milliseconds, options.cpus);
    for (unsigned cpu = 0; cpu < PROBE_CPUS_MAX; cpu++)
        if (options.added_ns[cpu])
            printf("[%u] %" PRId64 " ns\n", cpu, options.added_ns[cpu]);
    for (unsigned i = 0; i < options.ignored_count; i++)
        printf("ignored %s\n", options.ignored[i]);
    return 0;
}
"""


TEN_SECONDS = "10000 ms, 64 CPUs"


@pytest.mark.parametrize(
    ("command_line", "lines"),
    [
        ("", [TEN_SECONDS]),
        (" \t seconds=0.1\tcpus=64\n", ["100 ms, 64 CPUs"]),
        ("seconds=86400 cpus=1 cpus=2", ["86400000 ms, 2 CPUs"]),
        ("seconds=1.2345", ["1234 ms, 64 CPUs"]),
        ("seconds=86400.001", [TEN_SECONDS, "ignored seconds=86400.001"]),
        (
            "add=0:1000000000000 add=1:-1000000000000",
            [TEN_SECONDS, "[0] 1000000000000 ns", "[1] -1000000000000 ns"],
        ),
        ("add=0:+7 add=1:1000000000001", [TEN_SECONDS, "[0] 7 ns", "ignored add=1:1000000000001"]),
        ("add=2:5", [TEN_SECONDS, "[2] 5 ns", "ignored add=2:5"]),
        (
            "/probe.img second=1 SECONDS=1",
            [TEN_SECONDS, "ignored /probe.img", "ignored second=1", "ignored SECONDS=1"],
        ),
    ],
)
def test_what_the_command_line_asks_for(compiled: Compiled, command_line: str, lines: list[str]) -> None:
    """Words that make sense are followed, and all others named, as is a fault of one CPU more than there are."""
    assert compiled.prints(OPTIONS, ("bare_options.c",), command_line, "2") == lines


def test_words_without_end(compiled: Compiled) -> None:
    """The first 32 that are not followed are kept, and those that are count all the same."""
    first, *ignored = compiled.prints(OPTIONS, ("bare_options.c",), f"{'x ' * 100}cpus=3", "3")
    assert first == "10000 ms, 3 CPUs"
    assert ignored == ["ignored x"] * 32


CPUS = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "bare.h"
#include "bare_cpus.h"
#include "bare_gate.h"
#include "bare_lapic.h"

/* A machine whose second vCPU is a thread, and runs already. */
const char trampoline[1], trampoline_end[1];
static const char *how;

struct gate_result bare_gate(uint64_t operation, uint64_t first, uint64_t second, uint64_t third)
{
    (void)operation;
    (void)first;
    (void)second;
    memset((void *)third, 0, 16); /* CPUID */
    return (struct gate_result){0, 0};
}

bool lapic_is_there(void) { return false; }
void lapic_send_init(void) {}
void lapic_send_start(void) {}
void lapic_send_wake(void) {}
void lapic_accept(void) {}
void lapic_sleep(void) {}
_Noreturn void bare_fault(uint64_t a, uint64_t b, uint64_t c, uint64_t d) { exit((int)(a | b | c | d)); }

_Noreturn void bare_lost_vcpu(unsigned cpu)
{
    printf("lost %u\n", cpu);
    exit(0);
}

static void work(void *argument, unsigned cpu)
{
    (void)argument;
    while (cpu == 1 && !strcmp(how, "never")) {
    }
}

static void *second_vcpu(void *argument)
{
    bare_enter(1);
    return argument;
}

_Noreturn void bare_main(void)
{
    struct probe_team team = {0};
    pthread_t thread;

    pthread_create(&thread, NULL, second_vcpu, NULL);
    while (team.cpus < 2)
        cpus_start(&team, 2, 2, strcmp(how, "never") ? 1ull << 40 : 100000); /* ticks a second: hours or some ms */
    for (int i = 0; i < 3; i++)
        team.run(&team, 3, work, NULL);
    printf("done\n");
    exit(0);
}

int main(int count, char *argument[])
{
    (void)count;
    how = argument[1];
    bare_enter(0);
    return 1;
}
"""


@pytest.mark.parametrize(("how", "line"), [("at once", "done"), ("never", "lost 1")])
def test_a_vcpu_that_does_not_end_its_work(compiled: Compiled, how: str, line: str) -> None:
    """It is given up after a minute, for the whole run would wait for it forever; one that ends it is waited for."""
    assert compiled.prints(CPUS, ("bare_cpus.c",), how) == [line]
