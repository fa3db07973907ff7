"""What Sentry, rich, IPython, Django, OpenTelemetry and structlog see of us. All of them are the real thing."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import traceback
from pathlib import Path

import pytest
import requests
import rich.traceback
import sentry_sdk
import structlog
from cryptography.fernet import Fernet
from django.conf import UserSettingsHolder, global_settings, settings
from django.views.debug import ExceptionReporter
from helpers import call_with
from IPython.core.ultratb import VerboseTB
from opentelemetry.instrumentation.urllib3 import URLLib3Instrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from requests.cookies import RequestsCookieJar
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.transport import Transport

import refresher
from refresher import (
    CircleAuth,
    EncryptedStore,
    FileStore,
    KuzzleAuth,
    KuzzleToken,
    MemoryStore,
    TokenCache,
    keep_alive,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher.testing import Answer

PACKAGE = str(Path(refresher.__file__).parent)


def vault():
    """Where the secret comes from: no variable of ours has it."""
    return "planted" * 3


def jwt():
    return f"kauth-{vault()}"


def pair():
    return {"user_token": vault(), "refresh_token": vault(), "api_key": vault(), "device_id": "device-1"}


def kuzzle_says(kuzzle, status, body):
    """Refresh, and get an answer that has secrets in it. No variable here has them: *body* is a function."""
    kuzzle.next_answers.append(Answer(status, {"action": "refreshToken", "status": status, **body()}))
    refresh_kuzzle_token(kuzzle.url, jwt(), queuable=False, cache=TokenCache())


def circle_says(circle, status, body):
    circle.next_answers.append(Answer(status, body()))
    refresh_user_token(**pair(), base_url=circle.url, retry=False, cache=TokenCache())


def misplaced(take, right, *names):
    """Make a failure for each of these arguments: it gets a secret, and all others are right."""
    return {
        f"{take.__name__}, {name}": lambda kuzzle, _, name=name: take(**{**right(kuzzle), name: vault()})
        for name in names
    }


COMMON = "timeout", "cache", "session"
OF_KUZZLE = (lambda kuzzle: {"url": kuzzle.url, "jwt": jwt()}, "queuable", "trigger_events", *COMMON)
OF_CIRCLE = (lambda _: pair(), "retry", *COMMON)

# Each fails, some before and some after a request.
FAILURES = {
    **misplaced(refresh_kuzzle_token, *OF_KUZZLE, "cookie_auth"),
    **misplaced(refresh_user_token, *OF_CIRCLE),
    **misplaced(KuzzleAuth, *OF_KUZZLE, "on_refresh"),
    **misplaced(CircleAuth, *OF_CIRCLE, "on_refresh"),
    **misplaced(TokenCache, lambda _: {}, "store", "lease", "clock", "ahead", "on_wait", "on_event", "runtime"),
    **misplaced(keep_alive, lambda _: {"auths": []}, "at_once", "per_second"),
    "refused": lambda kuzzle, _: refresh_kuzzle_token(kuzzle.url, jwt(), cache=TokenCache()),
    "without a cache": lambda kuzzle, _: refresh_kuzzle_token(kuzzle.url, jwt(), cache=None),
    "wrong url": lambda kuzzle, _: refresh_kuzzle_token(jwt(), jwt()),
    "wrong lifetime": lambda kuzzle, _: refresh_kuzzle_token(kuzzle.url, jwt(), expires_in=vault()),
    "wrong argument": lambda kuzzle, _: refresh_user_token(**{**pair(), "user_token": [vault()]}),
    "Circle": lambda _, circle: refresh_user_token(**pair(), base_url=circle.url, cache=TokenCache()),
    "auth": lambda kuzzle, _: KuzzleAuth(kuzzle.url, vault() + "\n"),
    "Circle's auth": lambda _, circle: CircleAuth(**{**pair(), "refresh_token": None}),
    "sign_out": lambda kuzzle, _: (kuzzle.stop(), KuzzleAuth(kuzzle.url, jwt(), timeout=0.5, cache=None).sign_out()),
    "peek": lambda kuzzle, _: TokenCache(FileStore("/dev/null/x")).peek(kuzzle.url, jwt()),
    "forget": lambda kuzzle, _: TokenCache(FileStore("/dev/null/x")).forget(kuzzle.url, jwt()),
    "from_dict": lambda *_: KuzzleToken.from_dict({"_id": "foo", "jwt": vault(), "ttl": vault(), "expiresAt": 5}),
    "keep_alive": lambda *_: list(keep_alive([vault()])),
    "an error that quotes": lambda kuzzle, _: kuzzle_says(
        kuzzle, 412, lambda: {"error": {"id": vault(), "message": jwt()}}
    ),
    "a bare error that quotes": lambda kuzzle, _: kuzzle_says(kuzzle, 400, lambda: {"id": vault(), "message": jwt()}),
    "an incomplete token": lambda kuzzle, _: kuzzle_says(kuzzle, 200, lambda: {"result": {"_id": "foo", "jwt": jwt()}}),
    "an expired token": lambda kuzzle, _: kuzzle_says(
        kuzzle, 200, lambda: {"result": {"_id": "foo", "jwt": jwt() + "x", "expiresAt": 1000, "ttl": 0}}
    ),
    "Circle quotes": lambda _, circle: circle_says(circle, 400, lambda: {"code": 2, "message": vault()}),
    "Circle has a strange code": lambda _, circle: circle_says(circle, 400, lambda: {"code": vault(), "message": ""}),
    "Circle has no token": lambda _, circle: circle_says(circle, 200, lambda: {"data": {"refreshToken": vault()}}),
}


@pytest.fixture(params=FAILURES)
def error(request, kuzzle, circle):
    """An error, as a program gets it."""
    try:
        FAILURES[request.param](kuzzle, circle)
    except refresher.RefreshError as error:
        return error
    raise AssertionError("it did not fail")


def test_traceback(error):
    """The standard library's tracebacks with local variables show no secret of ours."""
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    frames = [frame for frame in shown.stack if frame.filename.startswith(PACKAGE)]
    assert frames
    assert "planted" not in str(error)
    assert not [frame for frame in frames if "planted" in str(frame.locals)]


