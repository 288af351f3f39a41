"""Asynchronous page faults: what may be enabled, what is delivered when, and the two words of it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from pvclock import KvmFeature, MsrFault, RangeError
from pvclock.providers.kvm import KvmProvider
from tests.unit.stub_clock import GUARD, SIZE, StubClock, a_provider, u32

ENABLE, INTERRUPT, ACK = 0x4B564D02, 0x4B564D06, 0x4B564D07
WORDS = 0x6000
ALL = int(KvmFeature.ASYNC_PF | KvmFeature.ASYNC_PF_VMEXIT | KvmFeature.ASYNC_PF_INT)
ON, SEND_ALWAYS, AS_VMEXIT, AS_INT = 1, 2, 4, 8


def enabled(bits: int = ON | AS_INT, *, profile: str = "linux") -> tuple[KvmProvider, StubClock]:
    """A provider whose vCPU 0 has enabled events with `bits`, its words at WORDS being 0."""
    provider, clock = a_provider(features=ALL, profile=profile)
    clock.memory.write(WORDS, bytes(8))
    provider.write_msr(0, ENABLE, WORDS | bits)
    return provider, clock


def words(clock: StubClock) -> tuple[int, int]:
    """Reason and token."""
    return u32(clock.memory, WORDS), u32(clock.memory, WORDS + 4)


@pytest.mark.row("K-21")
@pytest.mark.parametrize("bits", range(64))
@pytest.mark.parametrize("vmexit", [False, True])
@pytest.mark.parametrize("interrupt", [False, True])
def test_reserved_bits_grow_with_the_features(bits: int, vmexit: bool, interrupt: bool) -> None:
    """Bits 4 and 5 always fault, bits 2 and 3 where CPUID does not offer what they ask for (T4)."""
    features = KvmFeature.ASYNC_PF
    features |= KvmFeature.ASYNC_PF_VMEXIT if vmexit else KvmFeature(0)
    features |= KvmFeature.ASYNC_PF_INT if interrupt else KvmFeature(0)
    provider, _ = a_provider(features=int(features))
    legal = 0b0011 | vmexit << 2 | interrupt << 3
    if bits & ~legal:
        with pytest.raises(MsrFault, match="reserved"):
            provider.write_msr(0, ENABLE, WORDS | bits)
        assert provider.read_msr(0, ENABLE) == 0
    else:
        provider.write_msr(0, ENABLE, WORDS | bits)
        assert provider.read_msr(0, ENABLE) == WORDS | bits


@pytest.mark.row("K-21")
@pytest.mark.parametrize(("profile", "bit_3_is_legal"), [("linux", True), ("document", False)])
def test_the_first_documents_know_three_bits(profile: str, bit_3_is_legal: bool) -> None:
    """As first documented, bit 3 is reserved like 4 and 5."""
    provider, _ = a_provider(features=ALL, profile=profile)
    provider.write_msr(0, ENABLE, WORDS | 0x7)
    assert provider.read_msr(0, ENABLE) == WORDS | 0x7
    with nullcontext() if bit_3_is_legal else pytest.raises(MsrFault, match="reserved"):
        provider.write_msr(0, ENABLE, WORDS | 0xF)
    assert provider.read_msr(0, ENABLE) == WORDS | (0xF if bit_3_is_legal else 0x7)


@pytest.mark.row("K-21")
def test_words_must_be_in_memory_once_both_bits_are_set() -> None:
    """Linux looks for memory only if bits 0 and 3 are set, and stores the value before it does."""
    provider, _ = a_provider(features=ALL)
    provider.write_msr(0, ENABLE, SIZE | ON)
    with pytest.raises(MsrFault, match="no 8 bytes"):
        provider.write_msr(0, ENABLE, SIZE | ON | AS_INT)
    assert provider.read_msr(0, ENABLE) == SIZE | ON | AS_INT
    assert not provider.inject_not_present(0, 5, 3)
    assert not provider.page_ready(0, 5)
    strict, _ = a_provider(features=ALL, profile="document")
    with pytest.raises(MsrFault, match="no 8 bytes"):
        strict.write_msr(0, ENABLE, SIZE | ON)
    assert not strict.inject_not_present(0, 5, 3)
    assert not strict.page_ready(0, 5)


@pytest.mark.row("K-21")
@pytest.mark.parametrize("profile", ["linux", "document"])
@pytest.mark.parametrize("gpa", [WORDS + 0x40, WORDS + 0x1C0, SIZE - 0x40])
def test_the_words_are_at_any_64_bytes(profile: str, gpa: int) -> None:
    """Both words are written at the address in bits 6 to 63, and not a byte beside them."""
    provider, clock = a_provider(features=ALL, profile=profile)
    clock.memory.write(gpa, bytes(8))
    expected = bytearray(clock.memory.read(0, SIZE))
    provider.write_msr(0, ENABLE, gpa | ON | (AS_INT if profile == "linux" else 0))
    assert provider.inject_not_present(0, 5, 3)
    expected[gpa] = 1
    assert clock.memory.read(0, SIZE) == expected
    clock.memory.write(gpa, bytes(4))
    assert provider.page_ready(0, 5)
    expected[gpa : gpa + 8] = bytes((0, 0, 0, 0, 5, 0, 0, 0) if profile == "linux" else (2, *bytes(7)))
    assert clock.memory.read(0, SIZE) == expected


@pytest.mark.row("K-22")
def test_a_page_that_is_not_present_and_then_is() -> None:
    """Reason 1 for the fault; the token of the page that is there in the second word, by an interrupt."""
    provider, clock = enabled()
    provider.write_msr(0, INTERRUPT, 0xEC)
    assert provider.inject_not_present(0, 0x1001, 3)
    assert words(clock) == (1, 0)
    clock.memory.write(WORDS, bytes(4))  # the guest has taken it
    assert provider.page_ready(0, 0x1001)
    assert words(clock) == (0, 0x1001)
    assert (provider.async_pf_vector(0), provider.awaits_ack(0)) == (0xEC, True)
    assert clock.memory.read(WORDS + 8, 56) == bytes([GUARD]) * 56


@pytest.mark.row("K-22")
def test_as_first_documented_a_page_ready_is_a_fault_with_reason_2() -> None:
    """Both events came in the reason word then, with the token in CR2; bit 0 alone enables them."""
    provider, clock = enabled(ON, profile="document")
    assert provider.inject_not_present(0, 0x1001, 3)
    assert words(clock) == (1, 0)
    clock.memory.write(WORDS, bytes(4))
    assert provider.page_ready(0, 0x1001)
    assert words(clock) == (2, 0)
    assert not provider.awaits_ack(0)


@pytest.mark.row("K-22")
def test_a_reason_is_the_guests_to_clear() -> None:
    """A page may be ready before the guest has seen that it was not present: the reason stays for the guest."""
    provider, clock = enabled()
    assert provider.inject_not_present(0, 7, 3)
    assert provider.page_ready(0, 7)
    assert words(clock) == (1, 7)


@pytest.mark.row("K-23")
def test_all_who_wait_are_woken_by_one_token() -> None:
    """0xffffffff is nobody's token and everybody's; it waits for the guest, and for its ACK, as others do."""
    provider, clock = enabled()
    assert provider.page_ready(0, 7)
    provider.write_msr(0, ACK, 1)
    assert not provider.wake_all(0)
    assert words(clock) == (0, 7)
    clock.memory.write(WORDS, bytes(8))
    assert provider.wake_all(0)
    assert words(clock) == (0, 0xFFFFFFFF)
    assert provider.awaits_ack(0)
    assert not provider.wake_all(1)


@pytest.mark.row("K-23")
def test_as_first_documented_all_are_woken_by_a_fault() -> None:
    """The word says that a page is ready; that it is all of them stands in CR2, which is the VMM's to set."""
    provider, clock = enabled(ON, profile="document")
    assert provider.wake_all(0)
    assert words(clock) == (2, 0)
    assert not provider.awaits_ack(0)


