"""Linux's TSC write synchronisation: the model beside what a real kernel did, and beside one in unbounded integers."""

from typing import Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, HostTsc, RangeError, RefNs
from pvclock.tsc.agreement import repair_plan
from pvclock.tsc.kvm_sync_model import HostInstant, KvmTscSync, KvmTscWrite
from tests.oracle import scale_delta, scale_tsc, time_scale

KHZ = 2_596_132
SECOND = KHZ * 1000
NEW, OLD = (6, 18), (6, 1)
BOOT_TSC = 10**15
MS = 10**6


def at(ns: int) -> HostInstant:
    """The instant `ns` after the VM's beginning, on a host whose TSC and clock agree."""
    return HostInstant(HostTsc(BOOT_TSC + ns * KHZ // MS), RefNs(ns))


def a_vm(vcpus: int = 2, linux: tuple[int, int] = NEW, **host: object) -> KvmTscSync:
    """A VM whose vCPUs were created 1 ms after each other."""
    vm = KvmTscSync(linux, KHZ, **host)  # type: ignore[arg-type]
    for vcpu in range(vcpus):
        vm.create_vcpu(at(vcpu * MS))
    return vm


# What Linux 6.18 did on a real host: the vCPU, its write, and whether KVM_GET_CLOCK then said stable.

X = 10**12
Step = tuple[int, Literal["msr", "offset", "khz"], int, bool]
SEEN: dict[str, tuple[int, list[Step]]] = {
    "values": (
        2,
        [
            (0, "msr", X, False),  # the first one is kept
            (1, "msr", X, True),
            (1, "msr", X + SECOND // 2, True),
            (1, "msr", X + 3 * SECOND, False),
            (0, "msr", X + 3 * SECOND, True),
            (0, "msr", X - 2 * SECOND, False),
            (1, "msr", 0, True),
        ],
    ),
    "QEMU's reset": (2, [(0, "msr", 1, False), (1, "msr", 1, True)]),
    "offsets": (
        2,
        [
            (0, "offset", 10**9, False),
            (1, "offset", 10**9, True),
            (1, "offset", 10**9 + 1, False),
            (0, "offset", 10**9 + 1, True),
        ],
    ),
    "three vCPUs": (3, [(0, "msr", X, False), (1, "msr", X, False), (1, "msr", X, False), (2, "msr", X, True)]),
    "frequencies": (
        2,
        [
            (0, "khz", KHZ + 1, True),
            (0, "msr", X, False),
            (1, "msr", X, False),  # another frequency than the last write's
            (1, "khz", KHZ + 1, False),
            (1, "msr", X, False),
            (0, "msr", X, True),
        ],
    ),
}


def do(vm: KvmTscSync, vcpu: int, what: str, value: int, now: HostInstant) -> KvmTscWrite | None:
    """One step."""
    if what == "khz":
        vm.set_tsc_khz(vcpu, value)
        return None
    return vm.write_msr(vcpu, value, now) if what == "msr" else vm.write_offset(vcpu, value, now)


@pytest.mark.row("J-09", "K-16", "E5")
@pytest.mark.parametrize("name", SEEN)
def test_what_a_real_kernel_did(name: str) -> None:
    """Step by step the model says stable where Linux 6.18 did, and not where it did not."""
    vcpus, steps = SEEN[name]
    vm = a_vm(vcpus)
    assert vm.stable_possible
    for number, (vcpu, what, value, stable) in enumerate(steps):
        do(vm, vcpu, what, value, at((10 + number) * MS))
        assert vm.stable_possible == stable, (name, number)


# The same in unbounded integers


class SlowVcpu:
    """What Linux keeps of one vCPU."""

    def __init__(self) -> None:
        self.khz, self.offset, self.generation = KHZ, 0, 0


class SlowVm:
    """Linux's synchronisation as the reference tells it: one dictionary of kvm_arch's fields, and no more."""

    def __init__(self, linux: tuple[int, int], *, stable: bool) -> None:
        self.linux, self.stable = linux, stable
        self.vcpus: list[SlowVcpu] = []
        self.arch = dict.fromkeys(("ns", "write", "khz", "offset", "cur_offset", "generation", "matched", "user"), 0)

    def synchronize(self, vcpu: SlowVcpu, value: int, now: HostInstant, *, by_user: bool) -> bool:
        """A write of the TSC; 0 by KVM itself for a new vCPU."""
        arch, passed = self.arch, (now.ns - self.arch["ns"]) % 2**64
        grown = scale_delta(passed, *time_scale(vcpu.khz * 1000, 10**9))
        expected = (arch["write"] + grown) % 2**64
        near = value < (expected + vcpu.khz * 1000) % 2**64 and (value + vcpu.khz * 1000) % 2**64 > expected
        joins = value == 0 or (near and (arch["user"] == 1 or self.linux < (6, 7)))
        matched = joins and vcpu.khz == arch["khz"]
        if matched and not self.stable:
            value = (value + grown) % 2**64
        offset = (value - now.tsc) % 2**64
        if matched and self.stable:
            offset = arch["cur_offset"]
        if by_user:
            arch["user"] = 1
        return self.commit(vcpu, offset, value, now, matched=matched)

    def set_offset(self, vcpu: SlowVcpu, offset: int, now: HostInstant) -> bool:
        """A write of the offset."""
        if self.linux >= (6, 15):
            self.arch["user"] = 1
        matched = vcpu.khz == self.arch["khz"] and offset == self.arch["offset"]
        return self.commit(vcpu, offset, (now.tsc + offset) % 2**64, now, matched=matched)

    def commit(self, vcpu: SlowVcpu, offset: int, value: int, now: HostInstant, *, matched: bool) -> bool:
        """Bookkeeping; returns `matched`."""
        self.arch.update(ns=now.ns, write=value, khz=vcpu.khz, offset=offset)
        vcpu.offset = offset
        if not matched:
            self.arch.update(cur_offset=offset, matched=0, generation=self.arch["generation"] + 1)
        elif vcpu.generation != self.arch["generation"]:
            self.arch["matched"] += 1
        vcpu.generation = self.arch["generation"]
        return matched


class Act(NamedTuple):
    """One thing that a VMM does, `after_ns` after the one before; `value` is what its kind makes of it."""

    kind: str
    vcpu: int
    value: int
    after_ns: int


U64 = st.integers(0, 2**64 - 1)
NEAR = st.integers(-3 * SECOND, 3 * SECOND)
ACTS = st.builds(
    Act,
    st.sampled_from(["create", "near", "near", "value", "offset", "khz"]),
    st.integers(0, 3),
    st.one_of(NEAR, st.sampled_from([0, 1, SECOND, -SECOND, SECOND - 1, 1 - SECOND, 2**64 - 1]), U64),
    st.one_of(st.sampled_from([0, 1, MS, 10**9]), st.integers(0, 10**10)),
)
OFFSETS = (0, 10**9, 2**64 - 10**12)


@pytest.mark.row("J-09", "E5")
@given(
    acts=st.lists(ACTS, max_size=30),
    linux=st.sampled_from([(5, 16), OLD, (6, 7), (6, 14), (6, 15)]),
    stable=st.booleans(),
)
def test_against_unbounded_integers(acts: list[Act], linux: tuple[int, int], stable: bool) -> None:
    """Whatever a VMM writes, on whatever kernel: offsets, matches, generations and STABLE are the oracle's."""
    vm, slow, ns = KvmTscSync(linux, KHZ, tsc_stable=stable), SlowVm(linux, stable=stable), 0
    for act in [Act("create", 0, 0, 0), *acts]:
        ns += act.after_ns
        vcpu = act.vcpu % max(len(slow.vcpus), 1)
        if act.kind == "create":
            slow.vcpus.append(SlowVcpu())
            write = vm.create_vcpu(at(ns))
            matched = slow.synchronize(slow.vcpus[-1], 0, at(ns), by_user=False)
            vcpu = len(slow.vcpus) - 1
        elif act.kind == "khz":
            slow.vcpus[vcpu].khz = KHZ + act.value % 3
            assert vm.set_tsc_khz(vcpu, KHZ + act.value % 3)
            continue
        elif act.kind == "offset":
            offset = OFFSETS[act.value % 3]
            write, matched = vm.write_offset(vcpu, offset, at(ns)), slow.set_offset(slow.vcpus[vcpu], offset, at(ns))
        else:
            grown = slow.arch["write"] + (ns - slow.arch["ns"]) * KHZ // MS
            value = (act.value + grown * (act.kind == "near")) % 2**64
            write = vm.write_msr(vcpu, value, at(ns))
            matched = slow.synchronize(slow.vcpus[vcpu], value, at(ns), by_user=True)
            assert (value + write.error_ticks - at(ns).tsc - write.offset) % 2**64 == 0
        assert (write.is_matched, write.offset) == (matched, slow.vcpus[vcpu].offset)
        assert write.generation == vm.generation == slow.arch["generation"]
        assert write.stable_possible == vm.stable_possible == (slow.arch["matched"] + 1 == len(slow.vcpus))
        assert [vm.tsc(each).offset for each in range(len(slow.vcpus))] == [each.offset for each in slow.vcpus]


@pytest.mark.row("E5")
@given(value=st.one_of(NEAR.map(lambda near: (X + near) % 2**64), U64), error=st.integers(-SECOND, SECOND))
def test_the_margin(value: int, error: int) -> None:
    """A prediction made for an instant that is wrong by less than the margin is right."""
    told, true = a_vm(), a_vm()
    for vm in (told, true):
        vm.write_msr(0, X, at(10**10))
    told_write = told.write_msr(1, value, at(2 * 10**10))
    true_write = true.write_msr(1, value, at(2 * 10**10 + error * MS // KHZ))
    if told_write.margin_ticks is None or abs(error) < told_write.margin_ticks - 1:
        assert true_write.is_matched == told_write.is_matched


@pytest.mark.row("E5")
@pytest.mark.parametrize(
    ("first", "value", "margin"),
    [
        (1, SECOND // 2, SECOND),  # half a second on, KVM expects this very value
        (1, SECOND * 3 // 4, SECOND * 5 // 4),
        (2**64 - 2 * SECOND, 2**64 - SECOND * 6 // 5, SECOND // 2),  # KVM's sums are about to wrap
        (2**64 - SECOND * 3 // 5, SECOND // 20, SECOND // 10),  # they have: only once past 2^64 is a low value near
        (1, 2**64 - 10 * SECOND, None),  # behind: not even an earlier instant would do
    ],
)
def test_how_wide_the_margin_is(first: int, value: int, margin: int | None) -> None:
    """It reaches to the nearest instant, not before the last write, for which KVM would do something else."""
    vm, sooner, later = a_vm(), a_vm(), a_vm()
    for each in (vm, sooner, later):
        each.write_msr(0, first, at(10**10))
    write = vm.write_msr(1, value, at(10**10 + 500 * MS))
    if margin is None:
        assert write.margin_ticks is None
        return
    assert abs((write.margin_ticks or 0) - margin) <= 2
    error_ns = margin * MS // KHZ
    assert sooner.write_msr(1, value, at(10**10 + 500 * MS + error_ns - 5)).is_matched == write.is_matched
    assert later.write_msr(1, value, at(10**10 + 500 * MS + error_ns + 5)).is_matched != write.is_matched


# What a VMM wants to know


@pytest.mark.row("E5")
def test_a_young_guest_restored_by_value() -> None:
    """Before 6.7 KVM throws away the first value, too, if the guest has run for less than 1 s; the offset is kept."""
    for linux, kept in (((6, 6), False), ((6, 7), True)):
        write = a_vm(linux=linux).write_msr(0, SECOND // 4, at(5 * MS))
        assert (write.error_ticks == 0) == kept
        assert write.is_matched != kept
        assert a_vm(linux=linux).write_offset(0, 12345, at(5 * MS)).offset == 12345


@pytest.mark.row("E5")
def test_an_offset_counts_as_a_value() -> None:
    """Since 6.15 a value that follows a written offset is held against it; before, it counted as the first."""
    for linux, joins in (((6, 14), False), ((6, 15), True), ((6, 1), True)):
        vm = a_vm(linux=linux)
        offset = vm.write_offset(0, 777, at(5 * MS)).offset
        write = vm.write_msr(1, at(6 * MS).tsc + SECOND // 2, at(6 * MS))
        assert write.is_matched == joins
        assert (write.offset == offset) == joins


@pytest.mark.row("E5", "K-16")
def test_a_repair_that_kvms_own_clock_sees() -> None:
    """KVM counts matching writes: one write makes the offsets equal and leaves it unstable, one per vCPU does not."""
    for every_vcpu in (False, True):
        vm = a_vm()
        vm.write_offset(1, 2600, at(5 * MS))
        vm.write_offset(0, 0, at(6 * MS))
        plan = repair_plan([vm.tsc(vcpu) for vcpu in range(2)], every_vcpu=every_vcpu)
        for number, write in enumerate(plan):
            vm.write_offset(write.vcpu, write.offset_after, at((7 + number) * MS))
        assert vm.tsc(0).offset == vm.tsc(1).offset == 2600
        assert vm.stable_possible == every_vcpu


@pytest.mark.row("E5", "J-04")
def test_guests_own_writes_touch_no_generation() -> None:
    """A guest can set its vCPUs' TSCs apart under KVM's eyes, and ADJUST with them: it goes on to call them stable."""
    vm = a_vm()
    before = vm.tsc(1).read(at(5 * MS).tsc)
    vm.tsc(1).guest_write_tsc(1, at(5 * MS).tsc)
    assert (vm.tsc(1).adjust, vm.tsc(0).adjust) == ((1 - before) % 2**64, 0)
    assert vm.stable_possible
    assert vm.tsc(1).offset != vm.tsc(0).offset


@pytest.mark.row("E5", "K-16")
def test_hosts_without_a_trusted_tsc() -> None:
    """An unstable TSC lets values grow instead of taking the generation's offset; another clocksource, no STABLE."""
    vm = a_vm(tsc_stable=False, clocksource_is_tsc=False)
    vm.write_msr(0, X, at(10 * MS))
    write = vm.write_msr(1, X, at(30 * MS))
    assert write.is_matched
    assert write.error_ticks == 20 * KHZ - 1  # its fixed-point arithmetic rounds down
    assert not vm.stable_possible


@pytest.mark.row("E5")
@pytest.mark.parametrize(
    ("frac_bits", "khz", "taken", "kept_khz"),
    [
        (None, KHZ + KHZ // 4000, True, KHZ + KHZ // 4000),  # 250 ppm: as good as the host's
        (None, KHZ - KHZ // 4000, True, KHZ - KHZ // 4000),
        (None, KHZ // 2, False, KHZ // 2),
        (None, 2 * KHZ, True, 2 * KHZ),
        (None, 0, True, KHZ),
        (48, KHZ // 2, True, KHZ // 2),
        (48, 0x7FFFFFFF, False, KHZ),
        (32, 256 * KHZ, False, KHZ),
    ],
)
def test_frequencies(frac_bits: int | None, khz: int, taken: bool, kept_khz: int) -> None:
    """KVM takes a frequency near the host's, above it, or any that the hardware scales to; it remembers one too low."""
    vm = a_vm(frac_bits=frac_bits)
    assert vm.set_tsc_khz(0, khz) == taken
    assert vm.khz(0) == kept_khz
    scaled = frac_bits if khz == KHZ // 2 else None
    frac = frac_bits or 48
    ratio = (khz << frac) // KHZ if scaled else 1 << frac
    write = vm.write_msr(0, X, at(10 * MS))
    assert write.offset == (X - scale_tsc(at(10 * MS).tsc, ratio, frac)) % 2**64
    assert vm.set_tsc_khz(0, KHZ)
    assert vm.tsc(0).rate == 1
    assert vm.create_vcpu(at(20 * MS), khz).is_matched  # its frequency is the last write's
    assert vm.create_vcpu(at(21 * MS)).is_matched == (kept_khz == KHZ)
    assert (vm.khz(2), vm.khz(3)) == (kept_khz, KHZ)


@pytest.mark.row("E5")
def test_what_cannot_be() -> None:
    """Kernels before the offset attribute, and numbers that do not fit, are errors that say so."""
    with pytest.raises(RangeError, match=r"Linux 5\.15; the model begins with 5\.16"):
        KvmTscSync((5, 15), KHZ)
    with pytest.raises(RangeError, match="host TSC of 0 kHz"):
        KvmTscSync(NEW, 0)
    with pytest.raises(ConfigError, match="33 fraction bits"):
        KvmTscSync(NEW, KHZ, frac_bits=33)
    with pytest.raises(RangeError, match="guest TSC of -1 kHz"):
        a_vm().set_tsc_khz(0, -1)
    with pytest.raises(RangeError, match="vCPU 2; this VM has vCPUs 0 to 1"):
        a_vm().write_msr(2, 0, at(0))
    with pytest.raises(RangeError, match=r"it can be 0 to 2\^64 - 1"):
        a_vm().write_msr(0, 2**64, at(0))
    with pytest.raises(RangeError, match=r"it can be 0 to 2\^64 - 1"):
        a_vm().write_offset(0, -1, at(0))
    assert not a_vm(vcpus=0).stable_possible
