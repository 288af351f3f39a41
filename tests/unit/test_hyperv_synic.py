"""The synthetic interrupt controller: its MSRs, and the message slots as a guest sees them."""

from __future__ import annotations

from pathlib import Path
from struct import pack, unpack
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, GuestMemory, MsrFault, RangeError
from pvclock._records import post_message
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.hyperv.synic import Synic, message
from tests.unit.c_program import printed_by, told
from tests.unit.stub_clock import GUARD, SIZE, StubClock, written

SCONTROL, SVERSION, SIEFP, SIMP, EOM, SINT0 = 0x40000080, 0x40000081, 0x40000082, 0x40000083, 0x40000084, 0x40000090
SINTS: Final = range(SINT0, SINT0 + 16)
STORED: Final = (SCONTROL, SIEFP, SIMP, *SINTS)
ENABLED: Final = 1
MASKED, AUTO_EOI, POLLING = 1 << 16, 1 << 17, 1 << 18
PAGE, OTHER_PAGE = 0x8000, 0x9000
BEYOND: Final = (SIZE, 2**64 - 4096)
U64: Final = st.integers(0, 2**64 - 1)


def a_synic(**options: bool) -> tuple[Synic, StubClock]:
    """A SynIC of two vCPUs in guest memory full of guard bytes."""
    clock = StubClock(2)
    return Synic(clock, 2, **options), clock


def read(synic: Synic, index: int, vcpu: int = 0) -> int:
    """RDMSR."""
    serve = synic.msrs[index].read
    if serve is None:
        raise MsrFault(index)
    return serve(vcpu)


def write(synic: Synic, index: int, value: int, vcpu: int = 0) -> None:
    """WRMSR."""
    serve = synic.msrs[index].write
    if serve is None:
        raise MsrFault(index, value)
    serve(vcpu, value)


def listening(**options: bool) -> tuple[Synic, StubClock, list[str]]:
    """A SynIC whose SIM page of vCPU 0 is at PAGE, its clock, and what its sender is told from then on."""
    synic, clock = a_synic(**options)
    write(synic, SIMP, PAGE | ENABLED)
    calls = list[str]()
    synic.on_free = lambda: calls.append("free")
    return synic, clock, calls


def slot(clock: StubClock, sint: int, page: int = PAGE) -> bytes:
    """A message slot."""
    return clock.memory.read(page + 256 * sint, 256)


def is_untouched(clock: StubClock) -> bool:
    """Has nothing been written to guest memory?"""
    return clock.memory.read(0, SIZE) == bytes([GUARD]) * SIZE


# The MSRs


@pytest.mark.row("H-40", "H-41")
def test_the_msrs_are_those_of_a_synic() -> None:
    """All of them belong to its privilege; the version is 1, EOM reads 0, and the version cannot be written."""
    synic, _ = a_synic()
    assert set(synic.msrs) == {SVERSION, EOM, *STORED}
    assert {msr.privilege for msr in synic.msrs.values()} == {Privilege.SYNIC}
    assert (read(synic, SVERSION), read(synic, EOM)) == (1, 0)
    with pytest.raises(MsrFault):
        write(synic, SVERSION, 1)


@pytest.mark.row("H-74", "H-40", "H-41")
@given(index=st.sampled_from(STORED), value=U64.map(lambda value: value & ~ENABLED | MASKED), vcpu=st.integers(0, 1))
def test_each_is_a_vcpus_own_and_a_reset_forgets_it(index: int, value: int, vcpu: int) -> None:
    """What is written is what is read, reserved bits too, and all others stay at 0, or masked, as after a reset."""
    synic, clock = a_synic()
    initial = {each: MASKED if each in SINTS else 0 for each in STORED}
    write(synic, index, value, vcpu)
    assert [read(synic, each, vcpu) for each in STORED] == list((initial | {index: value}).values())
    assert [read(synic, each, 1 - vcpu) for each in STORED] == list(initial.values())
    synic.reset()
    assert [read(synic, each, vcpu) for each in STORED] == list(initial.values())
    assert is_untouched(clock)