@pytest.mark.row("K-24")
def test_the_next_event_waits_for_the_guest() -> None:
    """A page-ready is withheld until its vCPU has cleared the token; the ACK says when to try again."""
    provider, clock = enabled()
    clock.memory.write(WORDS + 64, bytes(8))
    provider.write_msr(1, ENABLE, WORDS + 64 | ON | AS_INT)
    assert provider.page_ready(0, 7)
    assert not provider.page_ready(0, 8)
    assert words(clock) == (0, 7)
    assert provider.page_ready(1, 9)
    assert u32(clock.memory, WORDS + 64 + 4) == 9
    clock.memory.write(WORDS + 4, bytes(4))
    assert provider.page_ready(0, 8)  # it need not be acknowledged
    assert words(clock) == (0, 8)
    clock.memory.write(WORDS + 4, bytes(4))
    provider.write_msr(0, ACK, 0)  # bit 0 does it
    assert provider.awaits_ack(0)
    provider.write_msr(0, ACK, 0xFF)
    assert not provider.awaits_ack(0)
    assert provider.page_ready(0, 10)
    assert words(clock) == (0, 10)


@pytest.mark.row("K-24")
@pytest.mark.parametrize(("profile", "bits", "again"), [("linux", ON | AS_INT, True), ("document", ON, False)])
def test_a_reason_that_was_not_taken(profile: str, bits: int, again: bool) -> None:
    """As documented, a reason that is still there withholds the next fault; Linux writes it again."""
    provider, clock = enabled(bits, profile=profile)
    assert provider.inject_not_present(0, 7, 3)
    assert provider.inject_not_present(0, 8, 3) is again
    assert words(clock) == (1, 0)


