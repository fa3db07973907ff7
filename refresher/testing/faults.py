"""
What can go wrong between a client and a service, one fault at a time.

`FAULTS` maps the name of each fault to a `Fault`. A test that takes all of them sees what your code does
when things go wrong::

    @pytest.mark.parametrize("fault", FAULTS)
    def test_my_view(fault, client, fake_kuzzle):
        sign_in(client, fake_kuzzle.login("foo", ago=3590))  # the token is about to expire
        fake_kuzzle.suffer(fault)
        assert client.get("/profile").status_code < 500

Example:
    >>> from refresher import UnavailableError, refresh_kuzzle_token
    >>> from refresher.testing import FAULTS, FakeKuzzle
    >>> with FakeKuzzle() as kuzzle:
    ...     jwt = kuzzle.login("foo", ago=1800)
    ...     kuzzle.suffer("busy")
    ...     try:
    ...         refresh_kuzzle_token(kuzzle.url, jwt, queuable=False)
    ...     except UnavailableError as error:
    ...         print(error.status, kuzzle.knows(jwt))
    429 True
    >>> print(FAULTS["busy"].description, FAULTS["busy"].spends)
    The service answers 429: too many requests. False
    >>> print(*(name for name, fault in FAULTS.items() if not fault.spends))
    reset down refused busy busy_retry_after unavailable error bad_gateway redirect portal
"""

from __future__ import annotations

import abc
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import attrs

from .._text import masked
from ..tokens import KuzzleToken, UserToken
from .server import Answer, Clock, Received, Server


def check_known(name: str, value: object, known: Iterable[object]) -> None:
    """Complain about the argument *name*, unless its value is one of those that are known."""
    known = list(known)
    if value not in known:
        raise ValueError(f"no such {name}: {value!r}. There are: {', '.join(map(str, known))}")


def jwt_of(token: str | KuzzleToken) -> str:
    """
    Return the token itself.

    Raises:
        ValueError: It is that of cookie mode.
    """
    if not isinstance(token, KuzzleToken):
        return token
    if token.jwt is None:
        raise ValueError("in cookie mode the token is in the cookie: pass the cookie's value")
    return token.jwt


class Fake(Server):
    """A service that fails when it is told to, and counts what was refreshed."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__(clock)
        self._recipient: str | None = None  # whose answer a request gets, if not its own user's
        self._spent: Counter[str] = Counter()

    def suffer(self, fault: str | Fault, times: int = 1) -> None:
        """Let the next request, or the next *times*, suffer a fault: one of `FAULTS`, or its name."""
        if not isinstance(fault, Fault):
            check_known("fault", fault, FAULTS)
            fault = FAULTS[fault]
        for _ in range(times):
            fault.apply(self)

    def lose_next(self, times: int = 1) -> None:
        """Do what the next requests ask for, and hang up without an answer."""
        self.suffer("lost", times)

    def reset_next(self, times: int = 1) -> None:
        """Reset the connections of the next requests, and do nothing for them."""
        self.suffer("reset", times)

    def delay_next(self, seconds: float, times: int = 1) -> None:
        """Answer the next requests *seconds* late."""
        self.next_answers.extend([lambda request: self.truly(request, after=seconds)] * times)

    def drip_next(self, seconds: float, times: int = 1) -> None:
        """Answer the next requests byte by byte, *seconds* apart."""
        self.next_answers.extend([lambda request: attrs.evolve(self.truly(request), pace=seconds)] * times)

    def assert_spent_once(self, token: str | KuzzleToken | UserToken) -> None:
        """
        Fail unless exactly one request refreshed a token.

        A refused request is none, nor is one that got an earlier answer again because it carried the same
        idempotency key. For Circle the token is a refresh token, or the pair it belongs to.

        Raises:
            AssertionError: It says how often the token was refreshed, and not what the token is.
        """
        __tracebackhide__ = True  # pytest shows the line of the test instead
        if isinstance(token, UserToken):
            token = token.refresh_token
        token = jwt_of(token)
        times = self._spent[token]
        if times != 1:
            how_often = f"refreshed {times} times, not once" if times else "never refreshed"
            raise AssertionError(f"{masked(token)} was {how_often}")

    def truly_for(self, recipient: str, request: Received) -> Answer:
        """Do what a request asks for, and give it the answer that belongs to another user."""
        with self._lock:
            self._recipient = recipient
            try:
                return self._answer(request)
            finally:
                self._recipient = None

    @abc.abstractmethod
    def refuse(self, request: Received, why: str) -> Answer:
        """Refuse a request in the service's own words. *why*: "refused", "busy", "unavailable" or "error"."""


@attrs.frozen
class Fault:
    """
    Something that can go wrong with a request.

    Args:
        name: Its name in `FAULTS`.
        description: What happens.
        spends: Whether the service does what it was asked for all the same, so that the token is spent.
        apply: Lets the next request to a fake suffer it.
    """

    name: str
    description: str
    spends: bool
    apply: Callable[[Fake], None] = attrs.field(repr=False)

    def __str__(self) -> str:
        return self.name


