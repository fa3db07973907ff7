"""Tokens on every request that ``requests`` sends: KuzzleAuth and CircleAuth."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar, Generic, TypeVar, overload
from urllib.parse import urlsplit

import attrs
import requests
from requests.auth import AuthBase
from requests.exceptions import UnrewindableBodyError
from requests.utils import rewind_body
from urllib3.util import parse_url

from ._cache import SHARED_CACHE, TokenCache
from ._checks import Checks, Seconds, origin_of
from ._ledger import Call
from ._notebook import Printer, as_html, as_text
from ._system import threadless
from ._text import Secret, fingerprint, hide_all, json_object, read_date, reveal
from .errors import SignInRequiredError, UnavailableError
from .services import Credential, Headers, circle, kuzzle
from .tokens import KuzzleToken, UserToken

# How long an error may be to be read.
_LARGEST_BODY = 1024 * 1024
# Where a redirect leads that names no host, however that is read.
_HERE = re.compile(r"(?!//)(?![^/?#]*:)[!-\[\]-~]*")

_Token = TypeVar("_Token", bound=KuzzleToken | UserToken)


@attrs.frozen
class _Ready(Generic[_Token]):
    """What the last request carried, and the call that it came from."""

    call: Call[_Token]
    credential: Credential[_Token]
    headers: Headers


@attrs.define(eq=False)
class _SignIn(Generic[_Token]):
    """What one sign-in leads to. The next one has another, so what comes late of this one cannot harm that."""

    credential: Credential[_Token] | None
    unsaved: _Token | None = None
    chain: str | None = None  # its key


class Auth(AuthBase, Generic[_Token]):
    """Sends the last successor of a credential. *_carried*: the names of the headers that have it."""

    _carried: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        check: Checks,
        url: str,
        credential: Credential[_Token] | None,
        retry: bool,
        timeout: Seconds,
        cache: TokenCache | None,
        session: requests.Session | None,
        on_refresh: Callable[[_Token], object] | None,
    ) -> None:
        check.need(isinstance(reveal(cache), TokenCache | None), "cache", "must be a TokenCache or None")
        check.need(on_refresh is None or callable(reveal(on_refresh)), "on_refresh", "must be a function, or None")
        self._origin, self._service = origin_of(url), check.provider
        # What begins like this goes to the origin, whoever parses it: the host ends at the slash.
        scheme, _, rest = url.partition("://")
        self._prefix = f"{scheme}://{rest.partition('/')[0]}/"
        own, seconds = check.session("session", session), check.seconds("timeout", timeout)
        self._call = functools.partial(Call[_Token], session=own, retry=retry, timeout=seconds, own_will_do=True)
        self._cache = TokenCache() if cache is None else reveal(cache)
        self._on_refresh: Callable[[_Token], object] | None = reveal(on_refresh)
        self._set(credential)

    @property
    def _scope(self) -> str:
        return self._credential.scope if self._credential else ""

    @property
    def _credential(self) -> Credential[_Token] | None:
        return self._find(self._sign_in)

    def _find(self, sign_in: _SignIn[_Token]) -> Credential[_Token] | None:
        """Return what a sign-in has led to. It may have been idle for days, while others refreshed the session."""
        credential = sign_in.credential
        if credential is not None and sign_in.chain is not None:
            self._cache._ledger.connect(credential, sign_in.chain)
        return credential

    def _set(self, credential: Credential[_Token] | None) -> None:
        self._sign_in = _SignIn(credential)
        self._ready: _Ready[_Token] | None = None
        if credential is not None:
            self._cache._ledger.observed.see(credential.keys[-1])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._rows().items())})"

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._rows())

    def _repr_pretty_(self, printer: Printer, cycle: bool) -> None:  # noqa: ARG002
        printer.text(as_text(type(self).__name__, self._rows()))

    def _rows(self) -> dict[str, str]:
        """List what people see of it: whose token it sends where, and how long that is valid."""
        if "_sign_in" not in vars(self):  # in the middle of a complaint about an argument
            return {}
        scheme, host, port = self._origin
        rows = {"origin": f"{scheme}://{host}:{port}", "user": "nobody"}
        if (first := self._credential) is None:
            return rows
        ledger = self._cache._ledger
        newest, left, _, _ = ledger.assess(ledger.recall(first)[0], self._call(credential=first))
        last = newest or first.unspent() or first
        rows |= {"user": last.user or "unknown", "fingerprint": fingerprint(last.secret.reveal())}
        seconds = left.least if first.can_expire else math.inf
        known = "unknown" if newest is None else str(timedelta(seconds=int(max(0.0, min(seconds, 1e9)))))
        return rows | {"time_left": "unlimited" if seconds == math.inf else known}

    def sign_out(self) -> None:
        """
        End the session: at Kuzzle, with its newest token, and then in the cache and its store.

        A refresh under way is waited for, in other processes too. A session that has ended already is fine, and so is
        that nobody has signed in. Circle has no sign-out: there the session is forgotten, and its tokens expire. An API
        key is no session, and stays good.

        Afterwards this object's requests are anonymous, unless somebody has signed in meanwhile.

        Raises:
            UnavailableError: The service or the store could not be reached. The session may live on: call again.
            OutcomeUnknownError: Time was up, and the sign-out goes on: call again.
            RefreshError: Something else answered. The session may live on.
        """
        sign_in = self._sign_in
        if (credential := self._find(sign_in)) is not None:
            self._cache._sign_out(self._call(credential=credential))
            sign_in.credential = sign_in.unsaved = None

    def __getstate__(self) -> dict[str, object]:
        first = self._credential
        if first is not None:  # else a copy in another process might begin with a token that is spent
            self._follow(self._sign_in, first, self._cache._ledger.recall(first)[0].newest or first)
        return {**vars(self), "_ready": None}

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Put the newest token on a request, if it goes to the service. `requests` calls this."""
        sign_in = self._sign_in
        if not self._is_for_us(request.url):
            logging.getLogger("refresher").debug("no token for a request that does not go to %s", self._prefix)
        elif (headers := self._headers()) is not None:
            for name, value in headers.items():
                request.headers[name] = reveal(value)
            self._leave_cookie_out(request)
            request.hooks["response"].append(functools.partial(self._on_response, sign_in))
        return request

    def _leave_cookie_out(self, request: requests.PreparedRequest) -> None:
        """Leave out what the service does not accept beside a token."""

    @property
    def _cost(self) -> int:
        """How many requests a refresh is, at most: a user's id is exchanged for a user token first."""
        credential = self._credential
        return 2 if isinstance(credential, circle.CircleCredential) and credential.user_token is None else 1

    @property
    def _is_young(self) -> bool:
        """Whether its token may have been issued within this second, so that it is not refreshed yet."""
        ledger, first = self._cache._ledger, self._credential
        if first is None:
            return False
        chain = ledger.recall(first)[0]
        return ledger.hold(chain.newest or first, chain) > 0

    def _newest(self) -> Credential[_Token] | None:
        """Return its newest known credential."""
        newest = self._credential
        with contextlib.suppress(UnavailableError):  # the store hangs, and the process knows nothing
            return newest and self._cache._find_out(self._cache._peek, newest, self._call(credential=newest))
        return newest

    def _is_due(self, *, by_store: bool) -> bool | None:
        """
        Whether its token is to be refreshed, by what the store has, or without it. None if nobody has signed in.

        Raises:
            UnavailableError: The store could not be read, and this process knows nothing of the session.
        """
        first = self._credential
        if first is None or not first.can_expire:
            return None if first is None else False
        cache, call = self._cache, self._call(credential=first)
        return cache._find_out(cache._is_due, call, call) if by_store else cache._is_due(call, by_store=False)

    def _is_for_us(self, url: str | None) -> bool:
        return (url is not None and url.startswith(self._prefix)) or _goes_to(url, self._origin)

    def _stays(self, location: str) -> bool:
        """Whether a redirect leads to the same origin for sure. If it does after all, a 401 there brings the token."""
        return _HERE.fullmatch(location) is not None or self._is_for_us(location)

    def _headers(self) -> Headers | None:
        """Return the headers to send: those of the last time, if that takes no more than a look."""
        ready, sign_in = self._ready, self._sign_in
        is_last = ready is not None and ready.credential is sign_in.credential and sign_in.unsaved is None
        if ready is not None and is_last and self._cache._ledger.hit(ready.call):
            return ready.headers
        current = self._current(sign_in)
        return None if current is None else current.headers

    def _current(self, sign_in: _SignIn[_Token], rejected: Headers | None = None) -> Credential[_Token] | None:
        """Return what to send: the last successor, but not what the headers *rejected* carried."""
        sender = vars(self._call.keywords["session"] or self).get("send", requests.Session.send)
        # requests-mock has a lock until the response to a request is read: it would stop other threads.
        before = threadless.set(rejected is not None and str(sender.__module__).startswith("requests_mock."))
        try:
            last = self._advance(sign_in, rejected)
        finally:
            threadless.reset(before)
        self._hand_over()
        return last

    def _advance(
        self,
        sign_in: _SignIn[_Token],
        rejected: Headers | None = None,
        *,
        patient: bool = False,
        is_unwanted: Callable[[], bool] | None = None,
    ) -> Credential[_Token] | None:
        """Find the last successor."""
        first = self._find(sign_in)
        if first is None or not (first.can_expire or (rejected is not None and first.token)):
            return first  # that one of Kuzzle's which is without end is over is found out by a refresh
        call = self._call(credential=first, rejected=rejected, patient=patient, is_unwanted=is_unwanted)
        last = self._follow(sign_in, first, self._cache._get(call))
        self._ready = _Ready(call, last, last.headers)
        return last

    def _follow(
        self, sign_in: _SignIn[_Token], first: Credential[_Token], newest: Credential[_Token]
    ) -> Credential[_Token]:
        """Go on with the newest token of a sign-in."""
        last = first if newest.keys[-1] == first.keys[-1] else first.following(newest.token)
        sign_in.chain = self._cache._ledger.recall(first)[0].key
        if last is not first and sign_in.credential is first:
            sign_in.credential, sign_in.unsaved = last, last.token
        return last

    def _hand_over(self) -> None:
        """Hand a new token over, once, unless that fails: then it's handed over again with the next request."""
        sign_in = self._sign_in
        unsaved, sign_in.unsaved = sign_in.unsaved, None
        if unsaved is None or self._on_refresh is None:
            return
        try:
            self._on_refresh(unsaved)
        except BaseException:
            sign_in.unsaved = sign_in.unsaved or unsaved
            raise

    def _on_response(self, sign_in: _SignIn[_Token], response: requests.Response, **settings: Any) -> requests.Response:
        (settings,) = hide_all(settings)  # a proxy's URL may have a password
        sent, credential = response.request, sign_in.credential
        if not self._is_for_us(sent.url):
            return response
        if credential is not None:
            # Else a proxy may have written it, or kept it. So does requests-cache.
            is_kept = "Age" in response.headers or getattr(response, "from_cache", False)
            if response.status_code < 500 and not is_kept:
                date, took = read_date(response.headers.get("Date")), response.elapsed.total_seconds()
                self._cache._ledger.observed.learn(credential.scope, date, took)
            rejected, now = self._is_rejected(response, credential), self._sign_in
            user = now.credential.user if now.credential else None
            if rejected is not False and (now is sign_in or None is not user == credential.user):
                response = self._again(now, response, credential, settings, sure=rejected is True)
        if response.is_redirect and not self._stays(response.headers["Location"]):
            # What follows a redirect is a copy of what was sent, and requests takes off less than it should.
            for name in self._carried:
                sent.headers.pop(name, None)
        return response

    @staticmethod
    def _is_rejected(response: requests.Response, credential: Credential[_Token]) -> bool | None:
        if response.status_code < 400 or _is_too_long(response):
            return False
        is_rejected = credential.is_rejected(response.status_code, json_object(response.content))
        return is_rejected if is_rejected or credential.can_expire else False

    def _again(
        self,
        sign_in: _SignIn[_Token],
        response: requests.Response,
        credential: Credential[_Token],
        settings: Any,
        *,
        sure: bool,
    ) -> requests.Response:
        """Send a request that was rejected once more for each newer token that there is."""
        sent = response.request  # not that of later answers: who replays them keeps no secrets
        rejected: Headers = {name: Secret(sent.headers.get(name, "")) for name in credential.headers}
        while True:
            current = self._current(sign_in, rejected)
            if current is None or (current.headers == rejected and not sure):
                return response
            if current.headers == rejected:
                response.close()
                status, service = response.status_code, current.service.title()
                raise SignInRequiredError(
                    f"{service} refused the newest token that is known: sign in again ({status})",
                    provider=current.service,
                    status=status,
                )
            if not isinstance(sent.body, (bytes, bytearray, memoryview, str, type(None))):
                try:
                    rewind_body(sent)
                except UnrewindableBodyError:  # a generator, a pipe
                    return response
            for name, value in current.headers.items():
                sent.headers[name] = reveal(value)
            response.close()
            answer: requests.Response = response.connection.send(sent.copy(), **settings.reveal())
            answer.history = [*response.history, response]
            response, rejected, sure = answer, current.headers, True
            if not self._is_rejected(answer, current):
                return answer


