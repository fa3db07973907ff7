"""The two calls: refresh_kuzzle_token and refresh_user_token."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any, overload

import attrs

from . import importing
from ._cache import SHARED_CACHE, TokenCache, current
from ._checks import Seconds
from ._ledger import Call, check_call
from ._text import Secret, hide_all, reveal
from .errors import InvalidArgumentError
from .services import circle, kuzzle
from .tokens import KuzzleToken, UserToken

if TYPE_CHECKING:
    import requests


def _look(cache: Any, *arguments: Any) -> tuple[Call[Any] | BaseException | None, Any]:
    """
    Check the arguments of a call. Return the call, and its answer if that takes no more than a look.

    Secrets are not hidden yet, so this never raises. If something is wrong, there is no call.
    """
    try:
        call = cache._ledger.call(*arguments)
        known = cache._ledger.hit(call)
    except (InvalidArgumentError, TypeError, AttributeError):
        return None, None
    except BaseException as interrupt:  # of a signal handler; raised again by `_answer`
        return interrupt.with_traceback(None), None
    return call, None if known is None else known.token


def _answer(
    call: Call[Any] | BaseException | None, cache: TokenCache | None, session: object, service: Any, *arguments: Any
) -> Any:
    """Return the answer to a call, which is checked unless that was done."""
    if isinstance(call, BaseException):
        check_call(service, *arguments)  # it may come of one that is wrong
        raise call
    call = call or check_call(service, *arguments)
    service.check.need(isinstance(reveal(cache), TokenCache | None), "cache", "must be a TokenCache or None")
    if session is not None:
        call = attrs.evolve(call, session=service.check.session("session", session))
    return current(call, reveal(cache))


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
    Trade a Kuzzle token for a new one, or get the new one that the cache knows.

    A refresh spends *jwt*: Kuzzle accepts it for one more second, and never refreshes it again. A token is made of its
    user, its second and its lifetime alone: two sign-ins of one user that are refreshed in the same second get the same
    token, and are one session from then on. Let them share a store, or give each machine a user of its own.

    Args:
        url: Where Kuzzle answers, with the path prefix if there is one: ``"http://localhost:7512"``. Sessions
            are known by it, so give the same one everywhere.
        jwt: The token of a sign-in, or any successor of it, with its prefix ``kauth-``. If no successor is known, it
            has to be valid, and neither an API key nor infinite. In cookie mode you may leave it out: then it is the
            ``authToken`` cookie of *session*.
        expires_in: How long the new token is valid, at least one second, and two if it is to be refreshed in time: a
            string as npm's ``ms`` reads it (``"2h"``, ``"1.5 days"``, ``"500000ms"``), or a timedelta. A cached token
            that was asked to be valid for less is refreshed, and returned after all if that takes more than two
            seconds. ``"-1"`` means for ever, and such a token cannot be refreshed. None: the server decides, however
            long *jwt* was valid: an hour, unless it is configured otherwise.
        cookie_auth: Cookie mode. The new token goes into the cookie jar of *session*, unless another has come there
            meanwhile, and is None in the result. Use one session for each Kuzzle: cookies do not tell the ports of a
            host apart.
        trigger_events: Sent as the JavaScript SDK does. Kuzzle 2 triggers its events in any case.
        strategy: The authentication strategy that is asked first. It may choose another lifetime.
        queuable: Whether to try again after downtime, overload, rate limits and lost responses, as long as *timeout*
            allows. If False, there is one attempt.
        timeout: Seconds for the whole call, or a timedelta. None and -1 mean no limit. When it is over, a request
            goes on until a minute after it was sent, and the next call finds its result in the cache. A process that
            ends by itself waits for it; one that is ended by a signal or `os._exit` does not. Give a call two seconds
            at least: a process that cannot know how old a token is refreshes it a second after it first saw it.
        cache: Remembers the newest token of each chain. If it is not about to expire, it is returned without a request.
            With None each call refreshes its *jwt*, and gives up when *timeout* is over.
        session: Connections, proxies, TLS settings, headers, parameters and cookies to use. It is not changed, except
            for the ``authToken`` cookie in cookie mode.

    Returns:
        The newest token. Save it before anything else, or use a cache with a store.

    Raises:
        InvalidArgumentError: An argument is wrong. Nothing was sent.
        SignInRequiredError: Kuzzle refused the newest token. It has expired, was logged out or was refreshed before:
            Kuzzle does not say which. Or Kuzzle returned the same token, which then expires (``spent`` is True).
        UnavailableError: Kuzzle, its token store or the cache's store is down or busy. Nothing was spent.
        OutcomeUnknownError: The request was sent, but no usable response came in time. The token may be spent, since
            Kuzzle finishes requests whose client has gone.
        RequestRefusedError: The lifetime exceeds the server's limit, the user has no right to refresh, the token is an
            API key or infinite, or the strategy refused. Nothing was spent.
        ReplyError: Something other than Kuzzle answered.

    Example:
        >>> from refresher.testing import FakeKuzzle
        >>> with FakeKuzzle() as kuzzle:
        ...     jwt = kuzzle.login("foo", ago=1800)
        ...     token = refresh_kuzzle_token(kuzzle.url, jwt, expires_in="2h")
        >>> print(token.kuid, token.ttl)
        foo 2:00:00
    """
    attempts, call, known = ("queuable", queuable, timeout), None, None
    if cookie_auth is False:
        call, known = _look(cache, kuzzle, *attempts, url, jwt, expires_in, trigger_events, strategy)
        if known is not None and session is None:
            return known  # type: ignore[no-any-return]
    url, jwt, expires_in, trigger_events, strategy = hide_all(url, jwt, expires_in, trigger_events, strategy)
    queuable, timeout, cache, session, cookie_auth = hide_all(queuable, timeout, cache, session, cookie_auth)
    attempts, options = ("queuable", queuable, timeout), (expires_in, trigger_events, strategy)
    if kuzzle.check.flag("cookie_auth", cookie_auth):
        return _in_cookie_mode(cache, session, attempts, url, jwt, options)
    token: KuzzleToken = _answer(call, cache, session, kuzzle, *attempts, url, jwt, *options)
    return token


