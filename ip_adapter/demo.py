"""The demo model that ships with the project: small networks of the real architecture, merged on first use."""
from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from ip_adapter.config import ROOT
from ip_adapter.merge import merge_sd
from ip_adapter.standins import write_sd_standins

log = logging.getLogger(__name__)


def demo_checkpoint(folder: Path = ROOT / "checkpoints" / "demo") -> Path:
    """The merged checkpoint of the SD-1.5 demo model; made by the merge tool's code if it is not there yet.

    Its weights are seeded stand-ins for now, so its pictures are noise; that is said in one line.
    """
    path = folder / "sd_demo.ckpt"
    if not path.exists():
        with tempfile.TemporaryDirectory() as parts:
            merge_sd(**write_sd_standins(Path(parts)), out=path)
    log.info("The demo model has no trained weights yet: its pictures are noise made by seeded stand-ins.")
    return path