def _is_too_long(response: requests.Response) -> bool:
    """Whether an answer says that it is longer than any error."""
    try:
        return int(response.headers.get("Content-Length", 0)) > _LARGEST_BODY
    except ValueError:
        return False


def _goes_to(url: str | None, origin: object) -> bool:
    """Whether requests would connect to an origin for a URL. Where parsers may differ about that, it does not."""
    try:
        if url is None or "\\" in url or "@" in urlsplit(url).netloc:
            return False
        target = parse_url(url)
        return origin_of(url) == origin == origin_of(f"{target.scheme}://{target.netloc}")
    except ValueError:  # urllib3's complaints are of this kind too
        return False


class KuzzleAuth(Auth[KuzzleToken]):
    """
    Sends a Kuzzle token with every request, and refreshes it in time. Use it as ``auth=`` of ``requests``.

    The token is sent as it is while it is valid, and refreshed when it is about to expire, once for all threads and
    processes that share *cache*. It goes to the origin of *url* only (scheme, host and port), also after redirects. If
    Kuzzle refuses it (401), the request is sent again with its successor or a new one. That is impossible if the
    body cannot be read twice: then you get the 401, and the next request has the new token.

    Args:
        url: Where Kuzzle answers.
        jwt: The user's token. None means that nobody has signed in: requests are anonymous.
        expires_in: How long new tokens are valid: see `refresh_kuzzle_token`, also for the other arguments.
        trigger_events: Sent with refreshes.
        strategy: The authentication strategy that is asked first.
        queuable: Whether a refresh tries again after downtime.
        timeout: How many seconds a refresh may take. In a web view, make it a few seconds.
        cache: Remembers the newest token of each chain. None means a cache of this object's own.
        session: What refreshes are sent with. It may be the one whose ``auth`` this object is.
        on_refresh: Called with each new token by the request that needs it, before that is sent. If it raises, the
            request raises the same, the token is kept, and the next request calls it again.

    Raises:
        InvalidArgumentError: An argument is wrong.
        SignInRequiredError: Raised by requests. The session has ended: its newest token was refused. Set `jwt` to None
            before you send a new sign-in with this object, or that is not sent either.
        RefreshError: Raised by requests that need a refresh which fails in another way.

    Example:
        >>> from refresher.testing import FakeKuzzle
        >>> with FakeKuzzle() as kuzzle:
        ...     auth = KuzzleAuth(kuzzle.url, kuzzle.login("foo", ago=1800))
        ...     me = requests.get(f"{kuzzle.url}/_me", auth=auth).json()
        >>> me["result"]["_id"]
        'foo'
    """

    _carried = ("Authorization",)

    def __init__(
        self,
        url: str,
        jwt: str | None = None,
        *,
        expires_in: str | timedelta | None = None,
        trigger_events: bool = False,
        strategy: str | None = None,
        queuable: bool = True,
        timeout: Seconds = 30.0,
        cache: TokenCache | None = SHARED_CACHE,
        session: requests.Session | None = None,
        on_refresh: Callable[[KuzzleToken], object] | None = None,
    ) -> None:
        url, jwt, expires_in, trigger_events, strategy = hide_all(url, jwt, expires_in, trigger_events, strategy)
        queuable, timeout, cache, session, on_refresh = hide_all(queuable, timeout, cache, session, on_refresh)
        self._anybody = kuzzle.credential(url, Secret("none"), expires_in, trigger_events, strategy)
        retry = kuzzle.check.flag("queuable", queuable)
        super().__init__(kuzzle.check, self._anybody.url, None, retry, timeout, cache, session, on_refresh)
        self.jwt = jwt

    @property
    def jwt(self) -> str | None:
        """
        The user's newest known token. None means that nobody has signed in.

        Set it when a user signs in. To None it may be set as well, which changes nothing at Kuzzle: `sign_out` ends
        the session.
        """
        newest = self._newest()
        return None if newest is None else newest.secret.reveal()

    @jwt.setter
    def jwt(self, jwt: str | None) -> None:
        (jwt,) = hide_all(jwt)
        token = None if jwt is None else kuzzle.credential(self._prefix, jwt).secret
        self._set(None if token is None else attrs.evolve(self._anybody, secret=token))

    def _leave_cookie_out(self, request: requests.PreparedRequest) -> None:
        """Leave out the cookie of a login in cookie mode, which the session may have: Kuzzle takes one or the other."""
        if isinstance(cookies := request.headers.get("Cookie"), str):
            others = [each for each in cookies.split("; ") if each.partition("=")[0] != kuzzle.COOKIE]
            del request.headers["Cookie"]
            if others:
                request.headers["Cookie"] = "; ".join(others)


