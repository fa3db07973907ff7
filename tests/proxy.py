"""A proxy that makes faults on purpose."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time


class FaultProxy:
    """
    Passes connections on to a server, one fault each, as long as there are any in *faults*; then faithfully.

    ``"cut before"``: hang up on the request. ``"cut after"``: pass the request on and lose the answer.
    ``"reset"``: the same with a reset. ``"double"``: pass the request on twice. A number: pass it on after so
    many seconds.
    """

    def __init__(self, port):
        self.port_behind = port
        self.faults = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            fault = self.faults.pop(0) if self.faults else None
            threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client, fault):
        self._open.add(client)
        with client, contextlib.suppress(OSError):
            request = self._read(client)
            if fault == "cut before":
                return
            if isinstance(fault, (int, float)):
                time.sleep(fault)
            for _ in range(2 if fault == "double" else 1):
                answer = self._ask(request)
            if fault == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if fault in ("reset", "cut after"):
                return
            client.sendall(answer)
        self._open.discard(client)

    def _ask(self, request):
        with socket.create_connection(("127.0.0.1", self.port_behind)) as server:
            server.sendall(request)
            return self._read(server)

    @staticmethod
    def _read(peer):
        """Read a whole message."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += peer.recv(65536) or b"\r\n\r\n"
        head, _, body = data.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        length = int(lengths[0].partition(b":")[2]) if lengths else 0
        while len(body) < length:
            body += peer.recv(65536)
        return head + b"\r\n\r\n" + body
