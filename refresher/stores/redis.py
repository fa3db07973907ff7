"""Entries in Redis or Valkey."""

from __future__ import annotations

import inspect
import math
from typing import Any, Protocol

from ..errors import InvalidArgumentError

# Each is one step of the server. A lock without an end, which we never write, is nobody's.
_ACQUIRE = """
local owner = redis.call('get', KEYS[1])
local left = redis.call('pttl', KEYS[1])
if owner and owner ~= ARGV[1] and left > 0 then return left end
redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[2])
return 0
"""
_RENEW = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('pexpire', KEYS[1], ARGV[2])
"""
_RELEASE = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('del', KEYS[1])
"""
LONGEST_LEASE = 86_400.0


class Client(Protocol):
    """What clients of redis-py and of valkey-py have in common, also those of a cluster."""

    def eval(self, script: str, numkeys: int, *keys_and_args: Any) -> Any:
        """Run a script."""


class RedisStore:
    """
    Entries in a Redis or Valkey, for many machines. Needs ``refresher[redis]``.

    Args:
        client: A client of redis-py or valkey-py, also of a cluster or from a Sentinel, whatever its
            ``decode_responses``. It's yours: set password, TLS and timeouts on it. Give it a
            ``socket_timeout`` of half a second or so, and no retries of its own (``retry=None``). A server that
            hangs delays no call past its timeout, but the thread that asked it waits on, and the process with that.
            In a token's last seconds it asks several times.
        prefix: What all keys begin with.

    Raises:
        InvalidArgumentError: *client* is no such client, one for asyncio, or a pipeline, or *prefix* is no string.
    """

    def __init__(self, client: Client, prefix: str = "refresher:2:") -> None:
        is_async = inspect.iscoroutinefunction(getattr(client, "execute_command", None))
        # What has execute() is a pipeline, which does nothing at once.
        if is_async or isinstance(client, type) or hasattr(client, "execute") or not hasattr(client, "eval"):
            del client  # an error's traceback shows what a frame has
            raise InvalidArgumentError("client must be a blocking client, such as redis.Redis.from_url(url)")
        if not isinstance(prefix, str):
            del prefix
            raise InvalidArgumentError("prefix must be a string")
        self._client: Any = client
        self._prefix = prefix

    def __repr__(self) -> str:
        return f"RedisStore(prefix={getattr(self, '_prefix', None)!r})"  # also in the middle of a complaint

    def get(self, key: str, /) -> str | bytes | None:
        """Return an entry. None if there is none, or it has expired."""
        value: str | bytes | None = self._client.get(self._prefix + key)
        return value

    def set(self, key: str, value: str, seconds: int, /) -> None:
        """Write an entry that expires after *seconds*."""
        self._client.set(self._prefix + key, value, ex=seconds)

    def delete(self, key: str, /) -> None:
        """Remove an entry, if it is there."""
        self._client.delete(self._prefix + key)

    def acquire(self, key: str, owner: str, lease: float, /) -> float:
        """Take a lock: 0.0 if *owner* has it now, otherwise the seconds that another's lease has left."""
        return self._run(_ACQUIRE, key, owner, _milliseconds(lease)) / 1000

    def renew(self, key: str, owner: str, lease: float, /) -> bool:
        """Restart a lock's lease. False if *owner* does not hold it any more."""
        return bool(self._run(_RENEW, key, owner, _milliseconds(lease)))

    def release(self, key: str, owner: str, /) -> None:
        """Let others take a lock, if *owner* holds it."""
        self._run(_RELEASE, key, owner)

    def _run(self, script: str, key: str, *arguments: str | int) -> int:
        return int(self._client.eval(script, 1, f"{self._prefix}{key}:lock", *arguments))


def _milliseconds(lease: float) -> int:
    return math.ceil(min(lease, LONGEST_LEASE) * 1000)
