"""Reference time for a TSC's frequency: the engine's scale, KVM's and VirtualBox's; `pvclock scale --hyperv`."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ClockScale, RangeError
from pvclock._scale import fixed_rate
from pvclock.commands import main
from pvclock.commands.scale import reference_times
from pvclock.providers.hyperv import HyperVProvider
from pvclock.providers.hyperv.scales import kvm_scale, page_scale, virtualbox_scale, virtualbox_ticks_per_unit
from tests import oracle
from tests.unit.stub_clock import NOW, TSC_HZ, StubClock

U64: Final = 2**64
UNITS_PER_S: Final = 10**7
SLOWEST_HZ: Final = UNITS_PER_S + 1
EVERY_HZ: Final = st.integers(1, U64 - 1) | st.integers(10**6, 10**10)
PAGE_HZ: Final = st.integers(SLOWEST_HZ, U64 - 1) | st.integers(SLOWEST_HZ, 10**10)
REFERENCE_TSC, TIME_REF_COUNT = 0x40000021, 0x40000020


def error_ppb(scale: int, hz: int) -> Fraction:
    """How much faster than true time a page with that scale runs."""
    return (Fraction(scale * hz, U64 * UNITS_PER_S) - 1) * 10**9


@pytest.mark.row("H-50", "H-51")
@given(num=st.integers(0, U64 - 1), den=st.integers(1, U64 - 1), unit_ns=st.integers(1, 2**63 - 1))
def test_a_rate_in_units_is_the_nearest(num: int, den: int, unit_ns: int) -> None:
    """Multiples of 2^-64 units a tick, rounded to the nearest, for any rate that 64 bits can say."""
    assert fixed_rate(num, den, unit_ns) == int(Fraction(num * U64, den * unit_ns) + Fraction(1, 2))


@pytest.mark.row("E13")
@pytest.mark.parametrize(("num", "den", "unit_ns"), [(1, 0, 1), (1, 1, 0), (1, 1, 2**63), (U64, 1, 1), (1, -1, 1)])
def test_a_rate_that_is_none_is_refused(num: int, den: int, unit_ns: int) -> None:
    """A division by 0, and what has more bits than the arithmetic, is a RangeError."""
    with pytest.raises(RangeError):
        fixed_rate(num, den, unit_ns)


@pytest.mark.row("H-51")
@given(hz=EVERY_HZ)
def test_the_engines_scale_is_the_nearest(hz: int) -> None:
    """It is off by half a bit of 64 at most; a TSC of 10 MHz or less has none."""
    assert page_scale(hz) == (oracle.hyperv_scale(10**9, hz) if hz >= SLOWEST_HZ else None)


@pytest.mark.row("H-51", "E4")
@pytest.mark.parametrize(
    ("mul", "shift", "scale"),
    [
        (0xC5376ADD, -1, 0x00FC6FE4F1EB851E),
        (0x80000000, 1, 0x028F5C28F5C28F5C),
        (0x80000000, 0, 0x0147AE147AE147AE),
    ],
)
def test_kvms_scales_are_those_of_kvm(mul: int, shift: int, scale: int) -> None:
    """The scales that KVM's own code computes for three pairs of kvmclock."""
    assert kvm_scale(ClockScale(mul, shift)) == scale


