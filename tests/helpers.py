"""What several tests say."""

from __future__ import annotations

import base64
import json
import time

from refresher.testing.circle import ERRORS as CIRCLE_ERRORS
from refresher.testing.kuzzle import ERRORS as KUZZLE_ERRORS

__all__ = ["CIRCLE_ERRORS", "KUZZLE_ERRORS", "call_with", "jwt_with", "wait_until"]


def call_with(circle, pair, **changes):
    """Give the arguments that refresh a pair of a FakeCircle's."""
    arguments = {
        "user_token": pair.user_token,
        "refresh_token": pair.refresh_token,
        "device_id": "device-1",
        "api_key": circle.api_key,
        "base_url": circle.url,
    }
    return {**arguments, **changes}


def by_id(circle, pair):
    """The same, for the user's id in place of the user token."""
    return call_with(circle, pair, user_token=None, user_id=pair.user_id)


def jwt_with(claims):
    """Make a JWT that tells something. Nobody has signed it."""
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b'=').decode()}.c2ln"


def wait_until(condition):
    """Wait for what another thread or process does."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
