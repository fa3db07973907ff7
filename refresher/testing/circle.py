"""FakeCircle: what Circle publishes of its user token service."""

from __future__ import annotations

import base64
import secrets
import uuid
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import ClassVar

import attrs

from .._text import claims, is_uuid
from ..tokens import UserToken
from .faults import Fake, check_known
from .server import Answer, Clock, Received, sign

ERRORS: Mapping[int, tuple[int, str]] = {
    -1: (400, "Something went wrong."),
    2: (400, "API parameter invalid"),
    3: (403, "Forbidden"),
    5: (429, "Too many requests"),
    401: (401, "Malformed authorization."),
    155102: (404, "Cannot find the user in the system."),
    155103: (401, "Cannot find the user token in the system."),
    155104: (403, "The user token has expired."),
    155105: (403, "The user token is invalid."),
    155109: (403, "The user is disabled."),
    155113: (404, "The device id is not found."),
    155137: (400, "The device id is invalid."),
    155139: (401, "The social sign-in has expired."),
    155140: (401, "The social sign-in has failed."),
    156006: (403, "A test API key cannot be used on live data."),
    156007: (403, "A live API key cannot be used on test data."),
    156020: (409, "Use a new idempotency key."),
}
"""What Circle refuses with. Its code: the HTTP status, the message."""


class _RefusalError(Exception):
    """Ends the handling of a request."""

    def __init__(self, code: int, **members: object) -> None:
        super().__init__(code)
        self.status, message = ERRORS[code]
        self.body = {"code": code, "message": message, **members}


@attrs.frozen
class _Pair:
    user_id: str
    device_id: str
    user_token: str


