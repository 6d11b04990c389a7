"""Is the Hub there? Asked once a process, answered within seconds; where it is not, the libraries are told to stay offline.

Left alone, ``datasets`` and ``huggingface_hub`` try again for 25 to 50 seconds before they say that nobody answers.
"""

from __future__ import annotations

import threading
from functools import cache

import datasets.config
import huggingface_hub
import huggingface_hub.constants

PROBE_SECONDS = 2.5
JOIN_SECONDS = 3.0  # a name look-up does not heed the request's time-out


@cache
def hub_reachable() -> bool:
    """One request to the configured endpoint. Where it fails, or offline mode was asked for, :func:`go_offline`."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        go_offline()
        return False
    answers: list[bool] = []
    probe = threading.Thread(target=lambda: answers.append(_answers(huggingface_hub.constants.ENDPOINT)), daemon=True)
    probe.start()
    probe.join(JOIN_SECONDS)
    reachable = answers == [True]
    if not reachable:
        go_offline()
    return reachable


def go_offline() -> None:
    """Let every library that asks the Hub answer from its cache from now on, without a request."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def _answers(endpoint: str) -> bool:
    try:
        return bool(huggingface_hub.get_session().head(endpoint, timeout=PROBE_SECONDS, follow_redirects=True).status_code < 400)
    except Exception:  # whatever the HTTP library of the day raises, nobody answered
        return False
