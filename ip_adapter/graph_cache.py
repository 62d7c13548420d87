"""Compiled graphs kept from run to run, for half a minute or more of compiling each time.

MindSpore keeps graphs by their number in a run and asks only whether the code has changed, so a graph of another size
would be taken for the right one. Here every kind of run has a folder of its own.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import mindspore as ms

from ip_adapter.build import ImagePromptModel
from ip_adapter.config import ROOT
from ldm.device import keep_graphs, on_ascend
from ldm.errors import UserError

# Flags that only say what goes through the graphs and where results go. All others may change graphs or their order.
DATA_FLAGS = {"img", "prompt", "negative_prompt", "data_path", "negative_data_path", "ip_scale", "scale", "seed",
              "latents", "ref_img", "ref_mask", "invert_mask", "paste_original", "mask_blur", "control_image", "config",
              "ckpt_path", "ip_adapter", "vae", "n_iter", "output_path", "skip_save", "skip_grid", "log_level",
              "graph_cache"}
# Where any of these is given, the number of steps decides which graph is called when.
STEP_FLAGS = "guidance_start", "guidance_end", "deep_every", "control_image"
# So many kinds of runs are kept, those used last: 45 MB each for SD-1.5. What a killed run has left goes after a day.
KEPT, LEFT_SECONDS = 10, 86400


class RunGraphs:
    """The graphs of a run and of those like it, in a folder that holds all of them or is not there.

    Args:
        folder: of all kept graphs; made by `use`.
        model: whose networks the graphs are of; nothing of it has run yet.
        args: all flags, defaults filled in.
    """

    def __init__(self, folder: Path, model: ImagePromptModel, args: argparse.Namespace):
        self.path = folder / _key(model, args)
        self.unfinished: tempfile.TemporaryDirectory | None = None  # removed when Python exits

    @property
    def kept(self) -> bool:
        """Whether a run like this one has left its graphs."""
        return self.path.is_dir()

    @property
    def new(self) -> Path:
        """Where graphs are while they are compiled."""
        return Path(self.unfinished.name) / "graphs"

    def use(self) -> None:
        """From now on MindSpore takes the kept graphs, or keeps those it compiles.

        Raises:
            OSError: the folder cannot be written to.
        """
        if self.kept:
            os.utime(self.path)
            keep_graphs(self.path)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished = tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f"{self.path.name}-")
        self.new.mkdir()
        keep_graphs(self.new)

    def keep(self) -> None:
        """Let later runs use what this one has compiled, now that it is complete; forget the oldest."""
        if self.unfinished is None:
            return
        if not self.kept:  # they are where another run was faster
            self.new.rename(self.path)
        self.unfinished.cleanup()
        folders = [(path.stat().st_mtime, path) for path in self.path.parent.iterdir()
                   if re.fullmatch(r"[0-9a-f]{16}(-\w+)?", path.name)]
        whole = sorted((pair for pair in folders if "-" not in pair[1].name), reverse=True)
        left = [(used, path) for used, path in folders if "-" in path.name and used < time.time() - LEFT_SECONDS]
        for _, path in whole[KEPT:] + left:
            shutil.rmtree(path, ignore_errors=True)


def run_graphs(model: ImagePromptModel, args: argparse.Namespace) -> RunGraphs | None:
    """Those of a run, below `--graph_cache` or the user's cache; None where no graphs are kept.

    They are not if this process may have compiled others before, for then their numbers differ.
    """
    folder = args.graph_cache
    if folder is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path("none") if on_ascend() else caches / "ip_adapter"
    return RunGraphs(folder, model, args) if args.own_process and str(folder) != "none" else None


def use_graphs(graphs: RunGraphs, args: argparse.Namespace) -> RunGraphs | None:
    """Those of `run_graphs` in use, or None where the user's cache cannot be written to.

    Raises:
        UserError: the folder of `--graph_cache` cannot be.
    """
    try:
        graphs.use()
        return graphs
    except OSError as error:
        if args.graph_cache is not None:
            raise UserError(f"--graph_cache {args.graph_cache}: cannot write there ({error.strerror}); name another "
                            "folder") from None
        return None


def _key(model: ImagePromptModel, args: argparse.Namespace) -> str:
    """The same for all runs that call the same graphs in the same order."""
    ordered = any(getattr(args, name, None) not in (None, []) for name in STEP_FLAGS)
    flags = {name: str(value) for name, value in vars(args).items()
             if name not in DATA_FLAGS and (ordered or name != "sampling_steps")}
    given = {name: getattr(args, name, None) is not None for name in ("ref_img", "ref_mask")}
    networks = [model.embedder.image_encoder, model.embedder.image_proj, *model.diffusion.text_encoders,
                model.diffusion.unet, model.diffusion.vae, *model.diffusion.controlnets]
    weights = [[repr(network.config)] + [(name, parameter.shape, str(parameter.dtype))
                                         for name, parameter in network.parameters_and_names()]
               for network in networks]
    key = hashlib.sha256(json.dumps([ms.__version__, on_ascend(), flags, given, args.scale > 1, weights]).encode())
    for path in sorted(path for package in ("ldm", "gm", "ip_adapter") for path in (ROOT / package).rglob("*.py")):
        key.update(path.read_bytes())
    return key.hexdigest()[:16]
