"""
Fixtures for pytest, which finds them by itself where refresher is installed.

This adds some 40 ms to other people's test runs: it imports refresher, but neither requests nor the fakes. These are
imported when a test asks for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from . import FakeCircle, FakeKuzzle


@pytest.fixture
def clean_shared_cache() -> Iterator[None]:
    """After the test, clear `refresher.SHARED_CACHE`, and forget each ``Retry-After``: the next test begins anew."""
    from .. import SHARED_CACHE
    from .._exchange import Observed
    from .._runtime import REAL

    yield
    SHARED_CACHE.clear()
    Observed.of(REAL).forget(pauses=True)


@pytest.fixture
def fake_kuzzle() -> Iterator[FakeKuzzle]:
    """Run a `refresher.testing.FakeKuzzle`."""
    from . import FakeKuzzle

    with FakeKuzzle() as fake:
        yield fake


@pytest.fixture
def fake_circle() -> Iterator[FakeCircle]:
    """Run a `refresher.testing.FakeCircle`."""
    from . import FakeCircle

    with FakeCircle() as fake:
        yield fake
