"""Tokens on every request that ``requests`` sends: KuzzleAuth and CircleAuth."""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar
from urllib.parse import urljoin, urlsplit

import attrs
import requests
from requests.auth import AuthBase
from requests.exceptions import UnrewindableBodyError
from requests.utils import rewind_body

from . import _circle, _kuzzle
from ._api import Seconds, api_key_or_default, cache_of, circle_credential, kuzzle_credential
from ._cache import SHARED_CACHE, Credential, TokenCache
from ._checks import Checks
from ._wire import instant_of, json_object
from .errors import SignInRequiredError
from .stores import mutex
from .tokens import KuzzleToken, UserToken, claims, duration, instant, subject

# How long an error may be to be read.
_LARGEST_BODY = 1024 * 1024

_Token = TypeVar("_Token", bound=KuzzleToken | UserToken)


class _Followed(Protocol):
    """What we need of a call, whichever service's it is."""

    @property
    def provider(self) -> str:
        """``"kuzzle"`` or ``"circle"``."""

    def following(self, last: Any, /) -> Self:
        """Say the same of a token that has come of this call."""


_Call = TypeVar("_Call", bound=_Followed)

# How many seconds our clock is behind an origin's, at least. If it is ahead, tokens are refreshed early.
_behind: dict[tuple[str, str | None, int | None], float] = {}


def _origin(url: str | None) -> tuple[str, str | None, int | None]:
    """Tell what has to be the same for a token to be sent: scheme, host and port."""
    parts = urlsplit(url or "")
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class _Auth(AuthBase, abc.ABC, Generic[_Call, _Token]):
    """What both have in common: the credential they began with or its last known successor, and what to do."""

    _names: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        check: Checks,
        url: str,
        call: _Call | None,
        *,
        timeout: Seconds,
        cache: TokenCache | None,
        session: requests.Session | None,
        on_refresh: Callable[[_Token], object] | None,
    ) -> None:
        self._origin = _origin(url)
        self._call: _Call | None = call
        self._timeout = check.seconds("timeout", timeout)
        self._cache = cache_of(check, cache, TokenCache())
        self._session = check.session("session", session)
        if on_refresh is not None and not callable(on_refresh):
            check.fail("on_refresh", "must be a function, or None")
        self._on_refresh: Callable[[_Token], object] | None = on_refresh
        self._unsaved: _Token | None = None

    @abc.abstractmethod
    def _credential(self, call: _Call) -> Credential[_Token]: ...

    @abc.abstractmethod
    def _headers(self, call: _Call) -> dict[str, str]:
        """Write down what a request carries."""

    @abc.abstractmethod
    def _held(self, call: _Call, now: float) -> tuple[_Token, float] | None:
        """Tell what is known of a token that was never refreshed here: see `Credential`."""

    @abc.abstractmethod
    def _refuses(self, status: int, body: Mapping[str, object]) -> bool | None:
        """Tell whether an error means that the token is no good. None: it may."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if _origin(request.url) == self._origin and (call := self._current()) is not None:
            request.headers.update(self._headers(call))
            request.register_hook("response", self._on_response)  # type: ignore[no-untyped-call]
        return request

    def _current(self, refused: Mapping[str, str | None] | None = None) -> _Call | None:
        """Get what to send: the last successor, but not what the headers *refused* carried."""
        call = self._call
        if call is None:
            return None
        arguments = (type(self), call)
        token: _Token | None = self._cache.answer(arguments) if refused is None else None
        if token is None:
            held = self._held(call, time.time() + _behind.get(self._origin, 0.0))
            if held is not None and held[1] == math.inf:
                return call
            credential = self._credential(call)
            if refused is None:
                credential = attrs.evolve(credential, held=held)
            else:
                credential = attrs.evolve(
                    credential, refused=lambda token: self._headers(call.following(token)) == refused
                )
            token = self._cache.last(credential, self._timeout, arguments=arguments)
        following = call.following(token)
        with mutex:
            # Is it news, and was no other set meanwhile?
            if self._headers(following) != self._headers(call) and self._call is call:
                self._call, self._unsaved = following, token
        self._save()
        return following

    def _save(self) -> None:
        """Hand a new token over, once, unless that fails: then it's handed over again with the next request."""
        with mutex:
            unsaved, self._unsaved = self._unsaved, None
        if unsaved is None or self._on_refresh is None:
            return
        try:
            self._on_refresh(unsaved)
        except BaseException:
            with mutex:
                self._unsaved = self._unsaved or unsaved
            raise

    def _on_response(self, response: requests.Response, **settings: Any) -> requests.Response:
        sent = response.request
        if _origin(sent.url) != self._origin:
            return response
        date = instant_of(response.headers.get("Date", ""))
        if date is not None:
            _behind[self._origin] = max(_behind.get(self._origin, 0.0), date - time.time())
        refused = self._is_refused(response)
        if refused is not False:
            response = self._again(response, settings, sure=refused is True)
        if response.is_redirect and _target(response) != self._origin:
            # What follows a redirect is a copy of what was sent, and requests takes off less than it should.
            for name in self._names:
                sent.headers.pop(name, None)
        return response

    def _is_refused(self, response: requests.Response) -> bool | None:
        if response.status_code < 400 or _is_too_long(response):
            return False
        return self._refuses(response.status_code, json_object(response.content))

    def _again(
        self, response: requests.Response, settings: Mapping[str, Any], *, sure: bool
    ) -> requests.Response:
        """Send a request that was refused once more, if there is another token for it."""
        sent = response.request
        refused = {name: sent.headers.get(name) for name in self._names}
        call = self._current(refused)
        if call is None:
            return response
        if self._headers(call) != refused:
            if not isinstance(sent.body, (bytes, str, type(None))):
                try:
                    rewind_body(sent)
                except UnrewindableBodyError:  # a generator, a pipe
                    return response
            sent.headers.update(self._headers(call))
            response.close()
            answer: requests.Response = response.connection.send(sent.copy(), **settings)
            answer.history.append(response)
            response, sure = answer, self._is_refused(answer) is True
        if sure:
            response.close()
            status, service = response.status_code, call.provider.title()
            raise SignInRequiredError(
                f"{service} refuses the newest token there is: sign in again ({status})",
                provider=call.provider,
                status=status,
            )
        return response


