"""What a VMM does to the time of a clock and its model."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from fractions import Fraction

from pvclock import RangeError, Sample, StateError
from pvclock.timekeeping.catchup import CatchUpTable, as_policy
from pvclock.timekeeping.events import EventKind
from tests.model.model_clock import NS_PER_S, U64, settled
from tests.model.ticking import looked, tick
from tests.model.twins import SourceError, Twins

__all__ = ["POLICIES", "REFERENCES", "TimeMoves"]

REFERENCES = ("off", "raw", "monotonic", "realtime", "injected")
POLICIES = (
    *("freeze", "advance", "advance:max_ns=1000000", "slew", "slew:max_ppm=100000", "virtualbox"),
    *("slew:max_ppm=2000000,max_ns=500000000", "table:0=1,1000000=50,stop_ns=100,give_up_ns=3000000000"),
    CatchUpTable(((1, 1000),), stop_ns=0, give_up_ns=2**63),
)


class TimeMoves:
    """Operations: every method is one move, and does nothing where it makes no sense."""

    def __init__(self, twins: Twins) -> None:
        self._twins = twins
        self._source_ppm, self._source_mode = 0, 0

    # Rates and steps

    def refresh(self, vcpu: int) -> None:
        """Republish."""
        self._twins.call(lambda: self._twins.clock.refresh(vcpu % len(self._twins.model.vcpus)))

    def tick(self) -> None:
        """Look at the host and the reference."""
        tick(self._twins)

    def dilate(self, numerator: int, denominator: int) -> None:
        """Another rate."""
        dilate = {EventKind.DILATE: Fraction(0)}
        if not self._twins.call(
            lambda: self._twins.clock.dilate(numerator, denominator),
            steps=dilate,
            refusals=(RangeError,),
            needs_tsc=True,
        ):
            self._twins.model.dilation = Fraction(numerator, denominator)
            self._has_looked()

    def slew(self, ns: int, ppm: int) -> None:
        """Some more to slew."""
        if not looked(self._twins):
            return
        steps = {EventKind.SLEW: Fraction(0)}
        policy = as_policy(f"slew:max_ppm={ppm}")
        assert not isinstance(policy, str)
        before = self._twins.model.slewing
        self._twins.model.slewing = policy  # type: ignore[assignment]  # a Slew: it may end in the same step
        self._twins.model.skew_ns += ns
        if self._twins.call(lambda: self._twins.clock.slew(ns, ppm), steps=steps, needs_tsc=True):
            self._twins.model.skew_ns -= ns
            self._twins.model.slewing = before
        else:
            self._has_looked()

    def skip(self, ns: int) -> None:
        """Forward at once."""
        self._jump(lambda: self._twins.clock.skip(ns), EventKind.SKIP, ns, may=ns >= 0)

    def offset(self, ns: int) -> None:
        """Forward, or back as long as nobody has seen any time."""
        if ns < 0 and not looked(self._twins):
            return
        may = ns >= 0 or (not self._twins.model.ever_published and self._twins.model.guest_ns + ns >= 0)
        self._jump(lambda: self._twins.clock.offset(ns), EventKind.OFFSET, ns, may=may)

    def _jump(self, operation: Callable[[], None], kind: EventKind, ns: int, *, may: bool) -> None:
        refusals = () if may else (RangeError,)
        refused = self._twins.call(operation, steps={kind: Fraction(ns)}, refusals=refusals, needs_tsc=True)
        if not refused:
            assert may, f"{kind}({ns}) was not refused"
            self._has_looked()

    def _has_looked(self) -> None:
        assert not self._twins.is_undecided, "an operation did not look at the host"

    # Standing still

    def pause(self) -> None:
        """Guest time stands."""
        if self._twins.model.is_paused:
            return
        steps = {EventKind.PAUSE: Fraction(0)}
        if not self._twins.call(self._twins.clock.pause, steps=steps, publishes=False, needs_tsc=True):
            self._stopped()

    def _stopped(self) -> None:
        self._has_looked()
        model = self._twins.model
        model.stopped, model.elsewhere = self._twins.host.stamps(), False
        model.missed_ns, model.paused_dilation = Fraction(0), model.dilation

    def resume(self, policy: int, own: int) -> None:
        """Guest time goes on."""
        if self._twins.model.is_paused:
            self._run(policy, own, self._twins.clock.resume)

    def run_for(self, ns: int, policy: int, own: int) -> None:
        """Guest time goes on for a while."""
        model = self._twins.model
        if not model.is_paused:
            return

        def run(chosen: object) -> None:
            report = self._twins.clock.run_for(ns, chosen)  # type: ignore[arg-type]  # one of POLICIES
            assert report.ran_ns == ns + report.overshoot_ns
            assert 0 <= report.overshoot_ns < model.tick_ns

        is_told = self._twins.raises_dirty  # then what on_dirty raises may end the run at its beginning
        guest_ns, steps = model.guest_ns, {EventKind.PAUSE: Fraction(0)}
        if not self._run(policy, own, run, steps):
            ran_ns = model.guest_ns - guest_ns - self._gained_ns
            assert 0 <= ran_ns - ns < model.tick_ns or (is_told and not ran_ns), f"run_for({ns}): {float(ran_ns)}"
            self._stopped()

    def _run(
        self, policy: int, own: int, operation: Callable[..., object], steps: dict[EventKind, Fraction] | None = None
    ) -> Exception | None:
        twins, model = self._twins, self._twins.model
        if not looked(self._twins):
            return StateError("resume", "undecided", "")
        chosen = model.policy if own else as_policy(POLICIES[policy])
        step_ns, owed_ns, slew = settled(chosen, model.missed(self._twins.host.stamps()))
        before = model.skew_ns, model.slewing, model.vcpus, model.stopped
        model.vcpus = deepcopy(model.vcpus)
        model.owe(owed_ns, slew)
        gain_ticks = int(step_ns / model.dilation * model.hz / NS_PER_S)
        refusing = self._twins.host.refuse
        for number, vcpu in enumerate(model.vcpus):
            if vcpu.standing is not None:
                vcpu.offset = (vcpu.standing + gain_ticks - model.tsc) % U64
                vcpu.standing = None
                if refusing is not None and refusing[0] == number:
                    vcpu.offset = self._twins.host.tsc_offsets.get(number, 0)
            vcpu.is_spoilt = False
        model.stopped, self._gained_ns = None, step_ns
        all_steps = {EventKind.RESUME: step_ns, **(steps or {})}
        refused = twins.call(
            lambda: operation(None if own else chosen), steps=all_steps, publishes=False, needs_tsc=True
        )
        if refused:
            model.skew_ns, model.slewing, model.vcpus, model.stopped = before
        else:
            twins.show()
        return refused

    def set_policy(self, policy: int, sleep: int) -> None:
        """The clock's own policies."""
        self._twins.clock.policy = self._twins.model.policy = as_policy(POLICIES[policy])
        self._twins.clock.sleep_policy = self._twins.model.sleep_policy = as_policy(POLICIES[sleep])

    # References

    def follow(self, reference: int, ppm: int) -> None:
        """Follow something else."""
        name = REFERENCES[reference]
        self._source_ppm, self._source_mode = ppm, 0
        before, self._twins.model.reference = self._twins.model.reference, "any"
        refused = self._twins.call(
            lambda: self._twins.clock.follow(self._sample if name == "injected" else name),
            publishes=False,
            needs_tsc=True,
        )
        self._twins.model.reference = before if refused else name

    def disturb_source(self, mode: int) -> None:
        """The source of samples raises, says anything, or is good again."""
        self._source_mode = mode

    def _sample(self) -> Sample:
        if self._source_mode == 1:
            raise SourceError
        ns = self._twins.host.ref_ns * (10**6 + self._source_ppm) // 10**6
        return Sample(self._twins.host.tsc, hash(ns) % 10**15 if self._source_mode == 2 else ns, 1.0)
