"""python -m tests runs what CI runs on one Python."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def tests():
    spec = importlib.util.spec_from_file_location("tests_main", HERE / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_steps(tests):
    """It lints, checks types on the platforms of .ci/run, and runs all tests but those that are named as slow."""
    steps = tests.steps()
    platforms = re.search("for platform in (.*);", (HERE.parent / ".ci" / "run").read_text())[1].split()
    assert list(steps) == ["lint", "format", *(f"types on {platform}" for platform in platforms), "quick tests"]
    assert all((HERE / name).is_file() for name in tests.SLOW)
    assert [each for each in steps["quick tests"] if "ignore" in each] == [
        f"--ignore=tests/{each}" for each in tests.SLOW
    ]


def test_well(tests, capsys):
    """Each step has a line. What is left out is named."""
    assert tests.main({"first": ["this"], "second": ["this", "-s"]}) == 0
    first, second, left_out, summary = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[1/2\] first \.\.\. ok, \d s", first)
    assert re.fullmatch(r"\[2/2\] second \.\.\. ok, \d s", second)
    assert all(name in left_out for name in tests.SLOW)
    assert re.fullmatch(r"All well, in \d s", summary)


def test_failure(tests, capsys):
    """A step that fails shows its output. The others are run all the same, and the exit status is 1."""
    assert tests.main({"first": ["no_such_module"], "second": ["this"]}) == 1
    out = capsys.readouterr().out
    assert "[1/2] first ... FAILED" in out
    assert "No module named no_such_module" in out
    assert "[2/2] second ... ok" in out
    assert out.endswith("Failed: first\n")


def test_limit(tests, capsys, monkeypatch):
    """It ends in time."""
    monkeypatch.setattr(tests, "LIMIT", 0.0)
    assert tests.main({"first": ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"]}) == 1
    assert "not done in time" in capsys.readouterr().out
