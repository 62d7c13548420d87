"""Record how torch writes dtypes that have no storage class: every code of both 8-bit floats, and unsigned integers.

    pip install torch==2.13.0
    python tests/record/record_float8.py        -> tests/data/float8.pt
"""
from __future__ import annotations

from pathlib import Path

import torch

CODES = torch.arange(256, dtype=torch.uint8)


def main() -> None:
    """Write the file."""
    wide = CODES.view(torch.float8_e5m2)
    tensors = {"e4m3fn": CODES.view(torch.float8_e4m3fn), "e5m2": wide.reshape(16, 16).t(), "half": wide.half(),
               "uint16": torch.tensor([1, 65535], dtype=torch.uint16)}
    torch.save(tensors, Path(__file__).resolve().parent.parent / "data" / "float8.pt")


if __name__ == "__main__":
    main()