_faults: dict[str, Fault] = {}
_Happening = Callable[[Fake, Received], Answer | bytes]


def _fault(description: str, *, spends: bool) -> Callable[[_Happening], _Happening]:
    """List a function that answers a request as a fault."""

    def register(answer: _Happening) -> _Happening:
        def apply(fake: Fake) -> None:
            fake.next_answers.append(functools.partial(answer, fake))

        name = answer.__name__.removeprefix("_")
        _faults[name] = Fault(name, description, spends, apply)
        return answer

    return register


def _page(status: int, title: str, headers: Mapping[str, str] | None = None) -> Answer:
    page = f"<!DOCTYPE html><html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
    return Answer(status, page.encode(), {"Content-Type": "text/html", **(headers or {})})


@_fault("The connection is closed without an answer.", spends=True)
def _lost(fake: Fake, request: Received) -> bytes:
    fake.truly(request)
    return b""


@_fault("The answer comes a second late.", spends=True)
def _late(fake: Fake, request: Received) -> Answer:
    return fake.truly(request, after=1.0)


@_fault("The answer comes byte by byte, for about two seconds.", spends=True)
def _dripping(fake: Fake, request: Received) -> Answer:
    answer = fake.truly(request)
    return attrs.evolve(answer, pace=2.0 / len(answer.to_bytes()))


@_fault("The connection is closed in the middle of the answer.", spends=True)
def _truncated(fake: Fake, request: Received) -> bytes:
    data = fake.truly(request).to_bytes()
    head, _, body = data.partition(b"\r\n\r\n")
    return data[: len(head) + 4 + len(body) // 2]


@_fault("The answer is no JSON, though it says so.", spends=True)
def _garbage(fake: Fake, request: Received) -> Answer:
    return Answer(fake.truly(request).status, b'{"result": {"jw\x00', {"Content-Type": "application/json"})


@_fault("The answer has no body.", spends=True)
def _empty(fake: Fake, request: Received) -> Answer:
    return Answer(fake.truly(request).status, b"")


@_fault("The answer is JSON without a token in it.", spends=True)
def _incomplete(fake: Fake, request: Received) -> Answer:
    return Answer(fake.truly(request).status, {"result": {}, "data": {}})


@_fault("The answer is one that belongs to another user.", spends=True)
def _other_user(fake: Fake, request: Received) -> Answer:
    return fake.truly_for("somebody-else", request)


@_fault("An interim answer (103) comes first, and then the real one.", spends=True)
def _interim(fake: Fake, request: Received) -> bytes:
    return b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n" + fake.truly(request).to_bytes()


@_fault("The service takes too long for the gateway in front of it, which answers 504 in HTML.", spends=True)
def _gateway_timeout(fake: Fake, request: Received) -> Answer:
    fake.truly(request)
    return _page(504, "Gateway Timeout")


@_fault("The connection is reset.", spends=False)
def _reset(fake: Fake, request: Received) -> Answer:  # noqa: ARG001
    return Answer(reset=True)


def _go_down(fake: Fake) -> None:
    fake.pause(0.5)


_faults["down"] = Fault("down", "Connections are refused for half a second.", False, _go_down)


@_fault("The service refuses the token, as if it had expired or been replaced.", spends=False)
def _refused(fake: Fake, request: Received) -> Answer:
    return fake.refuse(request, "refused")


@_fault("The service answers 429: too many requests.", spends=False)
def _busy(fake: Fake, request: Received) -> Answer:
    return fake.refuse(request, "busy")


@_fault("The service answers 429 and says in Retry-After to come back in a second.", spends=False)
def _busy_retry_after(fake: Fake, request: Received) -> Answer:
    answer = fake.refuse(request, "busy")
    return attrs.evolve(answer, headers={**answer.headers, "Retry-After": "1"})


@_fault("The service answers 503: it is overloaded.", spends=False)
def _unavailable(fake: Fake, request: Received) -> Answer:
    return fake.refuse(request, "unavailable")


@_fault("The service answers 500: something went wrong in it.", spends=False)
def _error(fake: Fake, request: Received) -> Answer:
    return fake.refuse(request, "error")


@_fault("The gateway does not reach the service and answers 502 in HTML.", spends=False)
def _bad_gateway(fake: Fake, request: Received) -> Answer:  # noqa: ARG001
    return _page(502, "Bad Gateway")


@_fault("The answer is a redirect (307) to another host. Following it would carry the token there.", spends=False)
def _redirect(fake: Fake, request: Received) -> Answer:  # noqa: ARG001
    return _page(307, "Temporary Redirect", {"Location": "http://stranger.invalid/"})


@_fault("A captive portal answers in the service's place: 200, with a page to sign in to the network.", spends=False)
def _portal(fake: Fake, request: Received) -> Answer:  # noqa: ARG001
    return _page(200, "Welcome to our Wi-Fi")


FAULTS: Mapping[str, Fault] = MappingProxyType(_faults)
"""The faults by name."""