def _is_too_long(response: requests.Response) -> bool:
    """Tell whether an answer says that it's longer than any error."""
    try:
        return int(response.headers.get("Content-Length", 0)) > _LARGEST_BODY
    except ValueError:
        return False


def _target(response: requests.Response) -> object:
    """Tell where a redirect leads."""
    try:
        url = urljoin(response.url, response.headers["Location"])
        return _origin(requests.Request("GET", url).prepare().url)
    except ValueError:
        return None


class KuzzleAuth(_Auth[_kuzzle.Call, KuzzleToken]):
    """
    Sends a Kuzzle token with every request, and refreshes it in time.

    For ``auth=`` of ``requests``. The token goes to the origin of *url* alone (scheme, host and port), also
    after redirects. It's used as it is while it lives, and refreshed when it is about to expire, once for all
    threads and processes that share *cache*. If Kuzzle refuses it nevertheless (401), its successor or a new
    one is tried, once. A body that can't be read twice is not sent again: then the answer is the 401, and the
    next request has the new token.

    Args:
        url: Where Kuzzle answers.
        jwt: The user's token. None: nobody has signed in, and requests are anonymous.
        expires_in: How long new tokens live: see `refresh_kuzzle_token`, as for the other arguments.
        trigger_events: Sent with refreshes.
        strategy: The authentication strategy that is asked first.
        queuable: Whether a refresh waits out downtime.
        timeout: Seconds that a refresh may take.
        cache: Remembers who succeeded whom. None: one that only this object has.
        session: What refreshes are sent with. It may be the one that has this object for its ``auth``.
        on_refresh: Called with each new token, by the request that needs it, before that is sent. If it raises,
            so does the request. Nothing is lost, and it's called again by the next request.

    Raises:
        InvalidArgumentError: An argument is wrong.
        SignInRequiredError: Raised by requests: the session has ended, its newest token was refused.
        RefreshError: Raised by requests that need a refresh, if that fails in another way.

    Example:
        >>> from refresher.testing import FakeKuzzle
        >>> with FakeKuzzle() as kuzzle:
        ...     auth = KuzzleAuth(kuzzle.url, kuzzle.login("foo", ago=1800))
        ...     me = requests.get(f"{kuzzle.url}/_me", auth=auth).json()
        >>> me["result"]["_id"]
        'foo'
    """

    _names = ("Authorization",)

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
        check = _kuzzle.check
        self._queuable = check.flag("queuable", queuable)
        self._nobody = _kuzzle.prepare(
            url=url,
            jwt="none",
            expires_in=expires_in,
            cookie_auth=False,
            trigger_events=trigger_events,
            strategy=strategy,
        )
        super().__init__(check, url, None, timeout=timeout, cache=cache, session=session, on_refresh=on_refresh)
        self.jwt = jwt

    @property
    def jwt(self) -> str | None:
        """
        The user's token, or its last known successor. None: nobody has signed in.

        Set it when a user signs in, and to None when they sign out. That changes what is sent from here, and
        nothing at Kuzzle: to end the session, ``POST /_logout`` first.
        """
        call = self._call
        if call is None:
            return None
        token = self._cache.known(self._credential(call))
        return call.jwt if token is None else token.jwt

    @jwt.setter
    def jwt(self, jwt: str | None) -> None:
        call = None if jwt is None else attrs.evolve(self._nobody, jwt=_kuzzle.check.token("jwt", jwt))
        with mutex:
            self._call, self._unsaved = call, None

    def _credential(self, call: _kuzzle.Call) -> Credential[KuzzleToken]:
        return kuzzle_credential(call, session=self._session, queuable=self._queuable)

    def _headers(self, call: _kuzzle.Call) -> dict[str, str]:
        return {"Authorization": f"Bearer {call.jwt}"}

    def _held(self, call: _kuzzle.Call, now: float) -> tuple[KuzzleToken, float] | None:
        known = claims(call.jwt)
        kuid = subject(call.jwt) or "unknown"
        if "exp" not in known:  # an API key, or infinite: neither can be refreshed
            return KuzzleToken(kuid, call.jwt, None, None), math.inf
        left = known["exp"] - now
        ttl = duration(1000 * (known["exp"] - known.get("iat", now)))
        return KuzzleToken(kuid, call.jwt, instant(1000 * known["exp"]), ttl), left

    def _refuses(self, status: int, body: Mapping[str, object]) -> bool | None:
        error = body.get("error")
        if status == 401 and not isinstance(error, dict):
            return None  # Kuzzle itself did not write this, or the request was a HEAD
        return status == 401 and isinstance(error, dict) and error.get("id") in _kuzzle.STALE


