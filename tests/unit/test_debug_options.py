"""VirtualBox's text for a guest's debugger, and the provider that it configures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, GuestClock, GuestMemory, SimulatedBackend
from pvclock.providers.virtualbox.debug_options import DebugOptions, parsed

WORDS = {
    "address": st.sampled_from(["127.0.0.1", "debugger.example"]),
    "port": st.integers(1, 65535).map(str),
    "vendor": st.sampled_from(["Microsoft Hv", "VBoxVBoxVBox"]),
    "vsinterface": st.sampled_from("01"),
    "hypercallinterface": st.sampled_from("01"),
}


@pytest.mark.row("H-05")
@given(values=st.fixed_dictionaries({}, optional=WORDS), order=st.randoms())
def test_every_key_in_any_order(values: dict[str, str], order: object) -> None:
    """What is not said is VirtualBox's default: a local debugger at port 50000, Microsoft's id, the VS interface."""
    words = [f"{key}={value}" for key, value in values.items()] + ["enabled=1"]
    order.shuffle(words)  # type: ignore[attr-defined]  # a random.Random
    assert parsed(",".join(words)) == DebugOptions(
        values.get("address", "127.0.0.1"),
        int(values.get("port", "50000")),
        {
            "VendorID": values.get("vendor", "Microsoft Hv"),
            "VSInterface": values.get("vsinterface", "1") == "1",
            "HypercallDebugInterface": values.get("hypercallinterface", "0") == "1",
        },
    )


@pytest.mark.row("H-05")
@pytest.mark.parametrize("options", ["", "enabled=0", "port=1,vendor=VBoxVBoxVBox", "enabled=0,address=10.0.0.1"])
def test_it_is_off_unless_enabled(options: str) -> None:
    """Other keys alone enable nothing."""
    assert parsed(options) is None


@pytest.mark.row("H-05", "E13")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("colour=1", "unrecognized debug option 'colour'"),
        ("Enabled=1", "unrecognized debug option 'Enabled'"),
        ("enabled", "enabled is ''; it is 0 or 1"),
        ("enabled=yes", "enabled is 'yes'"),
        ("enabled=1,vsinterface=2", "vsinterface is '2'"),
        ("port=0", "port is '0'; it is 1 to 65535"),
        ("port=65536", "port is '65536'"),
        ("port=-1", "port is '-1'"),
        ("port=" + "9" * 5000, "port is "),
        ("port=1,port=2", "port is given twice: '1' and '2'"),
    ],
)
def test_texts_that_mean_nothing(options: str, why: str) -> None:
    """The error says which key, its value, and what it can be."""
    with pytest.raises(ConfigError, match=why):
        parsed(options)


@pytest.mark.row("H-05", "H-02", "H-03")
@pytest.mark.parametrize("profile", ["linux", "virtualbox"])
def test_its_node_configures_the_provider(profile: str) -> None:
    """A VM of that configuration has the debugger's leaves, its MSRs, and a debug interface for the VMM's device."""
    options = parsed("enabled=1,hypercallinterface=1")
    assert options is not None
    config = {"Provider": "HyperV", "HyperV": options.node, "profile": profile}
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 1, config, backend=SimulatedBackend(10**9))
    leaf = clock.cpuid(0x40000081)
    assert leaf is not None
    assert leaf.eax.to_bytes(4, "little") == b"VS#1"
    assert clock.read_msr(0, 0x400000FF) == 4
    setup = clock.interface.debug.setup()[1]
    assert setup is not None
    assert setup.transfer_bytes_max == 4096
