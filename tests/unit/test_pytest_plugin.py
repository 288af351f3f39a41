"""The fixtures that pytest has wherever pvclock is installed, as somebody's own tests use them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

pytest_plugins = ("pytester",)
pytestmark = pytest.mark.row("E3", "E13")

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "pytest.md"
AS_INSTALLED = ("-p", "pvclock.testing.plugin", "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider")
"""In a process that finds no plugin by itself, whatever is installed here."""


@pytest.fixture
def run_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Return a folder for tests, whose pytest has pvclock's fixtures and pytest-benchmark's."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return pytester


def examples() -> list[str]:
    """The Python of the document."""
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def test_pytest_finds_the_plugin() -> None:
    """By the entry point that pytest looks for, which names the module that is tested here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"pvclock": AS_INSTALLED[1]}


def test_the_document_s_examples_run(run_tests: pytest.Pytester) -> None:
    """All that need no /dev/kvm pass; those that do pass, or are skipped where there is none."""
    for place, example in enumerate(examples()):
        run_tests.makepyfile(**{f"test_example_{place}": example})
    outcome = run_tests.runpytest_subprocess(*AS_INSTALLED).parseoutcomes()
    assert set(outcome) <= {"passed", "skipped"}
    assert outcome["passed"] >= 4


def test_a_clock_that_breaks_its_budget_fails_the_test(run_tests: pytest.Pytester) -> None:
    """The failure says by how much; the test beside it, within its budget, passes."""
    run_tests.makepyfile(
        """
        def test_skips(guest_clock, simulated_backend, clock_budget):
            with clock_budget(guest_clock, step="1us"):
                guest_clock.skip(5000)

        def test_refreshes(guest_clock, simulated_backend, clock_budget):
            with clock_budget(guest_clock, step="1us", drift="10ppb"):
                for _ in range(10):
                    simulated_backend.advance(ns=10**9)
                    guest_clock.refresh()
        """
    )
    result = run_tests.runpytest_subprocess(*AS_INSTALLED)
    assert result.parseoutcomes() == {"failed": 1, "passed": 1}
    result.stdout.fnmatch_lines(["E *the guest's clock broke its budget:", "E *vCPU 0's clock stepped by +5.00*"])


def test_each_test_has_a_host_of_its_own(run_tests: pytest.Pytester) -> None:
    """And guest_clock runs on it, with its page in place."""
    run_tests.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("time", [1, 2])
        def test_host(simulated_backend, guest_clock, time):
            assert simulated_backend.tsc == 10**12
            assert guest_clock.backend is simulated_backend
            simulated_backend.advance(ns=1000)
            assert guest_clock.now() == 1000
            assert guest_clock.read(0) in (999, 1000)
        """
    )
    assert run_tests.runpytest_subprocess(*AS_INSTALLED).parseoutcomes() == {"passed": 2}


def test_no_kvm_is_a_skip_that_says_what_to_do(run_tests: pytest.Pytester) -> None:
    """KvmUnavailable's advice is the reason; the test does not fail."""
    run_tests.makepyfile(
        """
        def test_machine(kvm_machine, monkeypatch):
            monkeypatch.setattr("pvclock.kvm.capabilities.open_kvm.__defaults__", ("/nonexistent/kvm",))
            kvm_machine()
        """
    )
    result = run_tests.runpytest_subprocess(*AS_INSTALLED, "-rs")
    assert result.parseoutcomes() == {"skipped": 1}
    result.stdout.fnmatch_lines(["SKIPPED*open /nonexistent/kvm: ENOENT*KVM's device is /dev/kvm*"])


def test_what_is_not_used_is_not_loaded(run_tests: pytest.Pytester) -> None:
    """A pytest run that has nothing to do with clocks does not pay for them."""
    run_tests.makepyfile(
        """
        import sys

        def test_modules():
            loaded = sorted(name for name in sys.modules if name.startswith("pvclock"))
            assert loaded == ["pvclock", "pvclock.testing", "pvclock.testing.plugin"]
        """
    )
    assert run_tests.runpytest_subprocess(*AS_INSTALLED).parseoutcomes() == {"passed": 1}
