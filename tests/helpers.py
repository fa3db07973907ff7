"""What several tests say."""

from __future__ import annotations


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
