"""Where a card's files come from: bundled, the cache, a mirror, a Hub repository; and what offline means."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest

from model_zoo import cards, fetch
from model_zoo.cards import Card, NotPublishedError, find, verify, write_card
from model_zoo.fetch import cache_folder, fetch_card, fetch_files, mirrors, place_of
from model_zoo.format import CARD, FP32, W8A8
from quantsim import CheckpointError
from recipes.artifacts import resolve
from recipes.hub import hub_reachable
from recipes.tasks import TASKS, RecipeError
from tests.model_zoo.loopback import Server

NAME = "bert_w8a8_rte"


@pytest.fixture
def zoo(tmp_path: Path, bundle: Card, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo whose card names a place on the server; ``bundle`` is served there."""
    server.publish(bundle.folder, "origin")
    folder = tmp_path / "zoo"
    (folder / NAME).mkdir(parents=True)
    write_card(replace(bundle, where=f"{server.url}/origin"), folder / NAME)
    monkeypatch.setattr(cards, "BUNDLES", folder)
    return folder


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# ---- what a user writes ----


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("owner/name", "hub:owner/name"),
        ("owner/name@v1.0", "hub:owner/name@v1.0"),
        ("owner/name@refs/pr/1", "hub:owner/name@refs/pr/1"),
        ("hub:owner/name", "hub:owner/name"),
        ("https://host/a/b/", "https://host/a/b"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("name", None),
        ("a/b/c", None),
        ("./name", "hub:./name"),
        ("/a/b", None),
        ("ftp://host/a", None),
        ("file:///etc", None),
        ("https://host/a?b", None),
        ("", None),
    ],
)
def test_places(source: str, place: str | None) -> None:
    assert place_of(source) == place


def test_a_name_that_the_hub_does_not_allow(server: Server) -> None:
    with pytest.raises(CheckpointError, match=r"hub:\./name: not a name that the Hub allows"):
        fetch_card("hub:./name")
    assert not server.requests


# ---- the zoo's own cards ----


def test_a_card_whose_files_are_elsewhere(zoo: Path, server: Server, bundle: Card) -> None:
    card = fetch_files(find(NAME))
    verify(card)
    assert sorted(server.asked()) == sorted(f"/origin/{name}" for name in bundle.files)
    assert fetch_files(find(NAME)) == card
    assert len(server.requests) == len(bundle.files)


def test_a_bundled_card_asks_nobody(server: Server, bundle: Card) -> None:
    assert fetch_files(bundle) is bundle
    assert not server.requests
    assert not cache_folder().exists()


def test_recipe_only(server: Server, bundle: Card) -> None:
    with pytest.raises(NotPublishedError) as caught:
        fetch_files(replace(bundle, where="recipe only", note="no data", files={}, metrics={}))
    command = "train it with `python recipes/bert_qat.py --recipe recipes/bert_w8a8/rte.yaml`"
    assert str(caught.value) == f"{NAME}: recipe only: no data, {command}"
    assert not server.requests


# ---- mirrors ----


