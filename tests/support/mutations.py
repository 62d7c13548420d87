"""Damaged copies of files."""
from __future__ import annotations

import random


def mutations(content: bytes, seed: int, count: int) -> list:
    """Copies with one to three bytes changed, a piece cut out or put in, or the end missing or zero."""
    rng, out = random.Random(seed), []
    for n in range(count):
        bad, at = bytearray(content), rng.randrange(len(content))
        if n % 4 < 2:
            for _ in range(rng.randint(1, 3)):
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        elif n % 4 == 2:
            bad[at : at + rng.randint(0, 20)] = rng.randbytes(rng.randint(0, 20))
        else:
            bad[at:] = bytes(rng.choice((0, len(bad) - at)))
        out.append(bytes(bad))
    return out