@pytest.mark.row("H-41")
@given(
    sint=st.integers(0, 15),
    value=st.builds(
        lambda vector, bits, rest: vector | bits | rest << 19,
        st.integers(0, 31) | st.integers(0, 255),
        st.sampled_from([0, MASKED, AUTO_EOI, POLLING, MASKED | POLLING]),
        st.integers(0, 2**45 - 1),
    ),
)
def test_an_unmasked_sint_has_a_vector_from_16_on(sint: int, value: int) -> None:
    """Another one is #GP, and the old value stays; masked, any vector will do, and what is reserved is kept."""
    synic, _ = a_synic()
    write(synic, SINT0 + sint, 0x30)
    if value & 0xFF < 16 and not value & MASKED:
        with pytest.raises(MsrFault, match="vector"):
            write(synic, SINT0 + sint, value)
        value = 0x30
    else:
        write(synic, SINT0 + sint, value)
    assert read(synic, SINT0 + sint) == value
    silent = value & (MASKED | POLLING)
    assert synic.vector(0, sint) == (None if silent else value & 0xFF)
    assert synic.vector(1, sint) is None


@pytest.mark.row("H-40")
@pytest.mark.parametrize("index", [SIEFP, SIMP])
def test_enabling_a_page_zeroes_it(index: int) -> None:
    """All of it and nothing else; disabling, or another address without enabling, writes nothing."""
    synic, clock = a_synic()
    write(synic, index, OTHER_PAGE)
    write(synic, index, PAGE | ENABLED | 0xAAA)
    assert clock.memory.read(PAGE - 64, 4096 + 128) == bytes([GUARD]) * 64 + bytes(4096) + bytes([GUARD]) * 64
    assert read(synic, index) == PAGE | ENABLED | 0xAAA
    clock.memory.write(PAGE, b"a message")
    write(synic, index, PAGE)
    assert clock.memory.read(PAGE, 9) == b"a message"


@pytest.mark.row("H-40")
@pytest.mark.parametrize("index", [SIEFP, SIMP])
@pytest.mark.parametrize("gpa", BEYOND)
def test_a_page_has_to_be_in_memory(index: int, gpa: int) -> None:
    """Enabling it elsewhere is #GP, with the old page still in use; without enabling it any address is stored."""
    synic, clock = a_synic()
    write(synic, index, PAGE | ENABLED)
    with pytest.raises(MsrFault, match="memory"):
        write(synic, index, gpa | ENABLED)
    assert read(synic, index) == PAGE | ENABLED
    write(synic, index, gpa)
    assert read(synic, index) == gpa
    assert written(clock.memory) == [PAGE]


@pytest.mark.row("H-40")
@pytest.mark.parametrize("value", [OTHER_PAGE, SIZE | ENABLED, OTHER_PAGE | ENABLED])
def test_virtualboxs_siefp_is_stored_and_faults(value: int) -> None:
    """A read is #GP, and so is a write that does not enable a page in memory; the value is there all the same."""
    synic, clock = a_synic(siefp_faults=True)
    with pytest.raises(MsrFault):
        read(synic, SIEFP)
    if value == OTHER_PAGE | ENABLED:
        write(synic, SIEFP, value)
    else:
        with pytest.raises(MsrFault):
            write(synic, SIEFP, value)
    assert synic.save()["siefp"] == (value, 0)
    assert bool(written(clock.memory)) == (value == OTHER_PAGE | ENABLED)


@pytest.mark.row("H-40")
@pytest.mark.parametrize("gpa", BEYOND)
def test_virtualbox_takes_any_sim_page(gpa: int) -> None:
    """No #GP; no message finds a slot there.  One in memory is zeroed as elsewhere."""
    synic, clock = a_synic(takes_any_simp=True)
    write(synic, SIMP, gpa | ENABLED)
    assert read(synic, SIMP) == gpa | ENABLED
    assert not synic.post(0, 0, message(1, b""), waits=True)
    assert written(clock.memory) == []
    write(synic, SIMP, PAGE | ENABLED)
    assert synic.post(0, 0, message(1, b""), waits=True)
    assert slot(clock, 1) == bytes(256)


# Messages


@pytest.mark.row("H-40", "H-42")
@given(sint=st.integers(0, 15), words=st.lists(st.integers(0, 2**32 - 1), max_size=60), pending=st.booleans())
def test_a_message_is_in_its_slot(sint: int, words: list[int], pending: bool) -> None:
    """Type, payload size, flags, no sender, payload; the other slots stay as they were."""
    synic, clock, _ = listening()
    payload = pack(f"<{len(words)}I", *words)
    assert synic.post(0, sint, message(0x80000010, payload, pending=pending), waits=True)
    expected = pack("<IBBHQ", 0x80000010, len(payload), int(pending), 0, 0) + payload
    assert slot(clock, sint) == expected.ljust(256, b"\0")
    assert all(slot(clock, other) == bytes(256) for other in range(16) if other != sint)


