"""The two calls: refresh_kuzzle_token and refresh_user_token."""

from __future__ import annotations

import os
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, overload

import attrs

from . import _circle, _kuzzle
from ._cache import SHARED_CACHE, Credential, NoCache, TokenCache
from ._checks import Checks
from ._exchange import Patience, exchange, left
from ._wire import new_id
from .errors import RequestRefusedError, SignInRequiredError
from .tokens import KuzzleToken, UserToken

if TYPE_CHECKING:
    import requests

Seconds = float | timedelta | None
_Cache = TypeVar("_Cache")

# How many requests one refresh at Circle may take: a stale exchange, a new key, answers that came too late.
_MOST_STEPS = 5


def refresh_kuzzle_token(
    url: str,
    jwt: str | None = None,
    *,
    expires_in: str | timedelta | None = None,
    cookie_auth: bool = False,
    trigger_events: bool = False,
    strategy: str | None = None,
    queuable: bool = True,
    timeout: Seconds = 30.0,
    cache: TokenCache | None = SHARED_CACHE,
    session: requests.Session | None = None,
) -> KuzzleToken:
    """
    Trade a Kuzzle token for a new one.

    This spends *jwt*: Kuzzle lets it live for one more second, and refuses to refresh it again.

    Args:
        url: Where Kuzzle answers, with the path prefix if there is one: ``"http://localhost:7512"``.
        jwt: The token to trade, with its prefix ``kauth-``. It has to be valid still, and neither an API key
            nor infinite. In cookie mode it may be left out: then it's the ``authToken`` cookie of *session*.
        expires_in: How long the new token lives, at least one second: a string as npm's ``ms`` reads it
            (``"2h"``, ``"1.5 days"``, ``"500000ms"``), or a timedelta. ``"-1"`` means for ever, and that the
            new token cannot be refreshed. None: as long as the server says, whatever the old one had.
        cookie_auth: Cookie mode: the new token goes into the cookie jar of *session* and is None in the result.
        trigger_events: Sent as the JavaScript SDK does; Kuzzle 2 triggers its events either way.
        strategy: The authentication strategy that is asked first. It may choose another lifetime.
        queuable: Whether to wait out Kuzzle's downtime, overload, rate limit and lost answers, as long as
            *timeout* allows. If not, there is one attempt.
        timeout: Seconds, or a timedelta; None or -1: as long as it takes. When it's over, the exchange goes
            on (for a minute, if that's longer), and the next call finds its result in the cache.
        cache: Remembers who succeeded whom. A call with a spent *jwt* gets its last successor, and without a
            request while that is fresh, whatever *expires_in* says. None: each call refreshes its *jwt*, in its
            own thread, and an exchange that takes longer than *timeout*, or is interrupted, is given up.
        session: Connections, proxies, TLS settings, headers and cookies to use. It's yours, and not changed but
            for the ``authToken`` cookie in cookie mode.

    Returns:
        The new token. It's the only one that is good: save it before anything else, or let a cache's store.

    Raises:
        InvalidArgumentError: An argument is wrong. Nothing was sent.
        SignInRequiredError: Kuzzle does not accept the token: it is expired, logged out, or refreshed before,
            which Kuzzle does not tell apart. Or it gave the same token back, as it does within the clock second
            of the token's birth: that one dies a second later (``spent`` is True).
        UnavailableError: Kuzzle is unreachable, busy or starting, or its token store is down. Nothing was
            spent.
        OutcomeUnknownError: The request was sent and no answer came. Kuzzle goes on with a request whose client
            has gone, so the token may be spent.
        RequestRefusedError: The lifetime is over the server's limit, the user may not refresh, the token is an
            API key or infinite, the strategy said no. Nothing was spent.
        ReplyError: Something that is not Kuzzle answered.

    Example:
        >>> from refresher.testing import FakeKuzzle
        >>> with FakeKuzzle() as kuzzle:
        ...     jwt = kuzzle.login("foo", ago=1800)
        ...     token = refresh_kuzzle_token(kuzzle.url, jwt, expires_in="2h")
        >>> print(token.kuid, token.ttl)
        foo 2:00:00
    """
    arguments = (url, jwt, expires_in, trigger_events, strategy, queuable, timeout, type(session))
    if cookie_auth is False and isinstance(cache, TokenCache):
        known: KuzzleToken | None = cache.answer(arguments)
        if known is not None:
            return known
    check = _kuzzle.check
    check.session("session", session)
    jar = session if check.flag("cookie_auth", cookie_auth) else None
    in_cookie = jar is not None and jwt is None
    if cookie_auth and jar is None:
        check.fail("session", "is needed in cookie mode: its cookie jar takes the new token")
    if jar is not None and jwt is None:
        from ._http import find_cookie

        jwt = find_cookie(jar, check.url("url", url, https=False), _kuzzle.COOKIE)
    if jwt is None:
        check.fail("jwt", "is missing, and so is an authToken cookie" if in_cookie else "is missing")
    call = _kuzzle.prepare(
        url=url,
        jwt=jwt,
        expires_in=expires_in,
        cookie_auth=cookie_auth,
        trigger_events=trigger_events,
        strategy=strategy,
        in_cookie=in_cookie,
    )
    credential = kuzzle_credential(call, session=session, queuable=check.flag("queuable", queuable))
    seconds = check.seconds("timeout", timeout)
    shared = cache_of(check, cache, NoCache())
    token = shared.last(credential, seconds, arguments=None if jar else arguments)
    if jar is None:
        return token
    from ._http import keep_cookie

    keep_cookie(jar, url, _kuzzle.COOKIE, token.jwt or "")
    return attrs.evolve(token, jwt=None)


