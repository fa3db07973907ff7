"""How the package is built."""

from __future__ import annotations

import ast
import doctest
import graphlib
import importlib.metadata
import importlib.util
import io
import re
import subprocess
import sys
import textwrap
import tokenize
from pathlib import Path

import mypy.api
import pytest

import refresher
import refresher.testing

PACKAGE = Path(refresher.__file__).parent
# Each imports from those before it only. A folder of alternatives is one; of the services, each is one.
FLOORS = [
    ["_notebook", "_system", "_text", "errors"],
    ["_checks", "_cookies", "services", "stores"],
    ["_http", "tokens"],
    ["_rules", "_runtime", "services.circle", "services.kuzzle"],
    ["_exchange"],
    ["_ledger"],
    ["_flight"],
    ["_cache"],
    ["_api", "auth"],
    ["_keeper"],
]
# What people import and run stands on all of them, one on top of the other.
ROOFS = ["__init__", "testing", "_cli", "__main__"]
HEART = ("_rules", "_ledger", "_flight", "_cache", "_exchange", "_http", "_runtime", "services")
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(name):
    """The modules of ours that one imports, inside functions too. Version and lock are there before all else."""
    path = MODULES[name]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.relative_to(PACKAGE).parent.parts
            start = [*folder[: len(folder) - node.level + 1], *([node.module] if node.module else [])]
            # What is only passed on, for type checkers, is not known.
            names = [".".join([*start, alias.name]) for alias in node.names if alias.asname != alias.name]
            yield from {
                name if name in MODULES else ".".join(start) or "__init__"
                for name in names
                if name not in ("__version__", "importing")
            }


def storey(name):
    """What stands on a floor: a module, or the folder that it is in."""
    return name if name.startswith("services.") else name.partition(".")[0]


def test_imports_point_down():
    """Every module stands on a floor, and knows only those below."""
    floors = [*FLOORS, *([roof] for roof in ROOFS)]
    assert {storey(name) for name in MODULES} == {name for floor in floors for name in floor}
    for height, floor in enumerate(floors):
        below = {name for lower in floors[:height] for name in lower}
        for name in MODULES:
            if storey(name) in floor:
                assert {storey(each) for each in imports_of(name)} - {storey(name)} <= below, name


@pytest.mark.parametrize("folder", ["stores", "testing"])
def test_folders_have_no_circles(folder):
    """In a folder, what knows something is not known by it; but for the folder's face, which shows them all."""
    inside = [name for name in MODULES if name.startswith(f"{folder}.")]
    graph = {name: {each for each in imports_of(name) if each in inside} for name in inside}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(inside)


def code_lines(path):
    """The numbers of the lines that are code: no comments, no docstrings, nothing blank."""
    source = path.read_text()
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*nothing, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def test_lines_are_counted(tmp_path):
    """Comments, docstrings and blank lines are no code."""
    program = tmp_path / "program.py"
    program.write_text('"""Doc."""\n\n# why\nX = (\n    1,\n)\ndef f():\n    """\n    Do.\n    """\n    return "a"\n')
    assert code_lines(program) == {4, 5, 6, 7, 11}


def test_ten_floors():
    """There are no more than ten floors below the command line."""
    assert len(FLOORS) <= 10


@pytest.mark.parametrize(
    ("wing", "most"),
    [
        pytest.param(lambda name: name.partition(".")[0] in HEART, 2874, id="the heart"),
        pytest.param(lambda name: storey(name) != "testing", 5343, id="all but the fakes"),
    ],
)
def test_size(wing, most):
    """The package stays small enough to be read."""
    sizes = {name: len(code_lines(path)) for name, path in MODULES.items() if wing(name)}
    assert sum(sizes.values()) <= most, sizes


