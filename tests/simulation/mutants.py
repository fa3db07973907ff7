"""Known faults, put back into the core one by one: the simulation has to find each of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs

import refresher


@attrs.frozen
class Mutant:
    """
    A fault of a few lines.

    Args:
        name: What is wrong then.
        changes: Each a module, the text in it that goes, and the text that comes.
    """

    name: str
    changes: list[tuple[str, str, str]]

    def build(self, folder: Path) -> None:
        """Copy the library into a folder, and put the fault in."""
        package = folder / "refresher"
        shutil.copytree(Path(refresher.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        for module, old, new in self.changes:
            file = package / module
            text = file.read_text()
            if text.count(old) != 1:
                raise ValueError(f"{self.name}: {module} has this {text.count(old)} times, not once:\n{old}")
            file.write_text(text.replace(old, new))

    def hunt(self, schedules: int, first: int = 0) -> str:
        """Look for it. Tells what was found, or "" if nothing was."""
        with tempfile.TemporaryDirectory() as folder:
            self.build(Path(folder))
            command = [
                sys.executable,
                str(Path(__file__).parent),
                "--schedules",
                str(schedules),
                "--first",
                str(first),
            ]
            done = subprocess.run(
                [*command, "--stop"],
                env={**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode not in (0, 1) or done.stderr:
            raise RuntimeError(f"{self.name}: {done.stdout}{done.stderr}")
        found = re.search(r"x (.*)\n.*--seed +(\d+)", done.stdout)
        return "" if found is None else f"{int(found[2]) - first + 1:6} schedules: {found[1]}"


_IS_LOST = "Lock.LOST if held is None or trouble else"

MUTANTS = [
    Mutant(
        "an answer is dropped when the store has lost the entry",
        [("_ledger.py", "        if there < chain.generation:", "        if 0 <= there < chain.generation:")],
    ),
    Mutant(
        "a lock that cannot be had counts as held by another",
        [("_ledger.py", _IS_LOST, "Lock.HELD if held is None or trouble else")],
    ),
    Mutant(
        "what cannot be read counts as not there",
        [("_flight.py", "            readable=trouble is None,", "            readable=True,")],
    ),
    Mutant("a lease of a minute", [("_rules.py", "LEASE = 5.0 ", "LEASE = 61.0 ")]),
    Mutant("a lease that does not end", [("_rules.py", "LEASE = 5.0 ", "LEASE = 86400.0 ")]),
    Mutant(
        "the hold-back goes by the local clock",
        [
            (
                "_ledger.py",
                "            service_now=self.observed.service_now(spend.scope),\n            least=left.least,",
                "            service_now=(self.now().wall, self.now().wall),\n            least=left.least,",
            )
        ],
    ),
    Mutant(
        "the hold-back ignores how old a token is known to be",
        [("_rules.py", "    hold = max(0.0, BIRTH_SECOND - age)", "    hold = BIRTH_SECOND + 2.0")],
    ),
    Mutant(
        "a clock that is set ends what is remembered",
        [
            (
                "_rules.py",
                "        return max(0.0, now.steady - self.steady) if self.boot == now.boot else None",
                "        return max(0.0, now.wall - self.wall)",
            )
        ],
    ),
    Mutant(
        "a token is spent though that cannot be written down",
        [("_rules.py", "Step.SEND if view.announced or is_urgent else", "Step.SEND if True else")],
    ),
    Mutant(
        "an expired pair of Circle's is handed out",
        [("services/circle.py", "if is_new or not _has_expired(pair, reply):", "if True:")],
    ),
    Mutant(
        "a call gives up when its pause would be too long",
        [
            (
                "_rules.py",
                "    return min(drawn * longest, time_left - LAST_CALL)",
                "    return drawn * longest if drawn * longest < time_left / 4 else None",
            )
        ],
    ),
    Mutant(
        "who joins does not extend the time",
        [
            (
                "_flight.py",
                "return max((waiter.until for waiter in list(self.waiters)), default=-math.inf)",
                "return min((waiter.until for waiter in list(self.waiters)), default=-math.inf)",
            )
        ],
    ),
    Mutant(
        "a refusal is remembered for ten seconds",
        [("_rules.py", "REFUSALS = (60.0, 300.0, 3600.0)", "REFUSALS = (10.0, 10.0, 10.0)")],
    ),
    Mutant(
        "Retry-After is forgotten",
        [
            (
                "_exchange.py",
                "                    self._observed.leave_alone(self._scope, error.retry_after)",
                "                    pass",
            )
        ],
    ),
    Mutant(
        "a longer lifetime is not asked for while a token is fresh",
        [("_rules.py", "        if requested is None or self.lifetime is None:", "        if True:")],
    ),
    Mutant(
        "a flight whose starter was interrupted never starts",
        [("_cache.py", "                if not flight.is_running:", "                if False:")],
    ),
    Mutant(
        "a flight goes on when nobody waits any more",
        [
            ("_flight.py", "            raise _Abandoned\n", "            pass\n"),
            ("_flight.py", "default=-math.inf)", "default=math.inf)"),
        ],
    ),
    Mutant(
        "aliases and users are not checked",
        [
            (
                "_rules.py",
                '    return chain if entry.get("proof") == key_of(chain, credential.secret) else None',
                "    return chain",
            ),
            ("services/kuzzle.py", "return user is not None and bool(found - {user, None})", "return False"),
        ],
    ),
    Mutant(
        "a refusal is a verdict while another process may have the answer",
        [("_flight.py", "and is_settled and not self._is_being_spent(before, tried):", "and is_settled:")],
    ),
    Mutant(
        "a refusal is a verdict though the store was not asked again",
        [("_flight.py", "            if is_newer or ledger.adopt(chain, spend):", "            if False:")],
    ),
    Mutant("memory is trusted for a minute", [("_rules.py", "TRUSTED = 0.5 ", "TRUSTED = 60.0 ")]),
    Mutant(
        "an old entry is written over a newer one",
        [("_ledger.py", "        if there < chain.generation:", "        if True:")],
    ),
]


def hunt(schedules: int, only: str) -> int:
    """Look for all of them, and print how many schedules each took."""
    chosen = [mutant for mutant in MUTANTS if only in mutant.name]
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, found in zip(chosen, pool.map(lambda one: one.hunt(schedules), chosen), strict=True):
            print(f"{mutant.name:75} {found or 'SURVIVES'}", flush=True)
            survivors += not found
    print(f"{len(chosen)} mutants, {survivors} survive {schedules} schedules")
    return 1 if survivors or not chosen else 0
