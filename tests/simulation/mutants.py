"""Known faults, put into the core one by one: the simulation has to find each of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import refresher


class Mutant:
    """
    A fault of a few lines.

    Args:
        name: What is wrong then.
        changes: Each a module, the text in it that goes, and the text that comes.
    """

    def __init__(self, name: str, *changes: tuple[str, str, str]) -> None:
        self.name, self.changes = name, changes

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
        """Look for it. Tells what was found, or "" if nothing was that the good core does not show as well."""
        with tempfile.TemporaryDirectory() as folder:
            self.build(Path(folder))
            seed = first
            while seed < first + schedules:
                out = _run(folder, f"--first={seed}", f"--schedules={first + schedules - seed}", "--stop")
                found = re.search(r"x (.*)\n.*--seed +(\d+)", out)
                if found is None:
                    break
                seed = int(found[2]) + 1
                if "VIOLATION" not in _run(str(Path(refresher.__file__).parent.parent), f"--seed={found[2]}"):
                    return f"{seed - first:6}  {found[1]}"
        return ""


def _run(path: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, Path(__file__).parent, *arguments],
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1) or done.stderr:
        raise RuntimeError(f"{path}: {done.stdout}{done.stderr}")
    return done.stdout


_REQUESTS, _LEDGER, _FLIGHT, _CACHE, _RULES = "_exchange.py", "_ledger.py", "_flight.py", "_cache.py", "_rules.py"
_CIRCLE, _KUZZLE, _AUTH = "services/circle.py", "services/kuzzle.py", "auth.py"

MUTANTS = [
    # The store
    Mutant(
        "an answer is dropped when the store has lost the entry",
        (_LEDGER, "        if there < chain.generation:", "        if 0 <= there < chain.generation:"),
    ),
    Mutant(
        "an older entry is written over a newer one",
        (_LEDGER, "        if there < chain.generation:", "        if True:"),
    ),
    Mutant(
        "what could not be written at once is not written later",
        (
            _FLIGHT,
            "            ledger.save_until(self.chain_key, self._limit)\n",
            "            pass\n",
        ),
        (_FLIGHT, "            ledger.save_later(self._sign_orphans_out)", "            pass"),
    ),
    Mutant(
        "what the store has lost is not put back",
        (_LEDGER, "            self.unsaved[key] = known\n", ""),
    ),
    Mutant(
        "nothing leads from a new token back to its chain",
        (_LEDGER, "        if newest is not None and there <= chain.generation:", "        if False:"),
    ),
    Mutant(
        "one failure blinds a process for a second",
        (
            _LEDGER,
            "            answer = command(*args)\n",
            (
                "            blind = self.runtime.steady() - self._troubled_at < 1.0\n"
                "            answer = None if blind else command(*args)\n"
            ),
        ),
    ),
    Mutant(
        "what cannot be read counts as not there",
        (_FLIGHT, "            readable=is_readable,", "            readable=True,"),
    ),
    Mutant(
        "a caller's own thread asks the store",
        (
            _LEDGER,
            "        return chain or Chain(key=key), is_recent or self.is_local",
            "        return (chain, True) if chain and is_recent else (self.look(credential)[0], True)",
        ),
    ),
    Mutant("memory is trusted for a minute", (_RULES, "TRUSTED = 0.5 ", "TRUSTED = 60.0 ")),
    Mutant(
        "who may point to a chain is not checked, nor whose a token is",
        (_RULES, ' and entry.get("proof") == key_of(chain, credential.secret)', ""),
        (_KUZZLE, "return user is not None and bool(found - {user, None})", "return False"),
    ),
    Mutant(
        "what was forgotten comes back",
        (_LEDGER, "        return all([self.save(tombstone), *(", "        return all([self.delete(chain.key), *("),
        (_LEDGER, "        self.unsaved[chain.key] = tombstone\n", ""),
        (_LEDGER, "        self.chains.put(chain.key, tombstone)", "        self.chains.drop(chain.key)"),
    ),
    # The lock
    Mutant(
        "a lock that cannot be had counts as held by another",
        (_LEDGER, "Lock.LOST if held is None else", "Lock.HELD if held is None else"),
    ),
    Mutant("a lease of a minute", (_RULES, "LEASE = 5.0 ", "LEASE = 61.0 ")),
    Mutant("a lease of a day", (_RULES, "LEASE = 5.0 ", "LEASE = 86400.0 ")),
    Mutant("a lease is not renewed", (_LEDGER, "not runtime.wait(end, _rules.LEASE / 3)", "False")),
    Mutant(
        "a request leaves though the lease has ended",
        (_FLIGHT, "self._lease.is_ours():\n            raise _LookAgain", "self._lease.is_ours():\n            pass"),
    ),
    Mutant(
        "no lock is taken",
        (_RULES, "        return Step.LOCK\n", "        pass\n"),
    ),
    Mutant(
        "who has got the lock does not look again",
        (
            _FLIGHT,
            "            chain, is_readable = self._look()\n            if chain.key != self.chain_key:",
            (
                "            if lease.lock is not Lock.OURS:\n"
                "                chain, is_readable = self._look()\n"
                "            if chain.key != self.chain_key:"
            ),
        ),
    ),
    Mutant(
        "what is written late takes the place of another's announcement",
        (_FLIGHT, "        if not is_noted or self._lease.is_ours() or ", "        if True or "),
    ),
    Mutant(
        "in the last moments of a caller's own token the lock is still waited for",
        (_FLIGHT, "        if newest is None:  # the", "        if False:  # the"),
    ),
    Mutant(
        "in a token's last moments the lock is still waited for",
        (_RULES, "view.lock is Lock.HELD and view.patience > 0:", "view.lock is Lock.HELD:"),
    ),
    # What is written down before
    Mutant(
        "a token is spent though that cannot be written down",
        (_FLIGHT, "if not announced:  # what", "if False:  # what"),
    ),
    Mutant(
        "nothing is announced",
        (
            _FLIGHT,
            "        return announce()",
            "        return True",
        ),
    ),
    Mutant(
        "a failed attempt takes the place of another that is open",
        (_FLIGHT, "for one in (attempt, ledger.last_attempt(spend)[0]):", "for one in ():"),
    ),
    Mutant(
        "a failed attempt takes the place of one that was made since",
        (_FLIGHT, "for one in (attempt, ledger.last_attempt(spend)[0]):", "for one in (attempt,):"),
    ),
    Mutant(
        "a refusal that is no verdict leaves its attempt open",
        (_FLIGHT, "            self._close(spend, attempt)\n            try:", "            try:"),
        (_FLIGHT, "                self._close(spend, attempt)\n                raise", "                raise"),
    ),
    Mutant(
        "what was announced long ago is not announced anew",
        (_FLIGHT, "if self._is_old() and not self._lease.announce():", "if False:"),
    ),
    Mutant(
        "a lock that was passed by is passed by for good",
        (_FLIGHT, "if again and self._is_old() and (", "if False and ("),
    ),
    Mutant(
        "a service's time is what its last answer said, however late",
        (
            _REQUESTS,
            "        if was_certain == is_certain and",
            "        if False and",
        ),
        (_REQUESTS, "        most = least + took\n", "        most = least\n"),
    ),
    Mutant(
        "what cannot be written is left to the next refresh",
        (_FLIGHT, "            ledger.save_later(self._sign_orphans_out)", "            pass"),
    ),
    Mutant(
        "a store that begins to hang is not passed by",
        (_CACHE, " 0.1)) or flight.is_stuck():", " 0.1)):"),
    ),
    Mutant(
        "a pause may be longer than a token lives",
        (_FLIGHT, "soon if now < self._urgent_at + _rules.LAST_MOMENTS else math.inf)", "math.inf)"),
    ),
    Mutant(
        "a store that hangs is not passed by",
        (_LEDGER, "        if (delay := self.delay()) < _rules.TOO_SLOW:", "        if (delay := self.delay()) < 1e9:"),
    ),
    Mutant(
        "in a token's last moments the store is still waited for",
        (_RULES, "    if not view.readable and not urgent:", "    urgent = False\n    if not view.readable:"),
    ),
    # Refusals
    Mutant(
        "a refusal is the verdict though there is a newer token",
        (_FLIGHT, "            if is_newer or ledger.adopt(chain, spend):", "            if False:"),
    ),
    Mutant(
        "a refusal is the verdict while another process may have the answer",
        (_FLIGHT, "and is_settled and not self._is_being_spent(before, tried):", "and is_settled:"),
    ),
    Mutant(
        "a refusal is the verdict though the store cannot be read",
        (_FLIGHT, "is_readable and is_there and ledger.is_settled()", "True"),
    ),
    Mutant(
        "a refusal is the verdict though nothing was announced",
        (_FLIGHT, "self._time_for_news(chain) if announced else self._limit", "self._time_for_news(chain)"),
    ),
    Mutant(
        "a refusal is the verdict right after the store was in trouble",
        (_RULES, "SETTLED = 2.0 ", "SETTLED = 0.0 "),
    ),
    Mutant(
        "a refusal is the verdict though others may write down a successor just now",
        (_FLIGHT, "self._time_for_news(chain) if announced else", "0.0 if announced else"),
    ),
    Mutant(
        "a refusal is the verdict though a token that has no successor yet may have one just now",
        (_FLIGHT, "attrs.evolve(self.call, own_will_do=True, rejected=None)", "self.call"),
    ),
    Mutant(
        "a rejection is the verdict right after the store was in trouble",
        (_FLIGHT, "is_proof = is_readable and ledger.is_settled()", "is_proof = is_readable"),
    ),
    Mutant(
        "a pause is as long as the clocks of two machines differ",
        (_FLIGHT, "pause and pause + age)", "pause + one.at.likely_age(now))"),
        (_RULES, "self.pause - max(age, 0.0)", "self.pause - age"),
    ),
    Mutant(
        "the end of another session is the end of this one",
        (_RULES, ' and entry.reveal()["chain"] == key', ""),
    ),
    Mutant(
        "each refusal is remembered for a minute",
        (_RULES, "REFUSALS = (60.0, 300.0, 3600.0)", "REFUSALS = (60.0, 60.0, 60.0)"),
    ),
    Mutant(
        "a refusal is the verdict though it cannot be written down",
        (
            _FLIGHT,
            "                if self._note(spend, verdict.refused(asker, error), now):",
            "                if ledger.note(spend, verdict.refused(asker, error)) or True:",
        ),
    ),
    Mutant("a refusal is not remembered", (_RULES, "        return Step.REFUSE\n", "        pass\n")),
    Mutant(
        "a refusal by Circle comes back as the answer to the next request",
        (_CIRCLE, "if anew and not self.given_key else", "if False else"),
    ),
    # Clocks and lifetimes
    Mutant(
        "the hold-back goes by the local clock",
        (
            _REQUESTS,
            "service_now=self.service_now(credential.scope))",
            "service_now=(self._wall(), self._wall(), True))",
        ),
    ),
    Mutant(
        "the hold-back ignores how old a token is known to be",
        (_RULES, "    return max(0.0, BIRTH_SECOND - age)", "    return BIRTH_SECOND"),
    ),
    Mutant("there is no hold-back", (_RULES, "        return Step.WAIT_FOR_BIRTH\n", "        pass\n")),
    Mutant(
        "ages go by the wall clock, which somebody sets",
        (
            _RULES,
            "        return max(0.0, now.steady - self.steady) if is_known else None",
            "        return max(0.0, now.wall - self.wall)",
        ),
    ),
    Mutant(
        "a token of another machine is judged by the local clock",
        (
            _RULES,
            "    earliest, latest, is_certain = service_now\n",
            "    earliest, latest, is_certain = -math.inf, -math.inf, False\n",
        ),
    ),
    Mutant(
        "a longer lifetime is not asked for while a token is fresh",
        (_RULES, "        return requested is None or requested <= most", "        return True"),
    ),
    Mutant(
        "an expired pair of Circle's is handed out",
        (_CIRCLE, "if alike >= (2 if left > 0 else _SURE) or not _has_expired(pair, reply):", "if True:"),
    ),
    Mutant(
        "an expired pair of Circle's is handed out after five steps",
        (_CIRCLE, "_MOST_STEPS = 1000", "_MOST_STEPS = 5"),
        (
            _CIRCLE,
            '        raise failure("keeps returning expired tokens: try again later", ',
            "        return step\n        raise failure('', ",
        ),
    ),
    # Patience
    Mutant(
        "a call gives up when its pause would end too late",
        (
            _RULES,
            "    return max(asked, min(drawn * longest, most))",
            "    return drawn * longest if drawn * longest < most else None",
        ),
        # Else it would ask again.
        (_FLIGHT, "None if self._failure and self._has_time(waiter, self._failure) else outcome", "outcome"),
    ),
    Mutant(
        "who joins a call that is just failing fails with it",
        (_FLIGHT, "None if self._failure and self._has_time(waiter, self._failure) else outcome", "outcome"),
    ),
    Mutant(
        "who joins does not extend the time",
        (
            _FLIGHT,
            "max((waiter.until for waiter in self._waiting())",
            "min((waiter.until for waiter in self._waiting())",
        ),
    ),
    Mutant(
        "who joins does not ask for another attempt",
        (_FLIGHT, "return any(waiter.retry for waiter in self._waiting())", "return self.call.retry"),
    ),
    Mutant(
        "Retry-After is kept for one call",
        (
            _REQUESTS,
            "                self._observed.leave_alone(self._scope, error.retry_after)",
            "                pass",
        ),
        (
            _FLIGHT,
            "self._close(spend, attempt, error.retry_after or 0.0)",
            "self._close(spend, attempt)",
        ),
    ),
    Mutant(
        "what was sent is abandoned when nobody waits any more",
        (
            _FLIGHT,
            "        return max([self._gone_at + self._limit, *waiting])",
            "        return max([-math.inf, *waiting])",
        ),
    ),
    Mutant(
        "a flight whose starter was interrupted never starts",
        (_CACHE, "                if not flight.is_running:", "                if False:"),
    ),
    Mutant(
        "a flight goes on when nobody waits any more",
        (_FLIGHT, "            raise _Abandoned\n", "            pass\n"),
        (_FLIGHT, "default=-math.inf)", "default=math.inf)"),
    ),
    # Sign-outs
    Mutant(
        "a sign-out only forgets",
        (
            _FLIGHT,
            "newest.sign_out(self._exchange)",
            "bool(self._exchange)",
        ),
    ),
    Mutant(
        "a sign-out is that of the token that it was called with",
        (_FLIGHT, "self._lease, chain.newest or self.call.credential", "self._lease, self.call.credential"),
    ),
    Mutant(
        "a sign-out does not look whether there is a newer token",
        (_FLIGHT, "            return self._verify(chain, newest, attempt, self._wait, verdict)", "            pass"),
    ),
    Mutant(
        "a sign-out takes no lock",
        (
            _FLIGHT,
            "        if is_readable and lease.lock is not Lock.LOST and not lease.is_ours():",
            "        if False:",
        ),
    ),
    Mutant(
        "a sign-out does not wait for a refresh that is under way",
        (
            _FLIGHT,
            "        return any(one and one.is_under_way(",
            "        return self.kind == 'refresh' and any(one and one.is_under_way(",
        ),
    ),
    Mutant(
        "after a sign-out, the store does not say that the session has ended",
        (_FLIGHT, "has_ended=True", "has_ended=False"),
    ),
    Mutant(
        "what comes too late for a sign-out is not signed out",
        (_LEDGER, "        if newest is not None and has_ended and there > chain.generation:", "        if False:"),
    ),
    Mutant(
        "what is written late takes the place of a sign-out",
        (
            _LEDGER,
            "            if newest is not None and self.runtime.steady() - began > _rules.TRUSTED:",
            "            if False:",
        ),
    ),
    Mutant(
        "a sign-out gives way to tokens that the store never had",
        (_LEDGER, "max(0, chain.generation) + LEAP", "max(0, chain.generation) + 2"),
    ),
    Mutant(
        "what came too late for a sign-out is asked for again and again",
        (_FLIGHT, "            self.first_generation = math.inf\n", "            pass\n"),
    ),
    Mutant(
        "one failed write ends a sign-out",
        (
            _FLIGHT,
            "LAST_CALL) <= 0:\n                raise UnavailableError(self.status",
            "LAST_CALL):\n                raise UnavailableError(self.status",
        ),
    ),
    # Verdicts
    Mutant(
        "the second rejection of a request is a verdict",
        (
            _AUTH,
            "                return answer\n",
            '                return answer\n            raise SignInRequiredError("no", provider=current.service)\n',
        ),
    ),
    Mutant(
        "what another call found before a token was rejected is the answer",
        (_CACHE, "if outcome is not None and flight.call.rejected != call.rejected == outcome.headers:", "if False:"),
    ),
    Mutant(
        "an idempotency key that was refused is given up, though an answer to it was lost",
        (_FLIGHT, " and not self._is_in_doubt:", ":"),
    ),
    Mutant(
        "nobody else is told that an answer may have been lost",
        (_RULES, 'doubt if KEY.fullmatch(doubt := str(entry.get("in_doubt"))) else None', "None"),
    ),
    Mutant(
        "what somebody else is refused gives up the key of an answer that was lost",
        (
            _FLIGHT,
            "if error.idempotency_key is not None and self._asker == asker:",
            "if error.idempotency_key is not None:",
        ),
    ),
    Mutant(
        "what another was seen to spend is forgotten with the store",
        (_FLIGHT, "attempt or self._tried.get(spend.keys[-1])", "attempt"),
    ),
    Mutant(
        "who was passed by spends the token, too",
        (_FLIGHT, " or self._ledger.flights.get(self.chain_key, self) is not self", ""),
    ),
    Mutant(
        "a look that failed tells the generation",
        (_FLIGHT, "chain.generation if is_readable else math.inf", "chain.generation"),
    ),
    Mutant(
        "what was tried with one pair is what was tried with the next",
        (_LEDGER, "attempt.of and attempt.of not in spend.keys", "False"),
    ),
    Mutant(
        "what was tried is read after the token",
        (_FLIGHT, "            tried, is_readable = ledger.last_attempt(spend)\n", ""),
        (
            _FLIGHT,
            "            now, is_settled = self._runtime.steady(), ",
            (
                "            tried, is_readable = ledger.last_attempt(spend)\n"
                "            now, is_settled = self._runtime.steady(), "
            ),
        ),
    ),
    Mutant(
        "one command that failed keeps a token from being refreshed",
        (_FLIGHT, "(view.left.most <= 0 or may_blink)", "view.left.most <= 0"),
    ),
    Mutant(
        "the refresh token alone tells whether a pair is new",
        (_AUTH, "newest.keys[-1] == first.keys[-1]", "newest.secret == first.secret"),
    ),
    Mutant(
        "a pair is as old as its refresh token",
        (_LEDGER, "self.observed.seen_for(newest.keys[-1])", "self.observed.seen_for(newest.keys[0])"),
    ),
    Mutant(
        "the key of a later step is kept for the first token",
        (_CIRCLE, "error.idempotency_key if is_first else own", "error.idempotency_key"),
    ),
    Mutant(
        "a process that cannot reach the service keeps the lock",
        (_FLIGHT, "(is_in_vain or self._lease.lock is not Lock.OURS)", "self._lease.lock is not Lock.OURS"),
    ),
    Mutant(
        "a process that hears nothing keeps the lock",
        (_FLIGHT, "self._has_failed = True", "self._has_failed = error.spent is False"),
        (_FLIGHT, "if again and self._is_old()", "if again and self._has_failed and self._is_old()"),
    ),
    Mutant(
        "a request that is lost without a word is not sent again",
        (_REQUESTS, "if now >= self._again_at and", "if False and"),
    ),
    Mutant(
        "the first request is given up when it is sent again",
        (
            _REQUESTS,
            "self._is_over or self._answer is not None",
            "self._is_over or self._is_pending or self._answer",
        ),
    ),
    Mutant(
        "how long others have looked for an answer does not count",
        (_FLIGHT, "seen=(now, age))", "seen=(now, 0.0))"),
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
