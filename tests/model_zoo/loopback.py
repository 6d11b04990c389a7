"""A web server on loopback that can do what servers do: drop a connection, lie, stall, not know, or not heed a range."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STALL = 1.0  # seconds


@dataclass
class Request:
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Server:
    """Serves ``files`` by path.

    ``plans[path]`` holds what happens to the next requests for it, one word a request, before all goes well: ``drop`` (half of
    the answer), ``dead`` (no answer), ``stall`` (silence after half of it), ``mute`` (silence at once), ``whole`` (the range is not heeded)
    or a status.
    """

    port: int
    files: dict[str, bytes] = field(default_factory=dict)
    plans: dict[str, deque[str]] = field(default_factory=lambda: defaultdict(deque))
    requests: list[Request] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def publish(self, folder: Path, base: str) -> str:
        """Serve a folder's files under ``/base``; its URL."""
        self.files |= {f"/{base}/{path.name}": path.read_bytes() for path in folder.iterdir()}
        return f"{self.url}/{base}"

    def plan(self, path: str, *steps: str) -> None:
        self.plans[path].extend(steps)

    def asked(self, file: str = "") -> list[str]:
        """The paths asked for, or the ranges of the requests for a file."""
        if file:
            return [request.range or "all" for request in self.requests if request.path.endswith(f"/{file}")]
        return [request.path for request in self.requests]


@contextmanager
def serving() -> Iterator[Server]:
    """A running server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            given = self.headers.get("Range")
            if not self.path.startswith("/api/agent-harnesses"):  # huggingface_hub asks for these by itself, once a day
                server.requests.append(Request(self.path, given, self.headers.get("Authorization")))
            plan = server.plans[self.path]
            answer(self, plan.popleft() if plan else "", given)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(http.server_address[1])

    def answer(handler: BaseHTTPRequestHandler, step: str, given: str | None) -> None:
        body, status, handler.close_connection = server.files.get(handler.path), 200, True
        if step in ("dead", "mute"):
            server.released.wait(STALL if step == "mute" else 0)
            return
        if step.isdigit() or body is None:
            body, status = b"no", int(step or 404)
        start = int(given.removeprefix("bytes=").rstrip("-")) if given and step != "whole" and status == 200 else 0
        if start and start >= len(body):
            body, status = b"", 416
        handler.send_response(206 if start and status == 200 else status)
        if start and status == 200:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        body = body[start:]
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        half = body[: len(body) // 2] if step in ("drop", "stall") else body
        handler.wfile.write(half)
        if step == "stall":
            server.released.wait(STALL)

    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        http.shutdown()
        http.server_close()
        thread.join()
