"""
All messages, to be read in one go.

``python tests/messages.py`` writes ``tests/messages.txt`` anew: what a caller is told when something goes wrong, as it
happens on the fakes, and every sentence in the sources.
"""

from __future__ import annotations

import ast
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_suffix(".txt")
sys.path[:0] = [str(ROOT)] if __name__ == "__main__" else []

from refresher import (  # noqa: E402
    CircleAuth,
    EncryptedStore,
    FileStore,
    KuzzleAuth,
    MemoryStore,
    RedisStore,
    RefreshError,
    TokenCache,
    _rules,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher.testing import FAULTS, Answer, Clock, FakeCircle, FakeKuzzle  # noqa: E402

PACKAGE = ROOT / "refresher"
UUID = "00000000-0000-4000-8000-000000000000"
KUZZLE_IDS = (
    "api.process.overloaded",
    "network.http.url_not_found",
    "plugin.strategy.missing_user",
    "security.rights.unauthorized",
    "security.token.expired",
    "services.cache.write_failed",
)
# SQL, Lua, regular expressions and HTML.
NO_SENTENCE = re.compile(r"{table}|redis\.call|\(\?|^<")
CIRCLE_CODES = (-1, 2, 3, 5, 401, 155104, 155113, 156006, 156020)


def told(call: Callable[[], object]) -> str:
    """Return the kind of error that a call raises, and its message."""
    try:
        call()
    except RefreshError as error:
        return f"{type(error).__name__}: {error}"
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"
    return "no error:"


class Broken(MemoryStore):
    """A store that fails."""

    def get(self, key: str, /) -> str | None:
        """Fail."""
        raise ConnectionError


class Locked(MemoryStore):
    """A store whose locks another process has."""

    def acquire(self, key: str, owner: str, lease: float, /) -> float:
        """Say that another has it."""
        return 1.0


def happenings() -> Iterator[tuple[str, str]]:
    """Let each kind of thing go wrong."""
    with FakeKuzzle(clock=Clock(time.time() - 3600)) as kuzzle, FakeCircle() as circle:
        yield from kuzzles(kuzzle)
        yield from circles(circle)
    yield from arguments()


def kuzzles(kuzzle: FakeKuzzle) -> Iterator[tuple[str, str]]:
    """Let things go wrong with Kuzzle."""

    def call(jwt: str | None = None, **options: Any) -> Callable[[], object]:
        options = {"queuable": False, "cache": None, "timeout": 0.4, **options}
        return lambda: refresh_kuzzle_token(kuzzle.url, jwt or kuzzle.login(ago=1800), **options)

    for name in FAULTS:
        kuzzle.suffer(name)
        yield f"Kuzzle, {name}", told(call())
        time.sleep({"down": 0.6, "busy_retry_after": 1.1}.get(name, 0.0))
    for name in KUZZLE_IDS:
        kuzzle.fail_next(name)
        yield f"Kuzzle, {name}", told(call())
    result = {"_id": "foo", "expiresAt": 1, "ttl": 1, "jwt": "kauth-e30"}
    for what, body in {
        "another request's answer": {"action": "logout", "result": result},
        "no token": {"action": "refreshToken", "result": {"_id": "foo"}},
        "another user's token": {"action": "refreshToken", "result": {**result, "_id": "bar"}},
        "an expired token": {"action": "refreshToken", "result": {**result, "ttl": 0}},
    }.items():
        kuzzle.next_answers.append(Answer(200, body))
        yield f"Kuzzle, {what}", told(call())
    jwt = kuzzle.login(ago=1800)
    kuzzle.next_answers.append(Answer(200, {"action": "refreshToken", "result": {**result, "jwt": jwt}}))
    yield "Kuzzle, the old token", told(call(jwt))
    kuzzle.next_answers.append(Answer(429, b"", {"Retry-After": "30"}))
    told(call())
    yield "Kuzzle, asked to wait", told(call())
    yield "an unreadable store", told(call(cache=TokenCache(Broken())))
    yield "an unreadable store, forgotten", told(lambda: TokenCache(Broken()).forget(kuzzle.url, jwt))
    with FakeKuzzle() as other:  # asks for no pause
        yield (
            "a store locked by another",
            told(
                lambda: refresh_kuzzle_token(other.url, other.login(ago=1800), cache=TokenCache(Locked()), timeout=0.4)
            ),
        )
        other.delay_next(0.6)
        yield (
            "too slow, with a cache",
            told(lambda: refresh_kuzzle_token(other.url, other.login(ago=1800), cache=TokenCache(), timeout=0.3)),
        )
        time.sleep(0.5)
    yield "an unknown host", told(lambda: refresh_kuzzle_token("http://no.invalid", jwt, cache=None, queuable=False))


def circles(circle: FakeCircle) -> Iterator[tuple[str, str]]:
    """Let things go wrong with Circle."""

    def call() -> object:
        old = circle.sign_in()
        return refresh_user_token(
            user_token=old.user_token,
            refresh_token=old.refresh_token,
            device_id="device-1",
            api_key=circle.api_key,
            base_url=circle.url,
            retry=False,
            cache=None,
            timeout=0.4,
        )

    for name in FAULTS:
        circle.suffer(name)
        yield f"Circle, {name}", told(call)
        time.sleep({"down": 0.6, "busy_retry_after": 1.1}.get(name, 0.0))
    for code in CIRCLE_CODES:
        circle.fail_next(code)
        yield f"Circle, {code}", told(call)
    circle.next_answers.append(Answer(200, {"data": {"refreshToken": "r"}}))
    yield "Circle, no user token", told(call)


def arguments() -> Iterator[tuple[str, str]]:
    """Give each argument a wrong value."""
    url, jwt = "https://kuzzle", "kauth-e30"
    for options in (
        {"url": 5},
        {"url": "kuzzle"},
        {"url": "http://u:p@kuzzle"},
        {"url": "http://kuzzle/ "},
        {"url": "http://kuzzle:99999"},
        {"jwt": None},
        {"jwt": 5},
        {"jwt": "a b"},
        {"jwt": '"a"'},
        {"expires_in": 7200},
        {"expires_in": "2 moons"},
        {"expires_in": "-2h"},
        {"expires_in": "1000000000y"},
        {"expires_in": "-1", "cookie_auth": True},
        {"cookie_auth": 1},
        {"cookie_auth": True},
        {"trigger_events": 1},
        {"strategy": ""},
        {"queuable": 1},
        {"timeout": "1"},
        {"timeout": 0},
        {"cache": "path"},
        {"session": "session"},
    ):
        given: Any = {"url": url, "jwt": jwt, **options}
        name = ", ".join(f"{key}={value!r}" for key, value in options.items())
        if options.get("expires_in") == "-1":
            import requests

            given["session"] = requests.Session()
        yield f"refresh_kuzzle_token({name})", told(lambda given=given: refresh_kuzzle_token(**given))
    right = {"refresh_token": "r", "device_id": "d", "user_token": "u", "api_key": "k"}
    for options in (
        {"user_id": "user-1"},
        {"user_token": None, "user_id": "u"},
        {"api_key": ""},
        {"base_url": "http://circle.example"},
        {"idempotency_key": "5"},
        {"request_id": "5"},
        {"device_id": None},
    ):
        name = ", ".join(f"{key}={value!r}" for key, value in options.items())
        given = {**right, **options}
        yield f"refresh_user_token({name})", told(lambda given=given: refresh_user_token(**given))
    others: dict[str, Callable[[], object]] = {
        "TokenCache('path')": lambda: TokenCache("path"),
        "TokenCache(MemoryStore)": lambda: TokenCache(MemoryStore),
        "TokenCache({})": lambda: TokenCache({}),
        "TokenCache(ahead=-1)": lambda: TokenCache(ahead=-1),
        "MemoryStore(0)": lambda: MemoryStore(0),
        "FileStore('')": lambda: FileStore(""),
        "FileStore(a file)": _check_a_file,
        "RedisStore('url')": lambda: RedisStore("url"),
        "EncryptedStore(store, 'key')": lambda: EncryptedStore(MemoryStore(), "key"),
        "KuzzleAuth(on_refresh=5)": lambda: KuzzleAuth(url, on_refresh=5),
        "CircleAuth(timeout=-5)": lambda: CircleAuth(**right, timeout=-5),
    }
    for name, call in others.items():
        yield name, told(call)


def _check_a_file() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "refresher").write_text("")
        FileStore(folder).check()


