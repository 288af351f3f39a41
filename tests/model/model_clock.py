"""One VM's clock in exact arithmetic, slow and obvious: how guest time passes, and what operations make of it.

Nothing here is pvclock's: guest time is a sum over the ticks that have passed, kept in Fractions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from pvclock.readings import HostStamps
from pvclock.timekeeping.catchup import Advance, Freeze, Policy, Slew, SlewPolicy

__all__ = ["NS_PER_S", "U64", "ModelClock", "ModelVcpu", "settled"]

NS_PER_S, U64 = 10**9, 2**64
SLOWEST = Fraction(1, 2)
LAG_OF_MUL = Fraction(47, 10**11)
"""By which part a page's mul is slow at most."""


@dataclass
class ModelVcpu:
    """A vCPU's TSC, and where its guest has its records."""

    offset: int
    adjust: int = 0
    aux: int = 0
    standing: int | None = None  # what its TSC reads until a restored clock is resumed
    page: int | None = None
    is_shown: bool = False  # was the page published where it is, and left alone since?
    is_spoilt: bool = False  # did the guest write to it, flags and all, since the VMM wrote them?
    steal_gpa: int | None = None
    told_ns: int = 0  # of the host's run delay
    last_ns: int = 0  # what its guest read last

    def tsc(self, host_tsc: int) -> int:
        """What RDTSC returns."""
        return (host_tsc + self.offset) % U64 if self.standing is None else self.standing

    def write_tsc(self, value: int, host_tsc: int) -> None:
        """Let it read `value` at host_tsc; ADJUST stays."""
        if self.standing is None:
            self.offset = (value - host_tsc) % U64
        else:
            self.standing = value % U64


@dataclass
class ModelClock:
    """A VM's clock.  tsc: the host's, as the clock numbers it.  Times are in ns."""

    hz: int
    tsc: int
    vcpus: list[ModelVcpu]
    guest_ns: Fraction = Fraction(0)
    dilation: Fraction = Fraction(1)
    frequency_adjustment: Fraction = Fraction(0)
    rate: Fraction = Fraction(1)  # 0 while paused
    skew_ns: Fraction = Fraction(0)
    slewing: SlewPolicy | None = None
    policy: Policy = field(default_factory=Freeze)
    sleep_policy: Policy = field(default_factory=Freeze)
    stopped: HostStamps | None = None  # the host when guest time stopped
    elsewhere: bool = False  # before a restore, was that
    missed_ns: Fraction = Fraction(0)  # of host time, since
    paused_dilation: Fraction = Fraction(1)  # what that was worth in guest time
    tsc_trusted: bool = True
    boot_vcpu_is_old: bool = False
    reference: str = "off"
    wall_clock: tuple[int, int | None] = (0, None)
    ever_published: bool = False
    debt_ns: Fraction = Fraction(0)  # what mul may have lost that publishes have not given back

    @property
    def is_paused(self) -> bool:
        """Does guest time stand still?"""
        return self.stopped is not None

    @property
    def tick_ns(self) -> Fraction:
        """Guest time in a tick, when it runs as slowly or fast as a slew can make it."""
        return 12 * self.dilation * NS_PER_S / self.hz

    @property
    def agree(self) -> bool:
        """Have all vCPUs one offset?"""
        return len({vcpu.offset for vcpu in self.vcpus}) == 1

    @property
    def stable(self) -> bool:
        """Do pages promise that all vCPUs' TSCs are in step?"""
        return self.agree and self.tsc_trusted and not self.boot_vcpu_is_old

    def run_to(self, tsc: int) -> None:
        """Let host time pass up to that TSC."""
        host_ns = Fraction((tsc - self.tsc) * NS_PER_S, self.hz)
        steady = self.dilation * (1 + self.frequency_adjustment)
        self.tsc = tsc
        if self.is_paused:
            self.missed_ns += host_ns * (1 + self.frequency_adjustment)
            return
        self.guest_ns += host_ns * self.rate
        self.skew_ns -= host_ns * (self.rate - steady)
        self.debt_ns += host_ns * self.rate * LAG_OF_MUL

    def published(self) -> None:
        """All pages in memory were published; a publish gives back 1 ns."""
        self.ever_published = True
        self.debt_ns = max(self.debt_ns - 1, Fraction(0))

    def missed(self, now: HostStamps) -> Fraction:
        """Guest time that was missed since it stopped."""
        assert self.stopped is not None
        then, same_boot = self.stopped, self.stopped.boot_id == now.boot_id
        slept_ns = now.asleep_ns - then.asleep_ns
        host_ns = self.missed_ns
        if self.elsewhere and not same_boot:
            host_ns = Fraction(now.real_ns - then.real_ns)
        elif self.elsewhere or slept_ns > 0:
            host_ns = Fraction(now.raw_ns - then.raw_ns + slept_ns)
        return host_ns * self.paused_dilation

    def owe(self, ns: Fraction, policy: SlewPolicy | None) -> None:
        """Have so much more to slew, if there is a policy for it."""
        if policy is not None:
            self.skew_ns += ns
            self.slewing = policy

    def most_boost(self) -> Fraction:
        """By which part a slew may change the rate at most."""
        if self.slewing is None:
            return Fraction(0)
        if isinstance(self.slewing, Slew):
            return Fraction(self.slewing.max_ppm, 10**6)
        return Fraction(max(percent for _, percent in self.slewing.periods), 100)


def settled(policy: Policy, missed_ns: Fraction) -> tuple[Fraction, Fraction, SlewPolicy | None]:
    """(what guest time gains at once, what is owed, by which slew) of time missed."""
    nothing = Fraction(0)
    if missed_ns < 0 or isinstance(policy, Freeze):
        return nothing, nothing, None
    if isinstance(policy, Advance):
        return min(missed_ns, Fraction(policy.max_ns)), nothing, None
    if isinstance(policy, Slew):
        return nothing, min(missed_ns, Fraction(policy.max_ns)), policy
    if missed_ns > policy.give_up_ns:
        return nothing, nothing, None
    return nothing, missed_ns, policy
