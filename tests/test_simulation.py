"""A bounded share of the simulation: see simulation/README.md for more of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("greenlet")
_SIMULATION = str(Path(__file__).parent / "simulation")


def _simulate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # To measure its coverage takes twice as long as itself.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command, environment = [sys.executable, _SIMULATION, *arguments], {**inherited, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("first", [0, 1000])
def test_no_schedule_breaks_a_rule(first):
    """Whatever goes wrong, and in whichever order things happen: no session is lost."""
    done = _simulate("--schedules", "1000", "--first", str(first))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^1000 schedules, \d+ faults injected, \d+ exchanges, 0 sessions lost", done.stdout, re.MULTILINE)


def test_a_seed_means_the_same_schedule():
    """A seed is all that it takes to see a schedule again, however Python hashes."""
    one, two = (_simulate("--seed", "1000", PYTHONHASHSEED=hashes).stdout for hashes in ("1", "2"))
    assert one == two
    assert len(one.splitlines()) > 10


def test_faults_can_be_put_into_the_core(tmp_path):
    """Each known fault is a patch of the code as it is now."""
    from simulation.mutants import MUTANTS

    for number, mutant in enumerate(MUTANTS):
        mutant.build(tmp_path / str(number))


def test_a_broken_core_is_found_out():
    """The simulation can fail: it finds a fault that was put into the core."""
    from simulation.mutants import MUTANTS

    (mutant,) = (each for each in MUTANTS if each.name == "an answer is dropped when the store has lost the entry")
    assert "told to sign in" in mutant.hunt(300)
