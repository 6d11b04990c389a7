"""Whether the Hub is there is decided once, and quickly."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets.config
import huggingface_hub
import huggingface_hub.constants
import pytest

from recipes import hub


class Answer(BaseHTTPRequestHandler):
    status = 200
    requests = 0

    def do_HEAD(self) -> None:
        type(self).requests += 1
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _asks_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    hub.hub_reachable.cache_clear()
    yield
    huggingface_hub.close_session()
    hub.hub_reachable.cache_clear()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answer]]:
    handler = type("Handler", (Answer,), {"requests": 0})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_is_asked_once(server: type[Answer]) -> None:
    assert [hub.hub_reachable() for _ in range(3)] == [True] * 3
    assert server.requests == 1
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_refusal_is_no_hub(server: type[Answer]) -> None:
    server.status = 403
    assert not hub.hub_reachable()
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert not hub.hub_reachable()


def test_silence_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.perf_counter()
        assert not hub.hub_reachable()
    assert time.perf_counter() - began < 5


def test_a_name_that_never_resolves_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "JOIN_SECONDS", 0.1)
    monkeypatch.setattr(hub, "_answers", lambda endpoint: time.sleep(1) or True)
    began = time.perf_counter()
    assert not hub.hub_reachable()
    assert time.perf_counter() - began < 0.9


def test_offline_asks_nobody(server: type[Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_reachable()
    assert server.requests == 0
