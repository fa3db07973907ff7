"""Servers for the tests of stores, from the system's packages."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest


class Router:
    """Tells Django where a table of entries is: its name begins with the name of a database."""

    def db_for_read(self, model, **hints):
        return model._meta.db_table.partition("_")[0]

    db_for_write = db_for_read

    def allow_migrate(self, db, app_label, model_name=None, **hints):
        return True


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def wait_for(action):
    """Try until a server that was just started does it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            action()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def plain_user():
    """The options that let a program run as someone who is not root: some refuse to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return {}


class Memcached:
    """A Memcached that can be stopped and started again."""

    def __init__(self):
        self.program = shutil.which("memcached")
        if self.program is None:
            pytest.skip("memcached is not installed")
        self.port = free_port()
        self.process = None

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def start(self):
        command = [self.program, "--listen=127.0.0.1", f"--port={self.port}", "--udp-port=0"]
        self.process = subprocess.Popen(command, cwd="/", **plain_user())
        wait_for(lambda: socket.create_connection(("127.0.0.1", self.port)).close())

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Postgres:
    """A PostgreSQL with an empty database."""

    def __init__(self, folder):
        pytest.importorskip("psycopg", reason="psycopg is not installed")
        found = [shutil.which("postgres"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))]
        programs = [Path(path).resolve().parent for path in found if path]
        if not programs:
            pytest.skip("PostgreSQL is not installed")
        self.programs = programs[-1]
        self.folder = folder
        self.port = free_port()
        self.user = plain_user()

    def start(self):
        folder = self.folder
        folder.mkdir()
        if self.user:
            os.chown(folder, self.user["user"], self.user["group"])
        self.log = (folder.parent / "postgres.log").open("a")
        options = {"cwd": "/", "stdout": self.log, "stderr": self.log, **self.user}
        command = ["initdb", "--no-sync", "--auth=trust", "--username=test", "--encoding=UTF8", folder / "data"]
        subprocess.run([self.programs / command[0], *command[1:]], check=True, **options)
        command = ["postgres", "-D", folder / "data", "-p", f"{self.port}", "-k", "", "-h", "127.0.0.1", "-F"]
        self.process = subprocess.Popen([self.programs / command[0], *command[1:]], **options)
        wait_for(self.connect)

    def connect(self):
        import psycopg

        try:
            psycopg.connect(host="127.0.0.1", port=self.port, user="test", dbname="postgres").close()
        except psycopg.OperationalError as error:
            raise OSError from error

    def stop(self):
        self.process.send_signal(signal.SIGQUIT)  # at once
        self.process.wait()
        self.log.close()

    @property
    def settings(self):
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": "postgres",
            "USER": "test",
            "HOST": "127.0.0.1",
            "PORT": self.port,
        }