def test_functions_are_short():
    """No function has more than forty lines of code, but for the command line's list of options."""
    long = {}
    for name, path in MODULES.items():
        lines = code_lines(path) if storey(name) != "testing" else set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                size = len(lines & set(range(node.lineno, node.end_lineno + 1)))
                if size > 40:
                    long[f"{name}.{node.name}"] = size
    assert sum(name.startswith("_cli.") for name in long) <= 1
    assert {name: size for name, size in long.items() if not name.startswith("_cli.")} == {}


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
        extras = ("pytest", "refresher.testing", "django", "redis", "cryptography")
        print([name for name in extras if name in sys.modules])
    """)
    assert out == "1 [] []\n"


def test_bare_installation():
    """Without any extra, everything can be imported that needs none, and the command line runs."""
    out = run("""
        import sys
        for name in ("pytest", "django", "redis", "cryptography", "filelock", "IPython"):
            sys.modules[name] = None
        import refresher, refresher.auth, refresher.stores, refresher.testing, refresher._cli
        with refresher.testing.FakeKuzzle() as kuzzle:
            jwt = kuzzle.login(ago=1800)
            print(refresher.refresh_kuzzle_token(kuzzle.url, jwt).kuid)
        refresher.MemoryStore, refresher.FileStore
        from refresher import *
        refresher._cli.main(["--help"])
    """)
    assert out.startswith("foo\nusage: refresher ")


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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("testing", ["FakeKuzzle", "suffer("], id="a module that is imported late"),
        pytest.param("stores", ["machines", *(f"class {each}" for each in refresher.stores.__all__[:-1])], id="stores"),
    ],
)
def test_help(name, words):
    """help() works after a bare import, and shows what is imported late."""
    out = run(f"import refresher; help(refresher.{name})")
    assert [word for word in words if word not in out] == []


@pytest.mark.parametrize(
    "kind",
    [
        refresher.KeepAliveOutcome,
        refresher.KuzzleToken,
        refresher.RefreshError,
        refresher.RefreshEvent,
        refresher.SessionStatus,
        refresher.UserToken,
    ],
)
def test_attributes(kind):
    """help() says what each attribute of a result or an error means."""
    told = kind.__doc__.partition("Attributes:\n")[2]
    assert [name for name in kind.__annotations__ if not re.search(rf"^ +{name}: .+", told, re.MULTILINE)] == []


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
    """A type checker refuses both or neither of user_token and user_id, a wrong type, a wrong name, half a session."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            import refresher
            from refresher import KuzzleToken, TokenCache, UserToken, refresh_kuzzle_token, refresh_user_token
            from refresher import KuzleToken  # bad
            from refresher.stores import FilStore  # bad
            from refresher.testing import FakeKuzle  # bad

            refresher.nonsense  # bad
            refresher.testing.FakeKuzzle().login("foo", 3600)  # bad
            refresher.auth.KuzzleAuth("u", 3600)  # bad
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
            for call in (TokenCache().peek, TokenCache().forget):
                call("u", "j")
                call(url="u", jwt="j")
                call(refresh_token="r", device_id="d", user_token="u")
                call(refresh_token="r", device_id="d", user_id="u", base_url="b")
                call()  # bad
                call("u")  # bad
                call(jwt="j")  # bad
                call("u", "j", user_id="u")  # bad
                call("u", refresh_token="r", device_id="d", user_id="u")  # bad
                call(refresh_token="r", user_token="u")  # bad
                call(refresh_token="r", device_id="d", user_token="u", user_id="u")  # bad
        """)
    )
    out, err, _ = mypy.api.run(["--strict", f"--cache-dir={tmp_path}", str(program)])
    assert err == ""
    refused = {int(line.split(":")[1]) for line in out.splitlines() if ": error: " in line}
    bad = [number for number, line in enumerate(program.read_text().splitlines(), 1) if line.endswith("# bad")]
    assert sorted(refused) == bad


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__main__"])
def test_examples_run(name):
    """The examples in the documentation do what they say."""
    module = refresher if name == "__init__" else importlib.import_module(f"refresher.{name}")
    assert doctest.testmod(module, raise_on_error=False).failed == 0
