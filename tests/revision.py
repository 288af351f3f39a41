"""Which commit this tree is at."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
WRITTEN_BY_RUNS = ("docs/conformance.md", "docs/conformance.json", "docs/mutants.json")


def commit() -> str:
    """Return the commit's hash; "no git" where there is no git, or no repository of its."""
    return git("rev-parse", "HEAD") or "no git"


def revision() -> str:
    """Return the commit, and whether files that people write differ from it."""
    others = (f":!{name}" for name in WRITTEN_BY_RUNS)
    return commit() + (" and changes" if git("status", "--porcelain", "-uno", "--", ".", *others) else "")


def git(*arguments: str) -> str:
    """Return what git prints; nothing where it fails, or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