def _in_cookie_mode(
    cache: TokenCache | None, session: object, attempts: tuple[Any, ...], url: Any, jwt: Any, options: tuple[Any, ...]
) -> KuzzleToken:
    """Take the token from the session's cookie jar, and put the new one there."""
    check = kuzzle.check
    jar = check.session("session", session)
    if jar is None:
        check.fail("session", "is needed in cookie mode: its cookie jar takes the new token")
    with importing:
        from . import _cookies

    base = check.url("url", url, https=False) + "/"  # a cookie's path may end with a slash
    there = _cookies.find(jar, base, kuzzle.COOKIE)
    found = there if jwt is None else jwt
    if found is None or reveal(found) == kuzzle.NO_COOKIE:
        check.fail("jwt", "is missing, and the session has no authToken cookie")
    modes = True, jwt is None
    token: KuzzleToken = _answer(None, cache, jar, kuzzle, *attempts, url, found, *options, *modes)

    def is_old(cookie: Secret[str]) -> bool:
        """Whether a cookie was there before, or has a token that was spent meanwhile."""
        shared = reveal(cache)
        if cookie == there or shared is None:
            return cookie == there
        recall = shared._ledger.recall
        chain, other = (recall(kuzzle.KuzzleCredential(url=base[:-1], secret=each))[0] for each in (found, cookie))
        return chain.key == other.key and chain.newest is not None and chain.newest.secret != cookie

    newest = Secret(token.jwt or "")  # not in the line that may fail: a traceback may show attributes, too
    _cookies.keep(jar, base, kuzzle.COOKIE, newest, is_old)
    return attrs.evolve(token, jwt=None)


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
    base_url: str = circle.BASE_URL,
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
    base_url: str = circle.BASE_URL,
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
    base_url: str = circle.BASE_URL,
    retry: bool = True,
    timeout: Seconds = 30.0,
    cache: TokenCache | None = SHARED_CACHE,
    session: requests.Session | None = None,
) -> UserToken:
    """
    Trade a Circle refresh token for a new user token, or get the new one that the cache knows.

    A refresh spends *refresh_token*. The result contains the one to use next. Give exactly one of *user_token* and
    *user_id*.

    Args:
        refresh_token: The one that came with *user_token*, or with the sign-in.
        device_id: The device that the user signed in on.
        user_token: The user token that came with *refresh_token*, expired or not.
        user_id: The user's id at Circle, 5 to 50 characters. It is exchanged for a user token first. That works for
            users with a PIN, while refresh tokens are for users who sign in by e-mail or with a social account, so
            Circle may refuse the combination: prefer *user_token*. Never take it from a request of an end user: with
            your API key, it is as good as a password.
        api_key: Your API key. None means the environment variable ``CIRCLE_WEB3_API_KEY``.
        idempotency_key: A UUID v4. Circle takes two requests with the same key for one, and answers the second as it
            did the first. None means that it is derived from the tokens and the device id, so that every process that
            makes this call has the same one, also after a crash.
        request_id: A UUID that names the request in Circle's logs. None means a new one.
        base_url: Where Circle answers. It must use https, except for a loopback address.
        retry: Whether to try again after failures and lost responses, as long as *timeout* allows. If False, there is
            one attempt.
        timeout: Seconds for the whole call, or a timedelta. None and -1 mean no limit. When it is over, a request
            goes on until a minute after it was sent, and the next call finds its result in the cache. A process that
            ends by itself waits for it; one that is ended by a signal or `os._exit` does not.
        cache: Remembers the newest pair of each chain. If it is not about to expire, it is returned without a request.
            With None each call refreshes the pair it is given, and gives up when *timeout* is over.
        session: Connections, proxies, TLS settings, headers, parameters and cookies to use. It is not changed.

    Returns:
        The newest pair. Save it before anything else, or use a cache with a store.

    Raises:
        InvalidArgumentError: An argument is wrong. Nothing was sent.
        SignInRequiredError: Circle knows no such user, or refused the newest tokens.
        UnavailableError: Circle or the cache's store is down or busy. Nothing was spent.
        OutcomeUnknownError: The request was sent, but no usable response came in time, or Circle failed. Call again:
            the same ``idempotency_key`` brings a lost response back.
        RequestRefusedError: The API key is wrong or has no right to this, or an argument is wrong for Circle. Nothing
            was spent.
        ReplyError: Something other than Circle answered.

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
    (api_key,) = hide_all(api_key)
    key = circle.default_api_key(api_key)
    call, known = _look(
        *(cache, circle, "retry", retry, timeout, refresh_token, device_id, key, user_token, user_id),
        *(base_url, idempotency_key, request_id),
    )
    if known is not None and session is None:
        return known  # type: ignore[no-any-return]
    refresh_token, device_id, user_token, user_id = hide_all(refresh_token, device_id, user_token, user_id)
    idempotency_key, request_id, base_url = hide_all(idempotency_key, request_id, base_url)
    retry, timeout, cache, session = hide_all(retry, timeout, cache, session)
    credential = refresh_token, device_id, key, user_token, user_id
    options = base_url, idempotency_key, request_id
    pair: UserToken = _answer(call, cache, session, circle, "retry", retry, timeout, *credential, *options)
    return pair
