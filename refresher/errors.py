"""What can go wrong, named for what the caller does next."""

from __future__ import annotations


class RefreshError(Exception):
    """
    Anything this package raises on purpose.

    An error holds no secret and no object of the HTTP library, so it may be logged, pickled and
    pasted into a public issue. The message is ours: nothing the service wrote is quoted in it.

    Args:
        message: What happened.
        provider: ``"kuzzle"`` or ``"circle"``.
        status: The HTTP status, if there was an answer.
        code: The service's own number for the error, if it gave one.
        id: Kuzzle's own name for the error (``"security.token.invalid"``), if it is a known one.
        request_id: Names this request in the service's logs, if anything does.
        retry_after: Seconds the service asked to wait.
        spent: Whether the credential that was sent is used up: False for no, True for yes, None if
            nobody can know.
        idempotency_key: What Circle's request carried. Sent again, it means the same request.
    """

    def __init__(
        self,
        message: str,
        *,
        provider: str | None = None,
        status: int | None = None,
        code: int | None = None,
        id: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        spent: bool | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        super().__init__(message)
        self.provider = provider
        self.status = status
        self.code = code
        self.id = id
        self.request_id = request_id
        self.retry_after = retry_after
        self.spent = spent
        self.idempotency_key = idempotency_key


class SignInRequiredError(RefreshError):
    """The service refuses the credential, or it leads nowhere any more: sign in again."""


class UnavailableError(RefreshError):
    """The service is unreachable, busy or throttling. Nothing was spent: try again later."""


class OutcomeUnknownError(RefreshError):
    """
    The request was sent and no usable answer came, so it may have been carried out.

    Try again. On Circle, trying with the same ``idempotency_key`` brings the lost answer back.
    """


class RequestRefusedError(RefreshError):
    """The arguments, the API key or the user's rights are wrong. Nothing was spent: mend the call."""


class InvalidArgumentError(RequestRefusedError, ValueError):
    """An argument is wrong, and was found to be before anything was sent."""


class ReplyError(RefreshError):
    """The answer is not the service's: a redirect, HTML, a missing member. Look at the URL, the proxy."""
