"""One file from one URL into a partial file: it goes on where it stopped, shows a bar, and never takes more than was announced.

The transfer is ``huggingface_hub``'s ``http_get``, which resumes by a ``Range`` request, starts over where a server ignores that,
and tries again after a dropped connection or a silent server (``HF_HUB_DOWNLOAD_TIMEOUT`` seconds). ``pooch`` checks hashes but
does not resume.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from tqdm import tqdm

from quantsim import CheckpointError
from quantsim.formats.checkpoint import file_sha256

CHUNK = 64 * 1024  # bytes; what arrived of a chunk is lost when the connection drops, and the library's chunks are 10 MB
NOT_SATISFIABLE = 416


def download_file(url: str, part: Path, size: int, sha256: str) -> None:
    """Fill ``part`` with what is at a URL, all of it and nothing else.

    What it already holds is not asked for again, unless the whole turns out wrong.

    Raises:
        CheckpointError: the disk is too full, or as :func:`_transfer`, and ``part`` is kept where a second try can go on from it;
            another size or sha256, and ``part`` is removed.
    """
    done = _size(part)
    if (free := shutil.disk_usage(part.parent).free) < size - done:
        raise CheckpointError(f"{part.parent}: {free} bytes are free; {url} needs {size - done}")
    if done > size:
        part.unlink()
    try:
        if _size(part) != size:
            _transfer(url, part, limit=size, size=size)
    finally:
        if part.is_file() and not _size(part):
            part.unlink()
    if (found := file_sha256(part)) != sha256:
        part.unlink()
        if not done:
            raise CheckpointError(f"{url}: sha256 is {found}; the card expects {sha256}. Nothing of it was kept")
        download_file(url, part, size, sha256)  # the beginning may have been another server's


def download_text(url: str, part: Path, limit: int) -> bytes:
    """What is at a URL, through ``part``, if it has at most ``limit`` bytes. Errors as :func:`_transfer`."""
    _transfer(url, part, limit=limit, size=None)
    return part.read_bytes()


def _transfer(url: str, part: Path, *, limit: int, size: int | None) -> None:
    """The request, and the library's many errors as one kind.

    Raises:
        CheckpointError: an answer that is not 200, a connection that is refused, dropped or silent (``part`` is kept); more bytes
            than ``limit`` or another number than ``size`` (``part`` is removed).
    """
    try:
        with _chunks(CHUNK), _Bounded(part, limit, url) as file:
            name = url.rpartition("/")[2]
            http_get(
                url, file, resume_size=file.tell(), headers=_headers(url), expected_size=size, displayed_filename=name, tqdm_class=tqdm
            )
    except CheckpointError:
        part.unlink()
        raise
    except HfHubHTTPError as error:  # an OSError too
        status = getattr(error.response, "status_code", None)
        if status == NOT_SATISFIABLE:
            found = _size(part)
            part.unlink()
            raise CheckpointError(f"{url}: has no more than {found} bytes; the card expects {size}. Nothing of it was kept") from error
        raise CheckpointError(f"{url}: answered {status}") from error
    except OSError as error:
        if error.errno is not None:
            raise CheckpointError(f"{url}: cannot be stored in {part.parent} ({error})") from error
        found = _size(part)
        part.unlink()
        raise CheckpointError(f"{url}: has {found} bytes; the card expects {size}. Nothing of it was kept") from error
    except Exception as error:  # whatever the HTTP library of the day raises, the connection failed
        raise CheckpointError(f"{url}: the connection failed after {_size(part)} bytes ({type(error).__name__}: {error})") from error


class _Bounded(io.BufferedWriter):
    """A file that is appended to and refuses to grow beyond ``limit`` bytes."""

    def __init__(self, path: Path, limit: int, url: str) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._limit, self._url = limit, url

    def write(self, data: bytes) -> int:  # type: ignore[override]  # the library writes bytes alone
        if self.tell() + len(data) > self._limit:
            raise CheckpointError(f"{self._url}: has more than the {self._limit} bytes that were expected. Nothing of it was kept")
        return super().write(data)


@contextmanager
def _chunks(size: int) -> Iterator[None]:
    constants = huggingface_hub.constants
    before = constants.DOWNLOAD_CHUNK_SIZE
    constants.DOWNLOAD_CHUNK_SIZE = size
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = before


def _headers(url: str) -> dict[str, str]:
    """The user's token for the Hub alone; the file's own bytes from everybody, so that sizes and ranges are the file's."""
    token = build_hf_headers() if url.startswith(f"{huggingface_hub.constants.ENDPOINT}/") else {}
    return {**token, "Accept-Encoding": "identity"}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
