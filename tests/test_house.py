"""How the package is built."""

from __future__ import annotations

import ast
import doctest
import importlib.metadata
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import mypy.api
import pytest

import refresher
import refresher.testing

PACKAGE = Path(refresher.__file__).parent
# Each imports from those before it only.
FLOORS = [
    ["_notebook", "errors"],
    ["_checks"],
    ["tokens"],
    ["_wire", "stores"],
    ["_threads"],
    ["_connections"],
    ["_http"],
    ["_circle", "_kuzzle"],
    ["_exchange"],
    ["_cache"],
    ["_api", "testing"],
    ["auth"],
    ["_cli"],
    ["__init__", "__main__"],
]


def imports_of(path):
    """The modules of ours that one imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def test_imports_point_down():
    """Every module stands on a floor, and knows only those below."""
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == {name for floor in FLOORS for name in floor}
    for height, floor in enumerate(FLOORS):
        below = {name for lower in FLOORS[:height] for name in lower}
        for name in floor:
            assert set(imports_of(PACKAGE / f"{name}.py")) <= below, name


def test_all_is_sorted():
    """What people import is listed in order, and is there."""
    assert refresher.__all__ == sorted(refresher.__all__)
    assert refresher.testing.__all__ == sorted(refresher.testing.__all__)
    for name in refresher.__all__:
        assert hasattr(refresher, name)


def run(code):
    return subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", textwrap.dedent(code)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_import_does_nothing():
    """Importing the package starts no thread, opens no socket and loads no extra."""
    out = run("""
        import sys, threading
        import requests  # whose urllib3 tries out IPv6
        events = []
        sys.addaudithook(lambda event, args: events.append(event) if event.startswith("socket.") else None)
        import refresher
        print(threading.active_count(), events, end=" ")
        extras = ("pytest", "refresher.testing", "django", "redis", "filelock")
        print([name for name in extras if name in sys.modules])
    """)
    assert out == "1 [] []\n"


def test_import_is_quick():
    """What takes long to import is imported when it's needed: requests, when there is something to send."""
    out = run("""
        import sys
        import refresher
        from refresher import _cli
        print([name for name in ("requests", "urllib3", "refresher.testing") if name in sys.modules])
    """)
    assert out == "[]\n"


def test_lazy_names():
    """What is imported when it's asked for is there, and what is not there is told as usual."""
    assert set(refresher.__all__) <= set(dir(refresher))
    out = run("""
        import refresher
        print(refresher.errors.RefreshError is refresher.RefreshError, end=" ")
        print(refresher.auth.KuzzleAuth is refresher.KuzzleAuth, end=" ")
        from refresher import *
        print(KuzzleAuth is refresher.KuzzleAuth, __version__ == refresher.__version__, end=" ")
        print(hasattr(refresher, "nonsense"))
    """)
    assert out == "True True True True False\n"


def test_testing_without_pytest(monkeypatch):
    """The fakes need no pytest."""
    monkeypatch.setitem(sys.modules, "pytest", None)
    spec = importlib.util.spec_from_file_location("refresher.plain_testing", refresher.testing.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert not hasattr(module, "fake_kuzzle")
    with module.FakeKuzzle() as fake:
        assert fake.knows(fake.login())


def test_version():
    """There is one version, and it's the one that is installed."""
    assert refresher.__version__ == importlib.metadata.version("refresher")


def test_typing(tmp_path):
    """A type checker refuses both or neither of user_token and user_id, a wrong type, a wrong name."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            from refresher import KuzzleToken, UserToken, refresh_kuzzle_token, refresh_user_token

            pair: UserToken = refresh_user_token(refresh_token="r", device_id="d", user_token="u")
            pair = refresh_user_token(refresh_token="r", device_id="d", user_id="u")
            token: KuzzleToken = refresh_kuzzle_token("u", "j", expires_in="2h", timeout=None)
            refresh_user_token(refresh_token="r", device_id="d")  # bad
            refresh_user_token(refresh_token="r", device_id="d", user_token="u", user_id="u")  # bad
            refresh_user_token("u", refresh_token="r", device_id="d")  # bad
            refresh_user_token(refresh_token="r", user_token="u")  # bad
            refresh_kuzzle_token("u", "j", expires_in=7200)  # bad
            refresh_kuzzle_token("u", "j", "2h")  # bad
            refresh_kuzzle_token("u", "j", expiresIn="2h")  # bad
            token.jwt = "x"  # bad
        """)
    )
    out, err, _ = mypy.api.run(["--strict", f"--cache-dir={tmp_path}", str(program)])
    assert err == ""
    refused = {int(line.split(":")[1]) for line in out.splitlines() if ": error: " in line}
    bad = [number for number, line in enumerate(program.read_text().splitlines(), 1) if line.endswith("# bad")]
    assert sorted(refused) == bad


@pytest.mark.parametrize("name", [name for floor in FLOORS for name in floor if name != "__main__"])
def test_examples_run(name):
    """The examples in the documentation do what they say."""
    module = refresher if name == "__init__" else importlib.import_module(f"refresher.{name}")
    assert doctest.testmod(module, raise_on_error=False).failed == 0
