"""In a notebook, executed for real. What it saves, people share."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from helpers import jwt_with
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

from refresher import KuzzleAuth

QUICK = """\
refresher.refresh_user_token(
    user_token=os.environ["CIRCLE_USER_TOKEN"],
    refresh_token=os.environ["CIRCLE_REFRESH_TOKEN"],
    device_id="device-1",
    base_url=os.environ["CIRCLE_URL"],
    cache=None,
).user_id
"""
# A kernel is interrupted as it ends, and what it has measured may be lost.
SAVE_COVERAGE = """\
import coverage
if (measured := coverage.Coverage.current()) is not None:
    measured.save()
"""


@pytest.fixture
def environment(kuzzle, circle, monkeypatch, tmp_path):
    """What the notebook reads, all of it secret."""
    pair = circle.sign_in()
    secrets = {
        "CIRCLE_WEB3_API_KEY": circle.api_key,
        "CIRCLE_USER_TOKEN": pair.user_token,
        "CIRCLE_REFRESH_TOKEN": pair.refresh_token,
        "KUZZLE_JWT": kuzzle.login(),
        "KUZZLE_JWT_OF_ANOTHER": kuzzle.login("foo", "2h"),
        "KUZZLE_JWT_OF_NOBODY": "kauth-planted.planted.planted",
    }
    kuzzle.clock.advance(7)  # the tokens are not young any more
    addresses = {"KUZZLE_URL": kuzzle.url, "CIRCLE_URL": circle.url, "JUPYTER_PLATFORM_DIRS": "1"}
    for name, value in {**secrets, **addresses}.items():
        monkeypatch.setenv(name, value)
    return secrets


@pytest.fixture
def notebook(kuzzle, circle, environment, tmp_path):
    """The notebook, executed: not here, where the kernel would import the source and not what is installed."""
    notebook = nbformat.read(Path(__file__).with_name("notebook.ipynb"), 4)
    notebook.cells += map(nbformat.v4.new_code_cell, [QUICK, SAVE_COVERAGE])
    kuzzle.next_answers.append(kuzzle.truly)
    kuzzle.delay_next(2.2)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    return notebook


@pytest.mark.parametrize("mode", ["Context", "Verbose"])
def test_errors_are_short(capsys, kuzzle, mode):
    """An error that a cell ends with shows the user's own lines and what went wrong, and nothing else."""
    shell = InteractiveShell()
    shell.run_line_magic("xmode", mode)
    shell.run_cell("import requests, refresher")
    capsys.readouterr()
    shell.run_cell('refresher.refresh_kuzzle_token(\n    "http://127.0.0.1:1", "kauth-planted", queuable=False)')
    assert "refresh_kuzzle_token(" in (shown := capsys.readouterr().out)
    assert len(shown.splitlines()) <= 6
    assert shown.strip().endswith("(Connection refused)")
    jwt = f"kauth-{jwt_with({'iat': 1, 'exp': 3601, '_id': 'foo'})}"
    shell.user_ns |= {"auth": KuzzleAuth(kuzzle.url, jwt), "url": kuzzle.url}
    shell.run_cell("requests.get(url, auth=auth)")
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 4
    assert "SignInRequiredError" in shown


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_notebook(notebook, kuzzle, circle, environment):
    """Results are tables, errors are told, a wait says what for, and no secret is saved."""
    _, kuzzle_table, printed, circle_table, slow, refused, wrong, quick, _ = (
        cell.get("outputs") for cell in notebook.cells
    )

    *_, shown = kuzzle_table  # the kernel does not know how old the token is, and says that it waits
    assert "<table>" in shown.data["text/html"]
    assert shown.data["text/plain"].startswith("KuzzleToken\n  kuid        foo\n  jwt         <secret ")
    assert "time left" in shown.data["text/html"]
    assert [each.output_type for each in printed] == ["stream", "execute_result"]
    assert "UserToken\n" in circle_table[0].data["text/plain"]

    waiting, result = slow
    assert result.data["text/plain"] == "'foo'"
    assert waiting.data["text/plain"] in [f"Waited {seconds} s: Kuzzle is slow." for seconds in (2, 3)]

    assert [each.output_type for each in quick] == ["execute_result"]  # and no word of a wait

    assert refused[-1].ename == "SignInRequiredError"
    assert wrong[-1].ename == "InvalidArgumentError"
    assert wrong[-1].evalue.startswith("jwt must not")

    saved = nbformat.writes(notebook)
    secrets = [*environment.values(), *kuzzle._sessions, *circle._pairs, *circle._user_tokens]
    assert len(secrets) > 10
    assert not [secret for secret in secrets if secret in saved or secret[:40] in saved]
