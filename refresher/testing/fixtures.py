"""
Fixtures for pytest, which finds them by itself where refresher is installed.

Everything else is imported when a test asks for it, so this costs other people's test runs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from . import FakeCircle, FakeKuzzle


@pytest.fixture
def clean_shared_cache() -> Iterator[None]:
    """Clear `refresher.SHARED_CACHE` after the test, so that no token leaks into the next one."""
    from .. import SHARED_CACHE

    yield
    SHARED_CACHE.clear()


@pytest.fixture
def fake_kuzzle(clean_shared_cache: None) -> Iterator[FakeKuzzle]:  # noqa: ARG001
    """Run a `refresher.testing.FakeKuzzle`."""
    from . import FakeKuzzle

    with FakeKuzzle() as fake:
        yield fake


@pytest.fixture
def fake_circle(clean_shared_cache: None) -> Iterator[FakeCircle]:  # noqa: ARG001
    """Run a `refresher.testing.FakeCircle`."""
    from . import FakeCircle

    with FakeCircle() as fake:
        yield fake
