"""A server in a process of its own that always gives the same answer, as fast as it can."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
from collections.abc import Iterator
from email.utils import formatdate

NUMBER = b"0000000000"
"""Where this stands in an answer, each answer has a number of its own."""

_numbers = itertools.count(1)


class _Answering(asyncio.Protocol):
    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.received = b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if end and len(body) >= int(length or 0):
            self.received = b""
            self.transport.write(self.answer.replace(NUMBER, b"%010d" % next(_numbers)))


def _serve(answer, pipe):
    async def main():
        server = await asyncio.get_running_loop().create_server(lambda: _Answering(answer), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextlib.contextmanager
def serving(body: bytes, *headers: str) -> Iterator[str]:
    """Serve one JSON body; give the URL."""
    head = [
        "HTTP/1.1 200 OK",
        "Content-Type: application/json",
        f"Date: {formatdate(usegmt=True)}",
        *headers,
        f"Content-Length: {len(body)}",
        "",
        "",
    ]
    ours, theirs = multiprocessing.Pipe()
    answer = "\r\n".join(head).encode() + body
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(answer, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()
