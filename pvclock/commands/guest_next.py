"""What to type next after a measurement from inside a guest: chosen by what was found or is open, as it was typed."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from pvclock.meter.inside import OpenQuestion, Verdict

__all__ = ["SECONDS_MAX", "SECONDS_MIN", "NextCommand", "Options", "Rerun", "budget_words", "next_commands"]

BUDGET_OPTIONS: Final = ("--max-warp", "--max-step", "--max-drift")
"""In the order of Budgets."""
UNITS: Final = {
    "--max-warp": ((10**9, "s"), (10**6, "ms"), (1000, "us"), (1, "ns")),
    "--max-step": ((10**9, "s"), (10**6, "ms"), (1000, "us"), (1, "ns")),
    "--max-drift": ((1000, "ppm"), (1, "ppb")),
}
SECONDS_WHILE_IT_HAPPENS: Final = 600.0
SECONDS_LONGER: Final = 60.0
SECONDS_MIN: Final = 0.1
SECONDS_MAX: Final = 86400
"""What --seconds may be: up to a day."""
ON_ALL_CPUS: Final = "on all CPUs: one alone has none to be compared with"
WHY: Final = {
    "floor-between-cpus": "when all CPUs are idle: the bounds are the best of all rounds, and this has more of them",
    "floor-of-steps": "when all CPUs are idle: a longer run tells no smaller step, a vCPU that is not held up does",
    "not-compared": "longer, so that each two CPUs have the time to be compared",
    "short-run": "a run of that length can tell",
}
"""By what is open, why the same again may decide it."""


class NextCommand(NamedTuple):
    """What to type next, and what for."""

    command: str
    why: str


class Options(NamedTuple):
    """What of a measurement can be asked for: budgets in the order of BUDGET_OPTIONS; cpus: None for all."""

    seconds: float
    cpus: tuple[int, ...] | None = None
    added: tuple[tuple[int, int], ...] = ()
    budgets: tuple[Fraction | None, ...] = (None, None, None)


class Rerun(NamedTuple):
    """How to measure again.

    command: makes a shell's line of options.  on_all_cpus: that line, "" where there is no other CPU.  of_a_fault: what
    to type so that those who run the host have it, None where nothing helps.
    """

    options: Options
    command: Callable[[Options], str]
    on_all_cpus: str
    of_a_fault: NextCommand | None
    can_wait_for_it: bool

    def longer(self, seconds: float) -> str:
        """The same for so long."""
        return self.command(self.options._replace(seconds=seconds))


ON_THE_HOST: Final = NextCommand("pvclock watch --pid", "on the host, if that runs QEMU: the same clock from outside")


def next_commands(verdict: Verdict, rerun: Rerun) -> list[NextCommand]:
    """What to type next; the first is of most use."""
    if verdict.is_added:
        found = "the fault was found; " if verdict.status == "broken" else ""
        command = rerun.command(rerun.options._replace(added=()))
        return [NextCommand(command, f"{found}without --add it measures this guest's own clock")]
    following = _following(verdict, rerun)
    return following + ([ON_THE_HOST] if verdict.promises.hypervisor == "KVM" else [])


def budget_words(budgets: tuple[Fraction | None, ...]) -> list[str]:
    """The budgets as they are typed."""
    given = [(name, limit) for name, limit in zip(BUDGET_OPTIONS, budgets, strict=True) if limit is not None]
    return [word for name, limit in given for word in (name, _quantity(limit, UNITS[name]))]


# Inside


def _following(verdict: Verdict, rerun: Rerun) -> list[NextCommand]:
    if verdict.status == "broken":
        return [rerun.of_a_fault] if rerun.of_a_fault else []
    if verdict.status == "undecided":
        return [each for question in _one_of_each(verdict.open) if (each := _to_decide(question, rerun))]
    if len(verdict.cpus) == 1 and rerun.on_all_cpus:
        return [NextCommand(rerun.on_all_cpus, ON_ALL_CPUS)]
    if not rerun.can_wait_for_it:
        return []
    seconds = max(SECONDS_WHILE_IT_HAPPENS, rerun.options.seconds)
    return [NextCommand(rerun.longer(seconds), "while the fault that sent you here happens")]


def _one_of_each(questions: tuple[OpenQuestion, ...]) -> list[OpenQuestion]:
    """For each reason the question that needs the longest run."""
    longest: dict[str, OpenQuestion] = {}
    for question in questions:
        known = longest.setdefault(question.reason, question)
        if (question.seconds or 0) > (known.seconds or 0):
            longest[question.reason] = question
    return list(longest.values())


def _to_decide(question: OpenQuestion, rerun: Rerun) -> NextCommand | None:
    """What decides one open question; None if nothing here does."""
    if question.reason == "one-cpu":
        return _on_more_cpus(rerun)
    seconds = _seconds_to_decide(question, rerun.options.seconds)
    return NextCommand(rerun.longer(seconds), WHY[question.reason]) if seconds else None


def _on_more_cpus(rerun: Rerun) -> NextCommand:
    if rerun.on_all_cpus:
        return NextCommand(rerun.on_all_cpus, ON_ALL_CPUS)
    without = rerun.command(rerun.options._replace(budgets=(None, *rerun.options.budgets[1:])))
    return NextCommand(without, "there is one CPU, and none that --max-warp could compare it with")


def _seconds_to_decide(question: OpenQuestion, seconds: float) -> float | None:
    """How long a run decides it; None if longer than any may be."""
    if question.reason == "floor-of-steps":
        return seconds
    needed = question.seconds or min(max(SECONDS_LONGER, 2 * seconds), SECONDS_MAX)
    return max(seconds, needed) if needed <= SECONDS_MAX else None


def _quantity(number: Fraction, units: tuple[tuple[int, str], ...]) -> str:
    """Such as 200ns, exactly: what was typed had a decimal point at most."""
    size, unit = next(((size, unit) for size, unit in units if number >= size), units[-1])
    text = f"{Decimal(number.numerator) / Decimal(number.denominator * size):f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{unit}"