def test_a_mirror_is_asked_first(zoo: Path, server: Server, bundle: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTSIM_MIRROR", server.publish(bundle.folder, f"mirror/{NAME}").removesuffix(f"{NAME}"))
    verify(fetch_files(find(NAME)))
    assert sorted(server.asked()) == sorted(f"/mirror/{NAME}/{name}" for name in bundle.files)


def test_mirrors_in_order_then_the_place(zoo: Path, server: Server, bundle: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lacks all, the second has one whole file and another's bytes."""
    registry = tmp_path / "registry.json"
    registry.write_text(json.dumps({"mirrors": [f"{server.url}/second"]}))
    monkeypatch.setattr(fetch, "REGISTRY", registry)
    monkeypatch.setenv("QUANTSIM_MIRROR", f"{server.url}/first")
    server.files[f"/second/{NAME}/{W8A8}"] = server.files[f"/origin/{W8A8}"]
    server.files[f"/second/{NAME}/{FP32}"] = server.files[f"/origin/{W8A8}"][: bundle.files[FP32]["size"]]
    verify(fetch_files(find(NAME)))
    assert [path for path in server.asked() if path.endswith(W8A8)] == [f"/first/{NAME}/{W8A8}", f"/second/{NAME}/{W8A8}"]
    assert [path for path in server.asked() if path.endswith(FP32)] == [
        f"/first/{NAME}/{FP32}",
        f"/second/{NAME}/{FP32}",
        f"/origin/{FP32}",
    ]


def test_what_a_mirror_began_another_ends(zoo: Path, server: Server, bundle: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTSIM_MIRROR", f"{server.url}/mirror")
    server.publish(bundle.folder, f"mirror/{NAME}")
    server.plan(f"/mirror/{NAME}/{W8A8}", "drop", *["dead"] * 6)
    verify(fetch_files(find(NAME)))
    (rest,) = [request.range for request in server.requests if request.path == f"/origin/{W8A8}"]
    assert rest
    assert rest.startswith("bytes=")


def test_every_place_that_failed_is_named(zoo: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTSIM_MIRROR", f"{server.url}/mirror")
    server.files.clear()
    with pytest.raises(CheckpointError, match=rf"/mirror/{NAME}/\S+: answered 404; {server.url}/origin/\S+: answered 404\. To set"):
        fetch_files(find(NAME))


def test_a_mirror_is_not_asked_for_what_is_not_the_zoo_s(server: Server, bundle: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTSIM_MIRROR", f"{server.url}/mirror")
    verify(fetch_files(fetch_card(server.publish(bundle.folder, "theirs"))))
    assert not [path for path in server.asked() if "mirror" in path]


def test_the_registry_is_read() -> None:
    assert [mirror for mirror in mirrors() if not mirror.startswith("http")] == []


# ---- the Hub ----


@pytest.mark.parametrize(("source", "revision"), [("owner/name", "main"), ("owner/name@refs/pr/1", "refs%2Fpr%2F1")])
def test_a_hub_repository(server: Server, bundle: Card, source: str, revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.publish(bundle.folder, f"owner/name/resolve/{revision}")
    place = place_of(source)
    assert place
    card = fetch_files(fetch_card(place))
    verify(card)
    assert card.where == f"hub:{source}"
    assert {request.authorization for request in server.requests} == {"Bearer hf_secret"}


def test_the_token_is_for_the_hub_alone(server: Server, bundle: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1")  # as long a prefix as can be
    fetch_files(fetch_card(server.publish(bundle.folder, "theirs")))
    assert {request.authorization for request in server.requests} == {None}


def test_no_such_repository(server: Server) -> None:
    with pytest.raises(CheckpointError, match=rf"/owner/no/resolve/main/{CARD}: answered 404\. Expected the {CARD} of a bundle there"):
        fetch_card("hub:owner/no")


def test_a_hub_that_is_out_of_reach(server: Server, bundle: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish(bundle.folder, "owner/name/resolve/main")
    card = fetch_files(fetch_card("hub:owner/name"))
    server.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub_reachable.cache_clear()
    assert fetch_files(fetch_card("hub:owner/name")) == card
    with pytest.raises(CheckpointError, match=r"not in the cache .*, and offline mode is on .* or the Hub did not answer before"):
        fetch_card("hub:owner/other")
    assert not server.requests


# ---- offline and the cache ----


def test_offline_uses_the_cache(zoo: Path, server: Server, bundle: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = server.publish(bundle.folder, "theirs")
    before = fetch_files(fetch_card(theirs)), fetch_files(find(NAME))
    server.requests.clear()
    offline(monkeypatch)
    monkeypatch.setattr(fetch, "_locked", None)  # a cache that is whole need not be writable
    assert (fetch_files(fetch_card(theirs)), fetch_files(find(NAME))) == before
    assert not server.requests


def test_offline_names_what_is_not_in_the_cache(zoo: Path, server: Server, bundle: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = server.publish(bundle.folder, "theirs")
    card = fetch_card(theirs)
    offline(monkeypatch)
    first = next(iter(bundle.files))
    for fetching, what in [
        (lambda: fetch_card(f"{theirs}/more"), f"/theirs/more/{CARD}"),
        (lambda: fetch_files(card), f"/theirs/{first}"),
        (lambda: fetch_files(find(NAME)), f"/origin/{first}"),
    ]:
        with pytest.raises(CheckpointError, match=rf"{what}: not in the cache \(.*cache\), and offline mode is on .*fetch it once while"):
            fetching()
    assert server.asked() == [f"/theirs/{CARD}"]


def test_the_cache_folder(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Card) -> None:
    monkeypatch.setenv("QUANTSIM_CACHE", str(tmp_path / "elsewhere"))
    card = fetch_files(fetch_card(server.publish(bundle.folder, "theirs")))
    assert card.folder.parent == tmp_path / "elsewhere"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTSIM_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot be written to .*QUANTSIM_CACHE names another"):
        fetch_card(f"{server.url}/theirs")
    monkeypatch.delenv("QUANTSIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder().name == "quantsim"


# ---- --checkpoint ----


def test_a_checkpoint_is_a_name_a_folder_a_hub_id_or_a_url(zoo: Path, server: Server, bundle: Card) -> None:
    server.publish(bundle.folder, "owner/name/resolve/main")
    for checkpoint in (NAME, str(bundle.folder), "owner/name", f"{server.url}/origin", None):
        artifact = resolve(NAME, checkpoint, TASKS["rte"])
        assert artifact.hashes[W8A8] == bundle.files[W8A8]["sha256"]
        assert artifact.load_float().config.num_labels == 2


def test_a_folder_s_files_are_beside_its_card(server: Server, bundle: Card) -> None:
    write_card(replace(bundle, where=f"{server.url}/origin"), bundle.folder)
    assert resolve(NAME, str(bundle.folder), TASKS["rte"]).card == bundle
    assert not server.requests


def test_a_checkpoint_of_another_task_is_not_fetched(zoo: Path, server: Server) -> None:
    with pytest.raises(RecipeError, match="is a checkpoint for rte"):
        resolve("bert_w8a8_cola", f"{server.url}/origin", TASKS["cola"])
    assert server.asked() == [f"/origin/{CARD}"]


def test_a_checkpoint_that_is_nowhere(server: Server) -> None:
    with pytest.raises(CheckpointError, match=r"runs/rte: no folder here, so it was looked for at hub:runs/rte: .*answered 404"):
        resolve(NAME, "runs/rte", TASKS["rte"])