@pytest.mark.row("K-21", "K-25")
@pytest.mark.parametrize(
    ("bits", "cpl", "in_l2", "delivered"),
    [
        (ON | AS_INT, 3, False, True),
        (ON | AS_INT, 0, False, False),  # the kernel cannot be interrupted unless it said so
        (ON | AS_INT | SEND_ALWAYS, 0, False, True),
        (ON | AS_INT | SEND_ALWAYS, 3, True, False),
        (ON | AS_INT | SEND_ALWAYS | AS_VMEXIT, 3, True, True),
        (ON, 3, False, False),  # without the interrupt nothing is enabled
        (AS_INT, 3, False, False),
        (0, 3, False, False),
    ],
)
def test_who_is_told_of_a_missing_page(bits: int, cpl: int, in_l2: bool, delivered: bool) -> None:
    """The bits say at which privilege, and whether while a nested guest runs; else the vCPU waits for the page."""
    provider, clock = enabled(bits)
    assert provider.inject_not_present(0, 7, cpl, in_l2=in_l2) is delivered
    assert words(clock) == (int(delivered), 0)


@pytest.mark.row("K-25")
def test_writing_0_ends_it() -> None:
    """Disabled, nothing is written any more, and no ACK is waited for: the memory is the guest's again.

    The other vCPUs go on until each has written 0.
    """
    provider, clock = enabled()
    clock.memory.write(WORDS + 64, bytes(8))
    provider.write_msr(1, ENABLE, WORDS + 64 | ON | AS_INT)
    assert provider.page_ready(0, 7)
    provider.write_msr(0, ENABLE, 0)
    assert provider.read_msr(0, ENABLE) == 0
    clock.memory.write(WORDS, bytes(8))
    assert not provider.awaits_ack(0)
    assert not provider.inject_not_present(0, 8, 3)
    assert not provider.page_ready(0, 8)
    assert not provider.wake_all(0)
    assert words(clock) == (0, 0)
    assert provider.inject_not_present(1, 8, 3)
    assert u32(clock.memory, WORDS + 64) == 1


@pytest.mark.row("K-25")
def test_a_reset_ends_it() -> None:
    """What the next kernel has at that address is not written: no vCPU has events until it asks for them."""
    provider, clock = enabled()
    assert provider.page_ready(0, 7)
    provider.reset()
    clock.memory.write(WORDS, bytes(8))
    assert provider.read_msr(0, ENABLE) == 0
    assert not provider.awaits_ack(0)
    assert not provider.inject_not_present(0, 8, 3)
    assert not provider.page_ready(0, 8)
    assert not provider.wake_all(0)
    assert words(clock) == (0, 0)


@pytest.mark.row("K-35")
def test_the_interrupts_vector_and_the_acknowledgement() -> None:
    """A vector has 8 bits; an ACK is bit 0 alone, and the MSR reads 0, whatever was written."""
    provider, _ = enabled()
    for value in (0x100, 1 << 63):
        with pytest.raises(MsrFault, match="8 bits"):
            provider.write_msr(0, INTERRUPT, value)
    provider.write_msr(1, INTERRUPT, 0xFF)
    assert [provider.read_msr(vcpu, INTERRUPT) for vcpu in range(2)] == [0, 0xFF]
    assert provider.async_pf_vector(1) == 0xFF
    assert provider.page_ready(0, 7)
    for value, awaited in ((0, True), (2**64 - 2, True), (2**64 - 1, False)):
        provider.write_msr(0, ACK, value)
        assert provider.read_msr(0, ACK) == 0
        assert provider.awaits_ack(0) is awaited


@pytest.mark.row("K-22", "K-23")
@pytest.mark.parametrize("token", [0, -1, 2**32 - 1, 2**32])
def test_tokens_that_mean_something_else_are_refused(token: int) -> None:
    """0 is 'taken', 0xffffffff is 'all': neither is a page's."""
    provider, clock = enabled()
    with pytest.raises(RangeError, match="token"):
        provider.inject_not_present(0, token, 3)
    if token != 2**32 - 1:
        with pytest.raises(RangeError, match="token"):
            provider.page_ready(0, token)
    assert words(clock) == (0, 0)


@pytest.mark.row("E9")
def test_an_error_of_on_dirty_leaves_an_event_to_be_acknowledged() -> None:
    """The guest has the token all the same, so the VMM waits for its ACK."""
    provider, clock = enabled()

    def full(gpa: int, length: int) -> None:
        raise OSError(f"{gpa:#x}+{length}: the dirty log is full")

    clock.memory.on_dirty = full
    with pytest.raises(OSError, match="full"):
        provider.page_ready(0, 5)
    assert (words(clock)[1], provider.awaits_ack(0)) == (5, True)