def kuzzle_credential(
    call: _kuzzle.Call, *, session: requests.Session | None, queuable: bool
) -> Credential[KuzzleToken]:
    """Put a call and the way to refresh it together."""

    def refresh(last: KuzzleToken | None, patience: Patience) -> KuzzleToken:
        return exchange(
            _kuzzle.build(call if last is None else call.following(last), request_id=new_id()),
            _kuzzle.parse,
            lambda token: token.jwt or "",
            session=session,
            patience=patience,
            retry=queuable,
        )

    return Credential(call=call, refresh=refresh)


@overload
def refresh_user_token(
    *,
    refresh_token: str,
    device_id: str,
    user_token: str,
    user_id: None = None,
    api_key: str | None = None,
    idempotency_key: str | uuid.UUID | None = None,
    request_id: str | uuid.UUID | None = None,
    base_url: str = _circle.BASE_URL,
    retry: bool = True,
    timeout: Seconds = 30.0,
    cache: TokenCache | None = SHARED_CACHE,
    session: requests.Session | None = None,
) -> UserToken: ...
@overload
def refresh_user_token(
    *,
    refresh_token: str,
    device_id: str,
    user_token: None = None,
    user_id: str,
    api_key: str | None = None,
    idempotency_key: str | uuid.UUID | None = None,
    request_id: str | uuid.UUID | None = None,
    base_url: str = _circle.BASE_URL,
    retry: bool = True,
    timeout: Seconds = 30.0,
    cache: TokenCache | None = SHARED_CACHE,
    session: requests.Session | None = None,
) -> UserToken: ...
def refresh_user_token(
    *,
    refresh_token: str,
    device_id: str,
    user_token: str | None = None,
    user_id: str | None = None,
    api_key: str | None = None,
    idempotency_key: str | uuid.UUID | None = None,
    request_id: str | uuid.UUID | None = None,
    base_url: str = _circle.BASE_URL,
    retry: bool = True,
    timeout: Seconds = 30.0,
    cache: TokenCache | None = SHARED_CACHE,
    session: requests.Session | None = None,
) -> UserToken:
    """
    Trade a Circle refresh token for a new user token.

    This spends *refresh_token*: the result brings the one to use next. Give exactly one of *user_token* and
    *user_id*.

    Args:
        refresh_token: The one that came with the last user token, or with the sign-in.
        device_id: The device that the user signed in on.
        user_token: The last user token of the pair, expired or not.
        user_id: The user's id at Circle, 5 to 50 characters. It is exchanged for a user token first. That's the
            way of users with a PIN, and refresh tokens are for those who sign in by e-mail or a social account,
            so Circle may refuse either half: prefer *user_token*. Never take it from a request of an end user:
            with your API key, anybody's id is as good as their password.
        api_key: Your API key. None: the environment variable ``CIRCLE_WEB3_API_KEY``.
        idempotency_key: A UUID v4 that makes a repeated call the same request, which Circle answers as it did
            the first time. None: made of the tokens and the device id, so that it's the same in every process
            that makes this call, also after a crash.
        request_id: A UUID that names the request in Circle's logs. None: a new one.
        base_url: Where Circle answers. Only a loopback address may do without https.
        retry: Whether to try again after failures and lost answers, as long as *timeout* allows. If not, there
            is one attempt.
        timeout: Seconds for it all, or a timedelta; None or -1: as long as it takes. When it's over, the
            exchange goes on (for a minute, if that's longer), and the next call finds its result in the cache.
        cache: Remembers who succeeded whom. A call with a spent pair gets its last successor, without a request
            as long as that is fresh. None: every call refreshes the pair it is given, in its own thread, and an
            exchange that takes longer than *timeout*, or is interrupted, is given up.
        session: Connections, proxies, TLS settings, headers and cookies to use. It's yours, and not changed.

    Returns:
        The new pair. Save it before anything else.

    Raises:
        InvalidArgumentError: An argument is wrong. Nothing was sent.
        SignInRequiredError: Circle knows no such user, or does not accept the tokens any more.
        UnavailableError: Circle is unreachable, busy or throttling. Nothing was spent.
        OutcomeUnknownError: The request was sent and no answer came, or Circle failed. Call again: with the
            same ``idempotency_key`` the lost answer comes back.
        RequestRefusedError: The API key is wrong or may not do this, or Circle finds fault with an argument.
            Nothing was spent.
        ReplyError: Something that is not Circle answered.

    Example:
        >>> from refresher.testing import FakeCircle
        >>> with FakeCircle() as circle:
        ...     old = circle.sign_in("user-1", device_id="device-1")
        ...     new = refresh_user_token(
        ...         user_token=old.user_token, refresh_token=old.refresh_token, device_id="device-1",
        ...         api_key=circle.api_key, base_url=circle.url,
        ...     )
        >>> new.user_id, new.refresh_token == old.refresh_token
        ('user-1', False)
    """
    arguments = (
        *(refresh_token, device_id, user_token, user_id, api_key, idempotency_key, request_id, base_url),
        *(retry, timeout, type(session)),
    )
    if isinstance(cache, TokenCache):
        known: UserToken | None = cache.answer(arguments)
        if known is not None:
            return known
    check = _circle.check
    check.session("session", session)
    call = _circle.prepare(
        base_url=base_url,
        api_key=api_key_or_default(api_key),
        user_token=user_token,
        user_id=user_id,
        refresh_token=refresh_token,
        device_id=device_id,
        idempotency_key=idempotency_key,
        request_id=request_id,
    )
    shared = cache_of(check, cache, NoCache())
    credential = circle_credential(call, cache=shared, session=session, retry=check.flag("retry", retry))
    return shared.last(credential, check.seconds("timeout", timeout), arguments=arguments)