@pytest.mark.row("H-40")
@given(slot_bytes=st.binary(min_size=256, max_size=256), waits=st.booleans())
def test_whatever_is_in_a_slot_only_its_type_counts(slot_bytes: bytes, waits: bool) -> None:
    """A slot whose type is not 0 keeps its message; one who waits sets one bit of its flags.  Else it is free."""
    synic, clock, _ = listening()
    clock.memory.write(PAGE + 512, slot_bytes)
    is_free = slot_bytes[:4] == bytes(4)
    new = message(7, b"new message!")
    assert synic.post(0, 2, new, waits=waits) is is_free
    if is_free:
        assert slot(clock, 2) == new + slot_bytes[len(new) :]
    else:
        flags = slot_bytes[5] | (1 if waits else 0)
        assert slot(clock, 2) == slot_bytes[:5] + bytes([flags]) + slot_bytes[6:]


@pytest.mark.row("H-40")
def test_without_a_sim_page_nothing_is_posted() -> None:
    """Not enabled, disabled, gone from memory, or another vCPU's: the message is not there, and nothing is written."""
    synic, clock, _ = listening()
    before = clock.memory.read(0, SIZE)
    assert not synic.post(1, 0, message(7, b""), waits=True)
    write(synic, SIMP, PAGE)
    assert not synic.post(0, 0, message(7, b""), waits=True)
    assert clock.memory.read(0, SIZE) == before
    write(synic, SIMP, PAGE | ENABLED)
    clock.memory.remove_slot(0)
    assert not synic.post(0, 0, message(7, b""), waits=True)


@pytest.mark.row("H-40")
def test_eom_and_a_new_sim_page_are_told_to_the_sender() -> None:
    """Either may be what a message waits for."""
    synic, _, calls = listening()
    write(synic, EOM, 0)
    assert calls == ["free"]
    write(synic, SIMP, OTHER_PAGE | ENABLED)
    assert calls == ["free"] * 2
    for index in (SCONTROL, SIEFP, SINT0):
        write(synic, index, MASKED)
    assert calls == ["free"] * 2


@pytest.mark.row("H-40")
def test_virtualboxs_eom_does_nothing() -> None:
    """No message that waits is tried again for it."""
    synic, _, calls = listening(ignores_eom=True)
    write(synic, EOM, 0)
    assert calls == []


@pytest.mark.row("H-40")
@pytest.mark.parametrize("length", [0, 12, 15, 17, 260])
def test_a_message_has_a_header_and_fits_its_slot(length: int) -> None:
    """Any other is the sender's error."""
    memory = GuestMemory(bytearray(4096))
    with pytest.raises(RangeError, match="16 to 256"):
        post_message(memory, 0, bytes([1]) * length, False)
    assert memory.read(0, 512) == bytes(512)


@pytest.mark.row("H-40", "E9")
@pytest.mark.parametrize(("slot_type", "waits", "is_dirty"), [(0, False, True), (9, True, True), (9, False, False)])
def test_what_is_written_is_told(slot_type: int, waits: bool, is_dirty: bool) -> None:
    """A message or a flag makes the slot dirty; a slot that was only read is not."""
    synic, clock, _ = listening()
    clock.memory.write(PAGE, pack("<I", slot_type))
    dirty = list[tuple[int, int]]()
    clock.memory.on_dirty = lambda gpa, length: dirty.append((gpa, length))
    synic.post(0, 0, message(7, b""), waits=waits)
    assert dirty == ([(PAGE, 256)] if is_dirty else [])


# The guest beside it

