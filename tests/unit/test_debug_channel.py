"""The byte stream between guest and VMM for a debugger: who is there, what is moved, what is counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import GuestClock, GuestMemory, RangeError, SimulatedBackend, StateError
from pvclock.providers.interface import DebugSetup, Status
from pvclock.providers.registry import PROVIDERS
from pvclock.providers.virtualbox.debug_channel import DebugChannel, DebugTraffic


class Wire:
    """A debug device that keeps what it takes, `room` bytes of each write at most, and gives what it was told to."""

    def __init__(self, incoming: bytes = b"", room: int = 1 << 20) -> None:
        self.incoming = incoming
        self.outgoing = b""
        self.room = room

    def read(self, count_max: int) -> bytes:
        """See DebugDevice."""
        data, self.incoming = self.incoming[:count_max], self.incoming[count_max:]
        return data

    def write(self, data: bytes) -> int:
        """See DebugDevice."""
        taken = data[: self.room]
        self.outgoing += taken
        return len(taken)


@pytest.mark.row("G-23", "G-15")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_without_a_debug_interface_there_is_no_connection(provider: str) -> None:
    """None of these providers has one by default, device or not."""
    debug = GuestClock(GuestMemory(), 1, provider, backend=SimulatedBackend(10**9)).interface.debug
    wire = Wire(b"abc")
    debug.register(wire)
    assert debug.setup() == (Status.NO_DEBUG_CONNECTION, None)
    assert debug.read(10) == (Status.NO_DEBUG_CONNECTION, b"")
    assert debug.write(b"abc") == (Status.NO_DEBUG_CONNECTION, 0)
    assert (wire.incoming, wire.outgoing) == (b"abc", b"")
    assert debug.traffic == DebugTraffic()


@pytest.mark.row("G-23", "G-15", "G-29", "E13")
def test_a_device_is_registered_once() -> None:
    """Without a device there is no connection; a second one is refused while the first is there."""
    channel = DebugChannel(DebugSetup(4096))
    assert channel.setup() == (Status.SUCCESS, DebugSetup(4096))
    assert channel.read(1) == (Status.NO_DEBUG_CONNECTION, b"")
    assert channel.write(b"a") == (Status.NO_DEBUG_CONNECTION, 0)
    first, second = Wire(), Wire()
    channel.register(first)
    with pytest.raises(StateError, match="there is a debug device"):
        channel.register(second)
    assert channel.write(b"a") == (Status.SUCCESS, 1)
    channel.unregister()
    assert channel.write(b"b") == (Status.NO_DEBUG_CONNECTION, 0)
    channel.register(second)
    assert channel.write(b"c") == (Status.SUCCESS, 1)
    assert (first.outgoing, second.outgoing) == (b"a", b"c")


@pytest.mark.row("G-23", "G-16", "G-29")
def test_what_is_read_and_when_nothing_is_there() -> None:
    """Bytes come in order, as many as asked for at most; with none there the status says so and nothing is counted."""
    channel = DebugChannel(DebugSetup(4096))
    channel.register(Wire(b"abcde"))
    assert [channel.read(3) for _ in range(3)] == [
        (Status.SUCCESS, b"abc"),
        (Status.SUCCESS, b"de"),
        (Status.NO_DATA, b""),
    ]
    assert channel.traffic == DebugTraffic(receive=2, receive_bytes=5)


@pytest.mark.row("G-23", "G-16", "G-29")
def test_only_whole_writes_are_counted() -> None:
    """A device that takes a part of a write says how much, and the statistics stay as they are."""
    channel = DebugChannel(DebugSetup(4096))
    wire = Wire(room=3)
    channel.register(wire)
    assert channel.write(b"abcd") == (Status.SUCCESS, 3)
    assert channel.traffic == DebugTraffic()
    assert channel.write(b"d") == (Status.SUCCESS, 1)
    assert channel.traffic == DebugTraffic(transmit=1, transmit_bytes=1)
    assert wire.outgoing == b"abcd"


class Mute:
    """A debug device without a stream, and with a read that fails."""

    def read(self, count_max: int) -> bytes:
        """It fails."""
        raise OSError("the wire is cut")

    def write(self, data: bytes) -> None:
        """There is no stream."""


@pytest.mark.row("G-23", "G-16", "G-29")
def test_a_device_without_a_stream_and_one_that_fails() -> None:
    """The first is no connection; what a device raises comes out; neither is counted, and the channel goes on."""
    channel = DebugChannel(DebugSetup(4096))
    channel.register(Mute())
    assert channel.write(b"ab") == (Status.NO_DEBUG_CONNECTION, 0)
    with pytest.raises(OSError, match="the wire is cut"):
        channel.read(5)
    assert channel.traffic == DebugTraffic()
    channel.unregister()
    channel.register(Wire(b"abc"))
    assert channel.read(5) == (Status.SUCCESS, b"abc")
    assert channel.traffic == DebugTraffic(receive=1, receive_bytes=3)


class Liar:
    """A debug device that breaks its word."""

    def read(self, count_max: int) -> bytes:
        """More than asked for."""
        return bytes(count_max + 1)

    def write(self, data: bytes) -> int:
        """More than there was."""
        return len(data) + 1


@pytest.mark.row("G-23", "E13")
def test_a_device_that_breaks_its_word() -> None:
    """More bytes than were asked for or given are a RangeError, and counted nowhere; so is a read of none."""
    channel = DebugChannel(DebugSetup(4096))
    channel.register(Liar())
    with pytest.raises(RangeError, match="gave 6 bytes where 5 were asked for"):
        channel.read(5)
    with pytest.raises(RangeError, match="took 3 of 2 bytes"):
        channel.write(b"ab")
    with pytest.raises(RangeError, match="1 byte or more"):
        channel.read(0)
    assert channel.traffic == DebugTraffic()


@pytest.mark.row("G-23", "G-16")
@given(
    steps=st.lists(st.tuples(st.booleans(), st.binary(max_size=6), st.integers(1, 8))),
    incoming=st.binary(max_size=20),
    room=st.integers(0, 6),
)
def test_a_stream_loses_and_invents_nothing(steps: list[tuple[bool, bytes, int]], incoming: bytes, room: int) -> None:
    """What was taken arrives, in order, both ways, and no counter ever goes back."""
    channel, wire = DebugChannel(DebugSetup(4096)), Wire(incoming, room)
    channel.register(wire)
    sent, received, before = b"", b"", channel.traffic
    for writes, data, count in steps:
        if writes:
            sent += data[: channel.write(data)[1]]
        else:
            received += channel.read(count)[1]
        assert all(new >= old for new, old in zip(channel.traffic, before, strict=True))
        before = channel.traffic
    assert wire.outgoing == sent
    assert received + wire.incoming == incoming
    assert before.receive_bytes == len(received)
