"""One engine in a process of its own, so that no engine's threads or memory disturb another's.

Reads a line of JSON, does it, answers with a line of JSON: ``{"run": [rows, tokens]}`` → ``{"seconds": s}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch


def main() -> None:
    engine, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if engine.startswith("AIMET"):
        for name in ("nms", "qnms"):  # its torchvision wants them before anything of transformers is imported, of a CPU build too
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    from benchmarks.engines.engines import ENGINES
    from benchmarks.engines.inputs import batch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    try:
        run = ENGINES[engine](folder)
    except Exception as error:
        print(json.dumps({"error": reason(error)}), file=answers, flush=True)
        return
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        rows, tokens = json.loads(line)["run"]
        inputs = batch(rows, tokens)
        began = time.perf_counter()
        try:
            run(inputs)
            answer: dict[str, object] = {"seconds": time.perf_counter() - began}
        except Exception as error:
            answer = {"error": reason(error)}
        print(json.dumps(answer), file=answers, flush=True)


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    main()