PROGRAM: Final = r"""
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static void at_fence(int order);
static void at_or(void);
#define __atomic_thread_fence(order) at_fence(order)
#define __atomic_fetch_or(at, bit, order) (at_or(), *(at) |= (bit))
#include "hyperv_message.h"
#undef __atomic_thread_fence

static _Alignas(8) uint8_t slot[HYPERV_MESSAGE_BYTES];
static const uint32_t message[5] = { 7, 0x0104, 0, 0, 0x55 };
static int frees_at_or;

static uint32_t word(int place)
{
	return pvclock_load32(slot + 4 * place);
}

static void at_fence(int order)
{
	if (order == __ATOMIC_RELEASE)
		printf("fence %" PRIu32 " %" PRIx32 " %" PRIx32 "\n", word(0), word(1), word(4));
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static void at_or(void)
{
	if (frees_at_or)
		pvclock_store32(slot, 0);
}

static void post(uint32_t type, int frees, int waits)
{
	memset(slot, 0, sizeof(slot));
	pvclock_store32(slot, type);
	frees_at_or = frees;
	printf("posted %d", hyperv_message_post(slot, message, sizeof(message), waits));
	printf(" %" PRIu32 " %" PRIx32 " %" PRIx32 "\n", word(0), word(1), word(4));
}

int main(void)
{
	post(0, 0, 0);
	post(9, 0, 1);
	post(9, 0, 0);
	post(9, 1, 1);
	return 0;
}
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what the program prints."""
    return printed_by(PROGRAM, tmp_path_factory.mktemp("message"))


@pytest.mark.row("H-40")
def test_the_type_is_written_last(printed: list[str]) -> None:
    """At the fence before it the rest of the message is there, and the slot is still free to the guest."""
    assert told(printed, "fence") == ["0 104 55"] * 2


@pytest.mark.row("H-40")
def test_a_slot_freed_before_the_flag_is_set_is_found_free(printed: list[str]) -> None:
    """Then the guest has not seen the flag and writes no EOM: the message is posted at once, with its own flags."""
    assert told(printed, "posted") == ["1 7 104 55", "0 9 100 0", "0 9 0 0", "1 7 104 55"]


RACE: Final = r"""
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include "hyperv_message.h"

#define MESSAGES 300000u

static _Alignas(8) uint8_t slot[HYPERV_MESSAGE_BYTES];
static int end_of_message;
static unsigned waits, wrong;

/* Linux's guest: it frees the slot, and only then looks at the flag. */
static void *guest(void *unused)
{
	for (uint32_t last = 0; last < MESSAGES; last++) {
		uint32_t type;

		while ((type = __atomic_load_n((uint32_t *)slot, __ATOMIC_ACQUIRE)) == 0)
			sched_yield();
		wrong += type != last + 1 || pvclock_load32(slot + 16) != ~type;
		__atomic_store_n((uint32_t *)slot, 0, __ATOMIC_RELAXED);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (__atomic_load_n(slot + 5, __ATOMIC_RELAXED) & HYPERV_MESSAGE_PENDING)
			__atomic_store_n(&end_of_message, 1, __ATOMIC_SEQ_CST);
	}
	return unused;
}

int main(void)
{
	pthread_t thread;

	pthread_create(&thread, NULL, guest, NULL);
	for (uint32_t type = 1; type <= MESSAGES; type++) {
		uint32_t message[5] = { type, 4, 0, 0, ~type };

		while (!hyperv_message_post(slot, message, sizeof(message), 1)) {
			waits++;
			while (!__atomic_exchange_n(&end_of_message, 0, __ATOMIC_SEQ_CST))
				sched_yield();
		}
	}
	pthread_join(thread, NULL);
	printf("race %d %u\n", waits > 0, wrong);
	return 0;
}
"""


@pytest.mark.row("H-40")
def test_a_guest_on_another_cpu_gets_every_message_whole_and_once(tmp_path: Path) -> None:
    """A sender that sleeps until EOM is always woken: 300,000 messages through one slot, many of which had to wait."""
    assert told(printed_by(RACE, tmp_path, "-O2", "-pthread"), "race") == ["1 0"]


# Saved


@pytest.mark.row("H-72")
@given(
    control=U64, siefp=U64, simp=U64, sints=st.lists(U64.map(lambda value: value | MASKED), min_size=32, max_size=32)
)
def test_all_is_saved_and_loaded(control: int, siefp: int, simp: int, sints: list[int]) -> None:
    """What VirtualBox leaves out, too; what is loaded is saved again, and writes no page."""
    synic, clock = a_synic()
    saved = {"scontrol": (control, 1), "siefp": (siefp, 2), "simp": (simp, 3), "sint": tuple(sints)}
    assert set(saved) == set(synic.save())
    synic.checked(saved)()
    assert synic.save() == saved
    assert [read(synic, index, 1) for index in STORED] == [1, 2, 3, *sints[16:]]
    assert is_untouched(clock)


