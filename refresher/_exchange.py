"""One exchange with a service, and the line in the log that tells of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import requests

from ._http import Reply, Request, send
from .errors import RefreshError
from .tokens import fingerprint

_log = logging.getLogger("refresher")
_Answer = TypeVar("_Answer")


def exchange(
    request: Request,
    parse: Callable[[Reply, Request], _Answer],
    *,
    session: requests.Session | None,
    connect: float | None,
    timeout: float | None,
) -> _Answer:
    """
    Send *request*, read the reply and log what came of it.

    Args:
        parse: Reads the reply, or raises what it means.
        session: Whose connections to use; None for our own.
        connect: Seconds to wait for a connection; None for ever.
        timeout: Seconds to wait for the answer, connection included; None for ever.

    Raises:
        RefreshError: There was no answer, or it was a refusal.
    """
    started = time.monotonic()
    outcome = "interrupted"
    try:
        answer = parse(send(request, session=session, connect=connect, timeout=timeout), request)
        outcome = "ok"
        return answer
    except RefreshError as error:
        outcome = str(error)
        raise
    finally:
        _log.info(
            "%s %s: %s, 1 attempt, %.3f s",
            request.provider,
            fingerprint(request.credential),
            outcome,
            time.monotonic() - started,
        )