class CircleAuth(_Auth[_circle.Call, UserToken]):
    """
    Sends the API key and a user token with every request to Circle, and refreshes that in time.

    For ``auth=`` of ``requests``. Both go to the origin of *base_url* alone (scheme, host and port), also after
    redirects. The user token is used as it is while it lives, if it's a JWT that tells, and refreshed when it
    is about to expire, once for all threads and processes that share *cache*. If Circle refuses it nevertheless
    (155103, 155104, 155105), its successor or a new one is tried, once. A body that can't be read twice is not
    sent again: then the answer is the refusal, and the next request has the new token.

    Args:
        refresh_token: See `refresh_user_token`, as for the other arguments.
        device_id: The device that the user signed in on.
        user_token: The last user token of the pair. Give this or *user_id*.
        user_id: The user's id at Circle.
        api_key: Your API key. None: the environment variable ``CIRCLE_WEB3_API_KEY``.
        base_url: Where Circle answers.
        retry: Whether a refresh tries again after failures.
        timeout: Seconds that a refresh may take.
        cache: Remembers who succeeded whom. None: one that only this object has.
        session: What refreshes are sent with.
        on_refresh: Called with each new pair, by the request that needs it, before that is sent. If it raises,
            so does the request. Nothing is lost, and it's called again by the next request.

    Raises:
        InvalidArgumentError: An argument is wrong.
        SignInRequiredError: Raised by requests: the session has ended, its newest token was refused.
        RefreshError: Raised by requests that need a refresh, if that fails in another way.
    """

    _names = ("Authorization", "X-User-Token")

    def __init__(
        self,
        *,
        refresh_token: str,
        device_id: str,
        user_token: str | None = None,
        user_id: str | None = None,
        api_key: str | None = None,
        base_url: str = _circle.BASE_URL,
        retry: bool = True,
        timeout: Seconds = 30.0,
        cache: TokenCache | None = SHARED_CACHE,
        session: requests.Session | None = None,
        on_refresh: Callable[[UserToken], object] | None = None,
    ) -> None:
        check = _circle.check
        self._retry = check.flag("retry", retry)
        call = _circle.prepare(
            base_url=base_url,
            api_key=api_key_or_default(api_key),
            user_token=user_token,
            user_id=user_id,
            refresh_token=refresh_token,
            device_id=device_id,
        )
        super().__init__(
            check, base_url, call, timeout=timeout, cache=cache, session=session, on_refresh=on_refresh
        )

    def _credential(self, call: _circle.Call) -> Credential[UserToken]:
        return circle_credential(call, cache=self._cache, session=self._session, retry=self._retry)

    def _headers(self, call: _circle.Call) -> dict[str, str]:
        return {"Authorization": f"Bearer {call.api_key}", "X-User-Token": call.who}

    def _held(self, call: _circle.Call, now: float) -> tuple[UserToken, float] | None:
        exp = claims(call.user_token or "").get("exp")
        if call.user_token is None or exp is None:
            return None
        return UserToken(call.user_token, None, None, call.refresh_token, instant(1000 * exp)), exp - now

    def _refuses(self, status: int, body: Mapping[str, object]) -> bool:  # noqa: ARG002
        return body.get("code") in _circle.STALE