def circle_credential(
    call: _circle.Call, *, cache: TokenCache | NoCache, session: requests.Session | None, retry: bool
) -> Credential[UserToken]:
    """Put a call and the way to refresh it together."""
    fresh: list[str] = []

    def swap(_: object, patience: Patience) -> _circle.Exchanged:
        swapped = exchange(
            _circle.build_exchange(call),
            _circle.parse_exchange,
            lambda swapped: swapped.user_token,
            session=session,
            patience=patience,
            retry=retry,
        )
        fresh.append(swapped.user_token)
        return swapped

    swapping = Credential(call=_circle.Exchange(call), refresh=swap)

    def refresh(last: UserToken | None, patience: Patience) -> UserToken:
        def tell(what: str, _: object) -> None:
            patience.tell(what or "Circle is slow")

        step = call if last is None else call.following(last)
        if cache.is_marked(f"refused {step.idempotency_key}"):
            step = step.with_drawn_key()  # the derived one could bring the refusal back
        for _ in range(_MOST_STEPS):
            user_token = step.user_token
            if user_token is None:
                user_token = cache.last(swapping, left(patience.until), on_wait=tell).user_token
            try:
                pair, is_dead = exchange(
                    _circle.build(step, user_token),
                    _circle.parse,
                    lambda answer: answer[0].refresh_token,
                    session=session,
                    patience=patience,
                    retry=retry,
                )
            except RequestRefusedError as error:
                if error.code != _circle.NEW_KEY or step.key_is_final or not retry:
                    raise
                step = step.with_drawn_key()
            except SignInRequiredError as error:
                cache.mark(f"refused {step.idempotency_key}", 86400)
                if step.user_token is not None or error.code not in _circle.STALE:
                    raise
                cache.drop(swapping.call.key)
                if user_token in fresh or not retry:
                    raise
                step = step.with_drawn_key()
            else:
                if not is_dead:
                    break
                # The answer to an earlier run of this call, which nobody took: it has had its time.
                step = call.following(pair)
        return pair

    return Credential(call=call, refresh=refresh)


def api_key_or_default(api_key: str | None) -> str | None:
    """Take the caller's API key, or that of the environment."""
    return os.environ.get("CIRCLE_WEB3_API_KEY") if api_key is None else api_key


def cache_of(check: Checks, cache: object, otherwise: _Cache) -> TokenCache | _Cache:
    """Take the caller's cache, or what stands in for None."""
    if cache is None:
        return otherwise
    if not isinstance(cache, TokenCache):
        check.fail("cache", "must be a TokenCache or None")
    return cache