@pytest.mark.row("H-51")
@given(mul=st.integers(1, 2**32 - 1), shift=st.integers(-32, 31))
def test_kvms_scale_is_kvmclocks_rate(mul: int, shift: int) -> None:
    """It is the pair's own rate in units, rounded down; where KVM's test for overflow fails there is none."""
    overflows = mul >= 100 * 2 ** (32 - shift)
    assert kvm_scale(ClockScale(mul, shift)) == (None if overflows else 2 ** (32 + shift) * mul // 100)


@pytest.mark.row("H-52")
@given(hz=PAGE_HZ)
def test_virtualboxs_scale_has_half_the_bits(hz: int) -> None:
    """The low 32 bits are 0, and the rest is that of whole kHz, rounded down: never more than of those kHz."""
    scale = virtualbox_scale(hz)
    assert scale % 2**32 == 0
    if (khz := hz // 1000) > 10_000:
        assert 0 <= Fraction(10_000 * U64, khz) - scale < 2**32


@pytest.mark.row("H-52", "H-35", "H-56")
def test_virtualboxs_guest_gets_these() -> None:
    """Page and counter of profile "virtualbox" are those that its scale and its divisor say."""
    clock = StubClock()
    provider = HyperVProvider(clock, 2, profile="virtualbox")
    provider.write_msr(0, REFERENCE_TSC, 0x5001)
    page = oracle.ReferenceTscPage.parse(clock.memory.read(0x5000, 24))
    assert (page.scale, page.offset) == (virtualbox_scale(TSC_HZ), 0)
    assert provider.read_msr(0, TIME_REF_COUNT) == NOW.guest_tsc // virtualbox_ticks_per_unit(TSC_HZ)


@pytest.mark.row("H-35", "H-52", "H-56")
def test_virtualboxs_errors_have_the_size_that_is_documented() -> None:
    """Its counter is 0.237 % fast at 2596.132 MHz, and from 2.3 GHz on up to 0.43 %; its page some 57 ppb slow."""
    errors = {(each.what, each.vmm): each.rate_error_ppb for each in reference_times(2_596_132_000)}
    assert errors["counter", "VirtualBox"] == pytest.approx(0.00236757e9, rel=1e-5)
    assert errors["page", "VirtualBox"] == pytest.approx(-57.1247, abs=1e-3)
    assert errors["page", "KVM"] == pytest.approx(-0.0033355, abs=1e-6)
    assert abs(errors["page", "pvclock"]) < 1e-8
    *_, worst = reference_times(2_310_000_000 - 1)
    assert worst.rate_error_ppb == pytest.approx(0.0043e9, rel=0.02)
    truncated = virtualbox_scale(2_596_132_999)
    assert error_ppb(truncated, 2_596_132_999) > error_ppb(truncated, 2_596_132_000) + 380


@pytest.mark.row("E13", "E4")
@given(hz=PAGE_HZ)
def test_the_command_computes_exact_errors(hz: int) -> None:
    """Each row's rate error is that of its scale, or of its divisor, against the frequency itself."""
    found = list(reference_times(hz))
    exact = [float((Fraction(each.units * hz, each.ticks * UNITS_PER_S) - 1) * 10**9) for each in found]
    assert [each.rate_error_ppb for each in found] == pytest.approx(exact, rel=1e-12)
    assert [each.ticks for each in found] == [U64] * (len(found) - 1) + [hz // UNITS_PER_S]


@pytest.mark.row("E13")
def test_scale_prints_reference_times(capsys: pytest.CaptureFixture[str]) -> None:
    """`pvclock scale --hyperv` has a row for each page and for VirtualBox's counter, and the same in JSON."""
    assert main(["scale", "--hyperv", "2596132000", "2.4GHz"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["2596132000", "page", "pvclock", "0x00fc6fe4f1ef22ec", "+0.000000", "+0"]
    assert rows[2] == ["2596132000", "page", "KVM", "0x00fc6fe4f1eb851e", "-0.003336", "-288"]
    assert rows[3] == ["2596132000", "page", "VirtualBox", "0x00fc6fe400000000", "-57.124719", "-4935576"]
    assert rows[4] == ["2596132000", "counter", "VirtualBox", "259", "+2367567.567568", "+204557837838"]
    assert [row[0] for row in rows[5:]] == ["2400000000"] * 4
    assert main(["scale", "--hyperv", "--json", "2596132000"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert [each["mul"] for each in result["scales"]] == [0xC5376ADD]
    pages = {each["of"]: each for each in result["reference_times"] if each["what"] == "page"}
    assert {vmm: (page["scale"], page["offset"]) for vmm, page in pages.items()} == {
        "pvclock": (0x00FC6FE4F1EF22EC, 0),
        "KVM": (0x00FC6FE4F1EB851E, 0),
        "VirtualBox": (0x00FC6FE4 << 32, 0),
    }
    assert result["reference_times"][-1]["ticks_per_unit"] == 259


@pytest.mark.row("E13")
def test_a_tsc_too_slow_for_a_page_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """At 10 MHz and below there is no page to show, and the command says so; just above there is one."""
    assert main(["scale", "--hyperv", "10M"]) == 2
    assert "10000000 Hz have no reference TSC page" in capsys.readouterr().err
    assert main(["scale", "--hyperv", f"{SLOWEST_HZ}"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]] == ["pvclock", "KVM", "VirtualBox"]
