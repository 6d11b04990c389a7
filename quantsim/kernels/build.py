"""Kernels in C++, compiled for this machine when they are first needed."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
"""Without contraction, a product and a sum are two roundings, as they are in torch. OpenMP's threads are those of torch, which has
loaded its library before."""
CACHE = "QUANTSIM_CACHE"  # the zoo's downloads lie there too


class BuildError(RuntimeError):
    """A kernel that cannot be compiled or loaded here; the message says why, in a line."""


def library(source: Path) -> ctypes.CDLL:
    """The compiled source, from the cache folder (``kernels`` in ``QUANTSIM_CACHE``, else in ``~/.cache/quantsim``) or made now.

    Raises:
        BuildError: no C++ compiler (``CXX``, else ``g++``), a source that it refuses, or a folder that cannot be found or written.
    """
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
        known = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
        texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
        what = "\n".join((*texts, known, *FLAGS, _cpu()))
        folder = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "quantsim").expanduser() / "kernels"
        path = folder / f"{source.stem}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as staging:
                made = Path(staging) / path.name
                subprocess.run([*compiler, *FLAGS, str(source), "-o", str(made)], capture_output=True, text=True, check=True)
                made.replace(path)
        return ctypes.CDLL(str(path))
    except FileNotFoundError as error:
        raise BuildError(f"no C++ compiler: {error.filename} was not found") from error
    except subprocess.CalledProcessError as error:
        refused = next((line for line in error.stderr.splitlines() if "error" in line), "without a word")
        raise BuildError(f"{compiler[0]} refused {source.name}: {refused.split('error:')[-1].strip()}") from error
    except ValueError as error:  # of shlex
        raise BuildError(f"CXX is {os.environ['CXX']!r}: {error}") from error
    except RuntimeError as error:  # of Path.home
        raise BuildError(f"{source.name}: {error}; set {CACHE} to a folder for kernels") from error
    except OSError as error:
        raise BuildError(f"{source.name}: {error}") from error


def why_not(build: Callable[[], object]) -> str:
    """Why a kernel doesn't run here; empty where ``build``, which makes it, has no :class:`BuildError`."""
    try:
        build()
    except BuildError as error:
        return str(error)
    return ""


def _cpu() -> str:
    """What ``-march=native`` depends on, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
