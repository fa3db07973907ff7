"""How tokens and waits look in a notebook."""

from __future__ import annotations

import html
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

# What each waiting thread waits for, since when, and where it says so.
_shown: dict[int, tuple[str, float, Any]] = {}


class Printer(Protocol):
    """What we need of IPython's pretty printer."""

    def text(self, text: str, /) -> object:
        """Print."""


def as_text(title: str, rows: Mapping[str, str]) -> str:
    """Draw a table of text."""
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows.items())])


def as_html(title: str, rows: Mapping[str, str]) -> str:
    """Draw a table of HTML. It has no colours of its own, so it suits any theme."""
    left = 'style="text-align: left"'
    cells = "".join(
        f"<tr><th {left}>{name}</th><td {left}>{html.escape(value)}</td></tr>" for name, value in rows.items()
    )
    caption = f'<caption style="color: inherit; text-align: left">{title}</caption>'
    return f"<table>{caption}{cells}</table>"


def show_wait(what: str, seconds: float | None) -> None:
    """Say in a notebook what a cell waits for, and in the end how long it did. Elsewhere nobody is looking."""
    ipython: Any = sys.modules.get("IPython")
    if ipython is None or getattr(ipython.get_ipython(), "kernel", None) is None:
        return
    thread = threading.get_ident()
    # Waits begin to show after a second.
    last, since, handle = _shown.pop(thread, ("", time.monotonic() - 1, None))
    limit = "" if seconds is None else f", {seconds:.0f} s at most"
    line = f"Waiting{limit}: {what}." if what else f"Waited {time.monotonic() - since:.0f} s: {last}."
    if handle is None:
        handle = ipython.display.DisplayHandle()
        handle.display({"text/plain": line}, raw=True)
    else:
        handle.update({"text/plain": line}, raw=True)
    if what:
        _shown[thread] = what, since, handle