def test_proxies(kuzzle):
    """Nor do ours show the password of a proxy that requests was told of."""
    with pytest.raises(refresher.SignInRequiredError) as caught:
        requests.get(f"{kuzzle.url}/_me", auth=KuzzleAuth(kuzzle.url, jwt()), proxies={"https": vault()}, timeout=9)
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    ours = {frame.name: str(frame.locals) for frame in shown.stack if frame.filename.startswith(PACKAGE)}
    assert ours.keys() == {"_on_response", "_again"}
    assert "planted" not in str(ours)


def test_sentry(error):
    """Nor does Sentry, as it comes."""
    sent = []

    class Kept(Transport):
        def capture_envelope(self, envelope):
            sent.extend(item.payload.json for item in envelope.items)

    with sentry_sdk.isolation_scope():
        sentry_sdk.init("http://key@127.0.0.1/1", transport=Kept)
        sentry_sdk.capture_exception(error)
        sentry_sdk.flush()
        sentry_sdk.init()
    (event,) = sent
    frames = [frame for value in event["exception"]["values"] for frame in value["stacktrace"]["frames"]]
    ours = [frame for frame in frames if frame["module"].startswith("refresher")]
    assert ours
    assert any("vars" in frame for frame in ours)
    assert "planted" not in json.dumps(ours)


class Logs(FileStore):
    """A store of somebody's own, which logs what it does."""

    def set(self, key, value, seconds):
        logging.getLogger("shop").warning("a write")
        return super().set(key, value, seconds)


class Quotes(FileStore):
    """A store that fails once, and says what it was given, as Redis does."""

    has_failed = False

    def set(self, key, value, seconds):
        if "-" not in key and not self.has_failed:
            self.has_failed = True
            raise OSError(f"with args beginning with: {value[value.find('kauth-') :]}")
        return super().set(key, value, seconds)


def mix_up(folder):
    """Let all entries that hold a token be the same, as after a restore that went wrong."""
    one, *others = sorted(folder.rglob("*.entry"), key=lambda path: path.stat().st_size)[-3:]
    for other in others:
        other.write_bytes(one.read_bytes())


def spoil(folder):
    """Let entries be as another version may write them."""
    for path in folder.rglob("*.entry"):
        path.write_bytes(path.read_bytes().replace(b'"generation"', b'"number"'))


KEY = Fernet.generate_key()


