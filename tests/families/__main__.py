"""``python -m tests.families [FAMILY …]`` checks families (all by default) and writes their rows of docs/families.csv and .md."""

from __future__ import annotations

import sys

import torch

from tests.families.configs import FAMILIES
from tests.families.table import read_rows, row_of, write


def main(names: list[str]) -> None:
    unknown = set(names) - {family.name for family in FAMILIES}
    if unknown:
        raise SystemExit(f"no family {', '.join(sorted(unknown))}; there are {', '.join(f.name for f in FAMILIES)}")
    torch.set_num_threads(1)
    for family in FAMILIES:
        if not names or family.name in names:
            row = row_of(family)
            print(row, flush=True)
            write(read_rows() | {family.name: row})  # what is done stays, whenever the run ends


if __name__ == "__main__":
    main(sys.argv[1:])
