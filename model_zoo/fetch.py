"""Cards and files from elsewhere: from a Hub repository or a URL that holds a bundle, into a cache, every file checked.

A file appears under its name only when its size and sha256 are the card's. Until then it is ``<sha256>.incomplete``, from which the
next try goes on, whatever mirror it asks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import huggingface_hub.constants
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from platformdirs import user_cache_path

from model_zoo.cards import Card, NotPublishedError, check_file, how_to_train, parse_card, read_card, verify
from model_zoo.download import download_file, download_text
from model_zoo.format import BUNDLED, CARD, HUB, RECIPE_ONLY, URL
from quantsim import CheckpointError
from recipes.hub import hub_reachable

CACHE, MIRROR = "QUANTSIM_CACHE", "QUANTSIM_MIRROR"
REGISTRY = Path(__file__).with_name("registry.json")
CARD_LIMIT = 1_000_000  # bytes


# ---- places ----


def cache_folder() -> Path:
    """``QUANTSIM_CACHE``, or ``quantsim`` in the platform's cache folder."""
    return Path(os.environ.get(CACHE) or user_cache_path("quantsim")).expanduser()


def mirrors() -> list[str]:
    """Base URLs that are asked before a card's own place: ``QUANTSIM_MIRROR``, then those of ``registry.json``."""
    given = os.environ.get(MIRROR)
    known: list[str] = json.loads(REGISTRY.read_text(encoding="utf-8"))["mirrors"]
    return [*([given] if given else []), *known]


def place_of(source: str) -> str | None:
    """A ``Card.where`` from what a user writes; ``None`` for what is neither a Hub id nor a URL.

    >>> place_of("owner/name@v1"), place_of("https://host/folder/"), place_of("bert_w8a8_rte")
    ('hub:owner/name@v1', 'https://host/folder', None)
    """
    if URL.fullmatch(source):
        return source.rstrip("/")
    hub = source if source.startswith("hub:") else f"hub:{source}"
    return hub if HUB.fullmatch(hub) else None


def _url(place: str, file: str) -> str:
    if match := HUB.fullmatch(place):
        try:
            return hf_hub_url(match["repo"], file, revision=match["revision"])
        except ValueError as error:
            raise CheckpointError(f"{place}: not a name that the Hub allows ({error})") from error
    return f"{place.rstrip('/')}/{quote(file)}"


def _why_offline(place: str) -> str:
    """Why nothing may be asked there; empty where it may."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "offline mode is on (--offline, HF_HUB_OFFLINE, or the Hub did not answer before)"
    if place.startswith("hub:") and not hub_reachable():
        return "the Hub does not answer"
    return ""


def _not_here(url: str, reason: str) -> str:
    return f"{url}: not in the cache ({cache_folder()}), and {reason}; fetch it once while online"


def _folder(place: str) -> Path:
    readable = re.sub(r"[^\w.-]+", "-", place, flags=re.ASCII)[-80:]
    return cache_folder() / f"{readable}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


# ---- cards ----


def fetch_card(place: str) -> Card:
    """The card of a bundle elsewhere; its files are beside it, and :func:`fetch_files` fetches them.

    Args:
        place: what :func:`place_of` gave.

    Raises:
        CheckpointError: not to be had, or no card (``model_zoo.format.check_card``).
    """
    folder, url = _folder(place), _url(place, CARD)
    if reason := _why_offline(place):
        if not (folder / CARD).is_file():
            raise CheckpointError(_not_here(url, reason))
        return replace(read_card(folder), where=place)
    with _locked(folder), tempfile.TemporaryDirectory(prefix=".card-", dir=cache_folder()) as staging:
        part = Path(staging) / CARD
        try:
            text = download_text(url, part, CARD_LIMIT)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. Expected the {CARD} of a bundle there, as `python -m model_zoo publish` writes it; "
                "what was fetched before is used with --offline"
            ) from error
        card = parse_card(text, url, folder)
        if card.where == RECIPE_ONLY:
            raise NotPublishedError(f"{url}: is a card without files ({RECIPE_ONLY})")
        part.replace(folder / CARD)
    return replace(card, where=place)


# ---- files ----


def fetch_files(card: Card) -> Card:
    """The card with all its files in its folder: bundled ones as they are, others from the cache, a mirror or their place.

    Raises:
        NotPublishedError: there are none; the message names the command that trains them.
        CheckpointError: a file that is not to be had as the card says; what arrived of it is kept for the next try.
    """
    if card.where == RECIPE_ONLY:
        raise NotPublishedError(f"{card.name}: {RECIPE_ONLY}: {card.note}, {how_to_train(card.name)}")
    if card.where == BUNDLED:
        return card
    cached = replace(card, folder=_folder(card.where))
    if not _is_whole(cached):
        with _locked(cached.folder):
            _complete(cached, in_zoo=card.folder != cached.folder)
    return cached


def _complete(card: Card, in_zoo: bool) -> None:
    """Fetch what is missing or changed, and remove what an older version of the card left. Mirrors hold the zoo's own cards."""
    bases = [f"{base.rstrip('/')}/{card.name}" for base in mirrors()] if in_zoo else []
    for name, record in card.files.items():
        if not _is_whole(card, [name]):
            _fetch_file(card.folder / name, record, [*bases, card.where])
    for path in card.folder.iterdir():
        if path.name not in (*card.files, CARD):
            path.unlink()


def _is_whole(card: Card, names: Sequence[str] = ()) -> bool:
    """Whether these files, or all of the folder, are as the card says."""
    try:
        for name in names:
            check_file(card, name)
        if not names:
            verify(card)
    except CheckpointError:
        return False
    return True


def _fetch_file(path: Path, record: Mapping[str, Any], places: Sequence[str]) -> None:
    part = cache_folder() / f"{record['sha256']}.incomplete"
    failures = []
    for place in places:
        url = _url(place, path.name)
        if reason := _why_offline(place):
            failures.append(_not_here(url, reason))
            break
        try:
            download_file(url, part, record["size"], record["sha256"])
        except CheckpointError as error:
            failures.append(str(error))
        else:
            part.replace(path)
            return
    advice = f"{MIRROR}=<base URL> names a mirror that holds <card>/{path.name}; --offline uses what is bundled or in the cache"
    if part.is_file():
        advice = f"the same command goes on from {part.stat().st_size} of {record['size']} bytes; {advice}"
    raise CheckpointError(f"{'; '.join(failures)}. To set it right: {advice}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """``folder`` in the cache, for one process at a time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(cache_folder() / ".lock"):
            yield
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to ({error}); {CACHE} names another cache folder") from error
