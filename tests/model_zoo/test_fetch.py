"""Fetching over HTTP: what arrives is what the card says, or nothing under its name; what stopped goes on."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from model_zoo.bundle import load_float
from model_zoo.cards import Card, verify
from model_zoo.fetch import cache_folder, fetch_card, fetch_files
from model_zoo.format import CARD, FILES, FP32, W8A8
from quantsim import CheckpointError
from tests.model_zoo.loopback import Server

BASE = "zoo"


@pytest.fixture
def place(server: Server, bundle: Card) -> str:
    return server.publish(bundle.folder, BASE)


def fetch(place: str) -> Card:
    return fetch_files(fetch_card(place))


def refused(place: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        fetch(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cached() -> list[str]:
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file() and path.name != ".lock")


def partial() -> list[Path]:
    return list(cache_folder().glob("*.incomplete"))


def test_a_bundle_from_a_url(server: Server, place: str, bundle: Card, capsys: pytest.CaptureFixture[str]) -> None:
    card = fetch(place)
    verify(card)
    assert card.folder.is_relative_to(cache_folder())
    assert (card.where, card.files) == (place, bundle.files)
    assert all((card.folder / name).read_bytes() == (bundle.folder / name).read_bytes() for name in bundle.files)
    assert load_float(card).config.num_labels == 2
    assert cached() == sorted([CARD, *bundle.files])
    bar = capsys.readouterr().err
    assert all(f"{name}: 100%" in bar for name in bundle.files)


def test_what_is_in_the_cache_is_not_asked_for_again(server: Server, place: str) -> None:
    fetch(place)
    server.requests.clear()
    verify(fetch(place))
    assert server.asked() == [f"/{BASE}/{CARD}"]


def test_a_dropped_connection_goes_on_where_it_was(server: Server, place: str, bundle: Card) -> None:
    server.plan(f"/{BASE}/{W8A8}", "drop", "drop")
    verify(fetch(place))
    first, second, third = server.asked(W8A8)
    half, size = bundle.files[W8A8]["size"] // 2, bundle.files[W8A8]["size"]
    assert (first, second) == ("all", f"bytes={half - half % 512}-")
    assert half < int(third.removeprefix("bytes=").rstrip("-")) < size


def test_a_second_command_goes_on_too(server: Server, place: str, bundle: Card) -> None:
    server.plan(f"/{BASE}/{W8A8}", "drop", *["dead"] * 6)
    size = bundle.files[W8A8]["size"]
    message = refused(place)
    (part,) = partial()
    done = part.stat().st_size
    assert 0 < done <= size // 2
    assert part.read_bytes() == (bundle.folder / W8A8).read_bytes()[:done]
    assert f"{place}/{W8A8}: the connection failed after {done} bytes" in message
    assert f"the same command goes on from {done} of {size} bytes" in message
    assert W8A8 not in cached()
    server.requests.clear()
    server.plans.clear()
    verify(fetch(place))
    assert server.asked(W8A8) == [f"bytes={done}-"]
    assert not partial()


def test_a_server_that_does_not_heed_ranges(server: Server, place: str) -> None:
    server.plan(f"/{BASE}/{W8A8}", "drop", "whole")
    verify(fetch(place))
    assert len(server.asked(W8A8)) == 2


def test_a_silent_server(server: Server, place: str) -> None:
    server.plan(f"/{BASE}/{FP32}", "stall")
    verify(fetch(place))
    assert len(server.asked(FP32)) == 2
    server.plan(f"/{BASE}/{CARD}", *["mute"] * 6)
    assert re.search(rf"{place}/{CARD}: the connection failed after \d+ bytes \(ReadTimeout", refused(place))


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (flipped, r"sha256 is [0-9a-f]{64}; the card expects {sha256}"),
        (lambda content: content[:1000], r"has 1000 bytes; the card expects {size}"),
        (lambda content: b"", r"has 0 bytes; the card expects {size}"),
        (lambda content: content * 40, r"has more than the {size} bytes that were expected"),
    ],
    ids=["bytes", "short", "empty", "long"],
)
def test_another_file_than_the_card_s(server: Server, place: str, bundle: Card, wrong: object, message: str) -> None:
    content, record = server.files[f"/{BASE}/{W8A8}"], bundle.files[W8A8]
    server.files[f"/{BASE}/{W8A8}"] = wrong(content)  # type: ignore[operator]
    expected = message.replace("{sha256}", record["sha256"]).replace("{size}", str(record["size"]))
    found = refused(place)
    assert re.search(rf"{place}/{W8A8}: {expected}", found)
    assert "QUANTSIM_MIRROR" in found
    assert not partial()
    assert W8A8 not in cached()
    server.files[f"/{BASE}/{W8A8}"] = content
    verify(fetch(place))


def test_a_file_without_end_is_not_stored(server: Server, place: str, monkeypatch: pytest.MonkeyPatch, bundle: Card) -> None:
    """What is written never exceeds what the card says, whatever the server sends."""
    largest, unlink = [], Path.unlink

    def watching(path: Path, missing_ok: bool = False) -> None:
        largest.append(path.stat().st_size)
        unlink(path, missing_ok)

    server.files[f"/{BASE}/{W8A8}"] *= 100
    monkeypatch.setattr(Path, "unlink", watching)
    refused(place)
    assert max(largest) <= bundle.files[W8A8]["size"]


def test_a_partial_file_longer_than_what_the_server_has(server: Server, place: str, bundle: Card) -> None:
    card = fetch_card(place)
    server.files[f"/{BASE}/{W8A8}"] = b"x" * 1000
    part = cache_folder() / f"{bundle.files[W8A8]['sha256']}.incomplete"
    part.write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError, match=f"{W8A8}: has no more than 1000 bytes; the card expects"):
        fetch_files(card)
    assert not partial()


def test_a_partial_file_of_something_else(server: Server, place: str, bundle: Card) -> None:
    """What a bad mirror began is not held against the one that goes on from it."""
    card = fetch_card(place)
    part = cache_folder() / f"{bundle.files[W8A8]['sha256']}.incomplete"
    part.write_bytes(b"x" * 1000)
    verify(fetch_files(card))
    assert server.asked(W8A8) == ["bytes=1000-", "all"]
    part.write_bytes(b"x" * 10**6)
    (card.folder / W8A8).unlink()
    verify(fetch_files(card))


def test_two_at_once_ask_once(server: Server, place: str, bundle: Card) -> None:
    server.plan(f"/{BASE}/{W8A8}", "stall")
    with ThreadPoolExecutor(2) as pool:
        for card in pool.map(fetch, [place] * 2):
            verify(card)
    assert len(server.asked(FP32)) == 1
    assert len(server.asked(W8A8)) == 2


@pytest.mark.parametrize("status", ["404", "403", "500"])
def test_a_file_that_is_refused(server: Server, place: str, status: str) -> None:
    server.plan(f"/{BASE}/{W8A8}", status)
    assert f"{place}/{W8A8}: answered {status}" in refused(place)
    assert not partial()
    assert W8A8 not in cached()
    verify(fetch(place))


def test_no_server(server: Server) -> None:
    message = refused("http://127.0.0.1:9/zoo")
    assert f"http://127.0.0.1:9/zoo/{CARD}: the connection failed after 0 bytes (ConnectError" in message
    assert "--offline" in message
    assert not cached()


def test_a_damaged_file_in_the_cache_is_fetched_again(server: Server, place: str) -> None:
    card = fetch(place)
    (card.folder / W8A8).write_bytes(b"gone")
    (card.folder / "older.bin").write_bytes(b"of an older card")
    server.requests.clear()
    verify(fetch(place))
    assert server.asked() == [f"/{BASE}/{CARD}", f"/{BASE}/{W8A8}"]


def test_a_full_disk(server: Server, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=99))
    assert "99 bytes are free" in refused(place)
    assert server.asked() == [f"/{BASE}/{CARD}"]


# ---- cards from outside ----


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/b", "..", ".hidden", "a\\b", CARD, ""], ids=lambda name: name.replace("/", "|") or "empty"
)
def test_a_file_name_that_leads_elsewhere(server: Server, place: str, bundle: Card, name: str) -> None:
    values = bundle.to_dict()
    values["files"][name] = values["files"][W8A8]
    server.files[f"/{BASE}/{CARD}"] = json.dumps(values).encode()
    assert f"{place}/{CARD}: files.{name} is" in refused(place)
    assert server.asked() == [f"/{BASE}/{CARD}"]
    assert not cached()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../../evil"}, "name is '../../evil'; expected letters"),
        ({"where": "file:///etc"}, "where is 'file:///etc'; expected 'bundled'"),
        ({"files": {name: {"size": 1, "sha256": "../../x"} for name in FILES}}, f"files.{FP32} is"),
        ({"files": {name: {"size": -1, "sha256": "0" * 64} for name in FILES}}, f"files.{FP32} is"),
        ({"where": "recipe only", "files": {}, "metrics": {}, "date": ""}, "is a card without files (recipe only)"),
    ],
    ids=["name", "where", "sha256", "size", "recipe-only"],
)
def test_a_card_that_means_harm(server: Server, place: str, bundle: Card, change: dict[str, object], message: str) -> None:
    server.files[f"/{BASE}/{CARD}"] = json.dumps(bundle.to_dict() | change).encode()
    found = refused(place)
    assert f"{place}/{CARD}: " in found
    assert message in found
    assert not cached()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>please log in</html>", "not readable as JSON"),
        (b"\xff\xfe{}x", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b" " * 2_000_000, "has more than the 1000000 bytes that were expected"),
        (b"", "not readable as JSON"),
    ],
    ids=["html", "no-text", "deep", "endless", "empty"],
)
def test_no_card_at_all(server: Server, place: str, content: bytes, message: str) -> None:
    server.files[f"/{BASE}/{CARD}"] = content
    assert f"{place}/{CARD}: {message}" in refused(place)
    assert not cached()


def test_a_card_that_says_its_files_are_elsewhere_is_taken_for_what_it_is_beside(server: Server, place: str, bundle: Card) -> None:
    values = bundle.to_dict() | {"where": "http://127.0.0.1:9/elsewhere"}
    server.files[f"/{BASE}/{CARD}"] = json.dumps(values).encode()
    verify(fetch(place))