def sentences() -> Iterator[tuple[str, str, str]]:
    """Find what the sources say: modules, what takes it, and the text, without what programmers and --help read."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if "testing" not in path.parts:
            tree = ast.parse(path.read_text())
            name = path.relative_to(PACKAGE).with_suffix("").as_posix()
            for taker, text in sorted(set(_texts(tree))):
                yield name, taker, text


def _texts(tree: ast.AST, taker: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, (ast.FunctionDef, ast.ClassDef, ast.Module)):
        if ast.get_docstring(tree) is not None:
            tree.body = tree.body[1:]
        if getattr(tree, "name", "") == "_parser":  # the manual page shows it
            return
    if isinstance(tree, ast.Call):
        taker = ast.unparse(tree.func).rpartition(".")[2]
        taker = {"attrs": "", "sub": "", "join": ""}.get(taker, taker)
    if isinstance(tree, ast.Assign):
        taker = ast.unparse(tree.targets[0]).rpartition(".")[2]
    if isinstance(tree, ast.Expr) and isinstance(tree.value, ast.Constant):
        return
    if isinstance(tree, (ast.Constant, ast.JoinedStr)):
        text = _text(tree)
        if re.search(r"[a-z]+ [a-z{%]+", text) and not NO_SENTENCE.search(text) and taker not in ("Secret", "Instant"):
            yield taker, text.strip()
        return
    for child in ast.iter_child_nodes(tree):
        yield from _texts(child, taker)


def _text(tree: ast.AST) -> str:
    """Write a text down, with names for what is put in."""
    if isinstance(tree, ast.Constant):
        return tree.value if isinstance(tree.value, str) else ""
    parts = [
        f"{{{ast.unparse(part.value)}}}" if isinstance(part, ast.FormattedValue) else _text(part)
        for part in getattr(tree, "values", [])
    ]
    return "".join(parts)


def table() -> str:
    """Write the table."""
    lines = [HEADINGS[0]]
    for what, message in happenings():
        kind, _, text = message.partition(":")
        lines += ["", what, f"    {kind}", *([f"    {text.strip()}"] if text else [])]
    lines += ["", "", HEADINGS[1]]
    before = ""
    for module, taker, text in sentences():
        lines += [] if module == before else ["", module]
        before = module
        lines.append(f"    {taker or '-'}: {text}")
    return "\n".join(lines) + "\n"


HEADINGS = "WHAT A CALLER IS TOLD", "EVERY SENTENCE IN THE SOURCES"

if __name__ == "__main__":
    logging.getLogger("refresher").setLevel(logging.CRITICAL)
    _rules.BIRTH_SECOND = 0.0  # as in the tests: the fake's tokens are not young
    TABLE.write_text(table())