@pytest.mark.row("H-72")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scontrol", (1, 2, 3)),
        ("scontrol", 1),
        ("siefp", (1, -1)),
        ("simp", (1, 2**64)),
        ("simp", (1, True)),
        ("sint", (MASKED,) * 31),
        ("sint", (MASKED,) * 31 + (15,)),
        ("sint", None),
    ],
)
def test_what_was_never_saved_is_refused(name: str, value: object) -> None:
    """With an error that names it, and nothing changed."""
    synic, _ = a_synic()
    write(synic, SINT0, 0x30)
    before = synic.save()
    with pytest.raises(ConfigError, match=name):
        synic.checked({**before, name: value})
    assert synic.save() == before


@pytest.mark.row("H-73")
@given(
    values=st.lists(st.sampled_from([MASKED | 0x40, 0x41, 0x42 | AUTO_EOI, 0x43 | POLLING]), min_size=32, max_size=32),
    types=st.lists(st.sampled_from([0, 1, 0x80000010]), min_size=32, max_size=32),
    enabled=st.tuples(st.booleans(), st.booleans()),
)
def test_interrupts_of_messages_are_sent_again_once(
    values: list[int], types: list[int], enabled: tuple[bool, bool]
) -> None:
    """After a load, for each slot with a message whose SINT interrupts; before it, and the second time, for none."""
    synic, clock = a_synic()
    pages = (PAGE, OTHER_PAGE)
    for vcpu in range(2):
        for sint in range(16):
            clock.memory.write(pages[vcpu] + 256 * sint, pack("<I", types[16 * vcpu + sint]))
    simp = tuple(page | on for page, on in zip(pages, enabled, strict=True))
    load = synic.checked({**synic.save(), "simp": simp, "sint": tuple(values)})
    assert (synic.is_resend_due, list(synic.resend())) == (False, [])
    load()
    expected = [
        (vcpu, values[16 * vcpu + sint] & 0xFF)
        for vcpu in range(2)
        for sint in range(16)
        if enabled[vcpu] and types[16 * vcpu + sint] and values[16 * vcpu + sint] & 0xFF in (0x41, 0x42)
    ]
    assert synic.is_resend_due
    assert list(synic.resend()) == expected
    assert (synic.is_resend_due, list(synic.resend())) == (False, [])


@pytest.mark.row("H-73", "H-74")
def test_a_reset_sends_nothing_again() -> None:
    """Nor does a state whose SIM page is not in memory."""
    synic, _ = a_synic()
    synic.checked({**synic.save(), "simp": (SIZE | ENABLED, 0), "sint": (0x30,) * 32})()
    assert list(synic.resend()) == []
    synic.checked({**synic.save(), "simp": (PAGE | ENABLED, 0)})()  # guard bytes are messages
    synic.reset()
    assert not synic.is_resend_due
    assert list(synic.resend()) == []


def unpacked(clock: StubClock, sint: int) -> tuple[int, ...]:
    """Type, payload size and flags in a slot."""
    return unpack("<IBB", slot(clock, sint)[:6])


@pytest.mark.row("H-40")
@given(turns=st.lists(st.sampled_from(["post", "read"]), max_size=40))
def test_no_message_is_lost_or_doubled(turns: list[str]) -> None:
    """A sender that keeps what it could not post until on_free(), and a guest that obeys the flag: each comes once."""
    synic, clock, calls = listening()
    queue, sent, received = list[int](), 0, list[int]()

    def post() -> bool:
        return synic.post(0, 3, message(queue[0], b"", pending=len(queue) > 1), waits=True)

    for turn in [*turns, *["read"] * len(turns)]:
        if turn == "post":
            sent += 1
            queue.append(sent)
            if len(queue) == 1 and post():
                queue.pop()
        else:
            kind, _, _ = unpacked(clock, 3)
            received += [kind] if kind else []
            clock.memory.write(PAGE + 768, bytes(4))
            if unpacked(clock, 3)[2] & 1:
                write(synic, EOM, 0)
        while calls:
            calls.pop()
            if queue and post():
                queue.pop(0)
    assert received == list(range(1, sent + 1))
    assert queue == []