@pytest.mark.parametrize(
    ("make", "spoil"),
    [
        pytest.param(lambda _: MemoryStore(maxsize=1), id, id="a store that is full"),
        pytest.param(lambda folder: EncryptedStore(Logs(folder), KEY), id, id="a store that logs"),
        pytest.param(Quotes, id, id="an error that quotes"),
        pytest.param(FileStore, spoil, id="an entry that cannot be read"),
        pytest.param(lambda folder: EncryptedStore(FileStore(folder), KEY), mix_up, id="an entry of another name"),
    ],
)
def test_frames_of_a_log_line(kuzzle, tmp_path, make, spoil):
    """Sentry may keep the stack of a log line, with local variables: ours show no token."""
    frames = []

    class Kept(Transport):
        def capture_envelope(self, envelope):
            events = [item.payload.json for item in envelope.items if item.type == "event"]
            threads = [thread for event in events for thread in event["threads"]["values"]]
            frames.extend(frame for thread in threads for frame in thread["stacktrace"]["frames"])

    with sentry_sdk.isolation_scope():
        integrations = [LoggingIntegration(event_level=logging.WARNING)]
        sentry_sdk.init("http://key@127.0.0.1/1", transport=Kept, attach_stacktrace=True, integrations=integrations)
        firsts, store = [kuzzle.login(user, ago=1800) for user in ("one", "two", "three")], make(tmp_path)
        tokens = {refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(store)).jwt for jwt in firsts}
        spoil(tmp_path)
        with contextlib.suppress(refresher.RefreshError):
            [TokenCache(store).peek(kuzzle.url, jwt) for jwt in firsts]
        sentry_sdk.flush()
        sentry_sdk.init()
    ours = json.dumps([frame["vars"] for frame in frames if frame["module"].startswith("refresher")])
    assert ours != "[]"
    assert not [token for token in tokens if token in ours]


def test_http_debugging(kuzzle, circle, monkeypatch, capsys):
    """What http.client prints when it is told to does not have our requests in it, nor their answers."""
    monkeypatch.setattr(http.client.HTTPConnection, "debuglevel", 1)
    tokens = [*refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=60), cache=TokenCache()).to_dict().values()]
    refresh_user_token(**call_with(circle, circle.sign_in()), cache=TokenCache())
    requests.get(f"{kuzzle.url}/_serverInfo", timeout=10)
    printed = capsys.readouterr().out
    assert "_serverInfo" in printed
    assert not [token for token in [*map(str, tokens), circle.api_key] if token in printed]


def test_jar_that_fails(kuzzle):
    """Nor does IPython show the token that a session's cookie jar cannot take."""

    class Full(RequestsCookieJar):
        def set_cookie(self, *args, **options):
            raise OSError("the database is read-only")

    session, jar = requests.Session(), Full()
    session.cookies = jar
    with pytest.raises(OSError, match="read-only") as caught:
        refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=60), session=session, cookie_auth=True, cache=TokenCache())
    shown = VerboseTB(theme_name="nocolor").text(caught.type, caught.value, caught.tb.tb_next)
    assert "_in_cookie_mode" in shown
    assert [*kuzzle._sessions][-1] not in shown


def _nodes(locals):
    """Give all that rich shows of local variables."""
    for node in (locals or {}).values():
        stack = [node]
        while stack:
            yield (node := stack.pop())
            stack += node.children or []


def test_rich(error):
    """Nor does rich."""
    shown = rich.traceback.Traceback.from_exception(type(error), error, error.__traceback__, show_locals=True)
    frames = [frame for stack in shown.trace.stacks for frame in stack.frames if frame.filename.startswith(PACKAGE)]
    assert frames
    assert "planted" not in str([node.value_repr for frame in frames for node in _nodes(frame.locals)])


def test_ipython(error):
    """Nor does IPython where it is most verbose: here no frame has a secret."""
    shown = VerboseTB(theme_name="nocolor").text(type(error), error, error.__traceback__)
    assert PACKAGE in shown or "refresher/" in shown
    assert "planted" not in shown.replace('"planted" * 3', "")


def test_django(error, monkeypatch):
    """Nor does Django's debug page."""
    monkeypatch.setitem(object.__getattribute__(settings, "__dict__"), "_wrapped", UserSettingsHolder(global_settings))
    reporter = ExceptionReporter(None, type(error), error, error.__traceback__)
    ours = [frame for frame in reporter.get_traceback_frames() if frame["filename"].startswith(PACKAGE)]
    assert ours
    assert "planted" not in str([frame["vars"] for frame in ours])


def test_opentelemetry(kuzzle):
    """A request for a refresh is a span of the call that caused it, and carries its trace."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    URLLib3Instrumentor().instrument(tracer_provider=provider)
    try:
        with provider.get_tracer("test").start_as_current_span("view") as view:
            refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", ago=60), cache=TokenCache())
    finally:
        URLLib3Instrumentor().uninstrument()
    post, _ = exporter.get_finished_spans()
    assert (post.name, post.parent.span_id) == ("POST", view.get_span_context().span_id)
    assert format(view.get_span_context().trace_id, "032x") in kuzzle.requests[-1].headers["traceparent"]


def test_structlog(kuzzle):
    """What structlog keeps in context variables is there when an event is told."""
    seen = []
    cache = TokenCache(on_event=lambda event: seen.append((structlog.contextvars.get_contextvars(), event.outcome)))
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", ago=60), cache=cache)
    assert seen == [({"request_id": "r-1"}, "refreshed")]