class CircleAuth(Auth[UserToken]):
    """
    Sends your API key and a user token with every request to Circle, and refreshes the user token in time. Use it as
    ``auth=`` of ``requests``.

    The user token is sent as it is while it is valid (if it is a JWT, which says so), and refreshed when it is about to
    expire, once for all threads and processes that share *cache*. Token and key go to the origin of *base_url* only
    (scheme, host and port), also after redirects. If Circle refuses the token (155103, 155104, 155105), the request is
    sent again with its successor or a new one. That is impossible if the body cannot be read twice: then you get
    the refusal, and the next request has the new token.

    Args:
        refresh_token: See `refresh_user_token`, also for the other arguments.
        device_id: The device that the user signed in on.
        user_token: The user token that came with *refresh_token*. Give this or *user_id*.
        user_id: The user's id at Circle.
        api_key: Your API key. None means the environment variable ``CIRCLE_WEB3_API_KEY``.
        base_url: Where Circle answers.
        retry: Whether a refresh tries again after failures.
        timeout: How many seconds a refresh may take. In a web view, make it a few seconds.
        cache: Remembers the newest pair of each chain. None means a cache of this object's own.
        session: What refreshes are sent with.
        on_refresh: Called with each new pair by the request that needs it, before that is sent. If it raises, the
            request raises the same, the pair is kept, and the next request calls it again.

    Raises:
        InvalidArgumentError: An argument is wrong.
        SignInRequiredError: Raised by requests. The session has ended: its newest token was refused.
        RefreshError: Raised by requests that need a refresh which fails in another way.
    """

    _carried = "Authorization", "X-User-Token"

    @overload
    def __init__(
        self,
        *,
        refresh_token: str,
        device_id: str,
        user_token: str,
        user_id: None = None,
        api_key: str | None = None,
        base_url: str = circle.BASE_URL,
        retry: bool = True,
        timeout: Seconds = 30.0,
        cache: TokenCache | None = SHARED_CACHE,
        session: requests.Session | None = None,
        on_refresh: Callable[[UserToken], object] | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        refresh_token: str,
        device_id: str,
        user_token: None = None,
        user_id: str,
        api_key: str | None = None,
        base_url: str = circle.BASE_URL,
        retry: bool = True,
        timeout: Seconds = 30.0,
        cache: TokenCache | None = SHARED_CACHE,
        session: requests.Session | None = None,
        on_refresh: Callable[[UserToken], object] | None = None,
    ) -> None: ...
    def __init__(
        self,
        *,
        refresh_token: str,
        device_id: str,
        user_token: str | None = None,
        user_id: str | None = None,
        api_key: str | None = None,
        base_url: str = circle.BASE_URL,
        retry: bool = True,
        timeout: Seconds = 30.0,
        cache: TokenCache | None = SHARED_CACHE,
        session: requests.Session | None = None,
        on_refresh: Callable[[UserToken], object] | None = None,
    ) -> None:
        refresh_token, device_id, user_token, user_id = hide_all(refresh_token, device_id, user_token, user_id)
        api_key, base_url, retry, timeout = hide_all(api_key, base_url, retry, timeout)
        cache, session, on_refresh = hide_all(cache, session, on_refresh)
        key = circle.default_api_key(api_key)
        credential = circle.credential(refresh_token, device_id, key, user_token, user_id, base_url)
        retry = circle.check.flag("retry", retry)
        super().__init__(circle.check, credential.base_url, credential, retry, timeout, cache, session, on_refresh)