class FakeCircle(Fake):
    """
    Circle's user token service: sign-in, the exchange of a user id, the refresh; and ``GET /v1/w3s/user``.

    Args:
        clock: Its clock.
        api_key: The API key it accepts.
        rotate: Whether a refresh brings a new refresh token. If not, it has none in its answer.

    Attributes:
        requests: What it received.
        next_answers: What to answer instead of the truth: an `Answer`, raw bytes, or a function of the request.
    """

    _codes: ClassVar[Mapping[str, int]] = {"busy": 5, "refused": 155105}

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        api_key: str = "TEST_API_KEY:fake-id:fake-secret",
        rotate: bool = True,
    ) -> None:
        super().__init__(clock)
        self.api_key = api_key
        self.rotate = rotate
        self._secret = secrets.token_bytes()
        self._user_tokens: dict[str, str] = {}
        self._pairs: dict[str, _Pair] = {}
        self._answered: dict[str, tuple[bytes, dict[str, object]]] = {}

    def knows(self, token: UserToken) -> bool:
        """Whether the user token and the refresh token of a pair are valid now."""
        alive = self.clock() < (claims(token.user_token).exp or 0)
        return alive and token.user_token in self._user_tokens and token.refresh_token in self._pairs

    def sign_in(self, user_id: str = "user-1", device_id: str = "device-1") -> UserToken:
        """Sign a user in on a device, as a social sign-in would."""
        with self._lock:
            return UserToken.from_dict(self._issue_pair(user_id, device_id))

    def fail_next(self, code: int, times: int = 1) -> None:
        """Refuse the next requests with that *code*, and do nothing else for them."""
        check_known("code", code, ERRORS)
        self.next_answers.extend([lambda request: self._refusal(request, _RefusalError(code))] * times)

    def refuse(self, request: Received, why: str) -> Answer:
        """Refuse a request in Circle's own words."""
        if why in self._codes:
            return self._refusal(request, _RefusalError(self._codes[why]))
        status = HTTPStatus.SERVICE_UNAVAILABLE if why == "unavailable" else HTTPStatus.INTERNAL_SERVER_ERROR
        return self._reply(request, status.value, {"code": -1, "message": status.phrase})

    def _issue_user_token(self, user_id: str) -> dict[str, object]:
        now = int(self.clock())
        payload = {"sub": user_id, "iat": now, "exp": now + 3600, "jti": secrets.token_hex(8)}
        token = sign(payload, self._secret)
        self._user_tokens[token] = user_id
        return {"userToken": token, "encryptionKey": base64.b64encode(secrets.token_bytes()).decode()}

    def _issue_pair(self, user_id: str, device_id: str) -> dict[str, object]:
        issued = self._issue_user_token(user_id)
        refresh_token = secrets.token_urlsafe(48)
        self._pairs[refresh_token] = _Pair(user_id, device_id, str(issued["userToken"]))
        return {**issued, "userID": user_id, "refreshToken": refresh_token}

    def _answer(self, request: Received) -> Answer:
        routes = {
            ("GET", "/v1/w3s/user"): self._user,
            ("POST", "/v1/w3s/users/token"): self._exchange,
            ("POST", "/v1/w3s/users/token/refresh"): self._refresh,
        }
        handle = routes.get((request.method, request.path))
        if handle is None:
            return self._reply(request, 404, {"code": 404, "message": "Not found."})
        try:
            if request.headers.get("Authorization") != f"Bearer {self.api_key}":
                raise _RefusalError(401)
            return self._reply(request, 200, {"data": handle(request)})
        except _RefusalError as refusal:
            return self._refusal(request, refusal)

    def _refusal(self, request: Received, refusal: _RefusalError) -> Answer:
        return self._reply(request, refusal.status, refusal.body)

    def _reply(self, request: Received, status: int, body: object) -> Answer:
        given = request.headers.get("X-Request-Id", "")
        request_id = given if is_uuid(given) else str(uuid.uuid4())
        date = formatdate(self.clock(), usegmt=True)
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id, "Date": date}
        return Answer(status, body, headers)

    @staticmethod
    def _members(request: Received, **wanted: Callable[[str], bool]) -> list[str]:
        """Take the members of the body, each a string that passes its check."""
        try:
            given = request.json()
        except ValueError:
            given = {}
        errors = [
            {
                "error": "invalid_value",
                "message": "invalid",
                "location": name,
                "invalidValue": given.get(name),
            }
            for name, good in wanted.items()
            if not isinstance(given.get(name), str) or not good(given[name])
        ]
        if errors:
            raise _RefusalError(2, errors=errors)
        return [given[name] for name in wanted]

    def _owner(self, user_token: str) -> str:
        """Return whose a user token is, expired or not."""
        if user_token.count(".") != 2:
            raise _RefusalError(155105)
        if user_token not in self._user_tokens:
            raise _RefusalError(155103)
        return self._user_tokens[user_token]

    def _user(self, request: Received) -> dict[str, object]:
        user_token = request.headers.get("X-User-Token", "")
        user_id = self._owner(user_token)
        if self.clock() >= (claims(user_token).exp or 0):
            raise _RefusalError(155104)
        return {"user": {"id": user_id, "status": "ENABLED"}}

    def _exchange(self, request: Received) -> dict[str, object]:
        (user_id,) = self._members(request, userId=lambda value: 5 <= len(value) <= 50)
        if user_id not in {pair.user_id for pair in self._pairs.values()}:
            raise _RefusalError(155102)
        return self._issue_user_token(user_id)

    def _refresh(self, request: Received) -> dict[str, object]:
        key, refresh_token, device_id = self._members(request, idempotencyKey=is_uuid, refreshToken=bool, deviceId=bool)
        if key in self._answered:
            body, answered = self._answered[key]
            if body != request.body:
                raise _RefusalError(156020)
            return answered
        user_token = request.headers.get("X-User-Token", "")
        user_id = self._owner(user_token)
        pair = self._pairs.get(refresh_token)
        if pair is None:
            raise _RefusalError(155102)
        if pair.user_id != user_id:
            raise _RefusalError(155103)
        if pair.device_id != device_id:
            raise _RefusalError(155137)
        for token in {pair.user_token, user_token}:
            self._user_tokens.pop(token, None)
        if self.rotate:
            del self._pairs[refresh_token]
            data = self._issue_pair(pair.user_id, pair.device_id)
        else:
            data = self._issue_user_token(pair.user_id)
            self._pairs[refresh_token] = attrs.evolve(pair, user_token=str(data["userToken"]))
        self._answered[key] = (request.body, data)
        self._spent[refresh_token] += 1
        return data if self._recipient is None else self._issue_pair(self._recipient, pair.device_id)
