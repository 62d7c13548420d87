"""Compiled graphs kept from run to run, for half a minute or more of compiling each time.

MindSpore keeps graphs by their number in a run and asks only whether the code has changed, so a graph of another size
would be taken for the right one. Here every kind of run has a folder of its own. Nor does it look at what it reads: one
flipped byte ends the process. So checksums are kept with the graphs, and what is damaged is compiled anew.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path

import mindspore as ms

from ip_adapter.config import ROOT
from ip_adapter.weights.loading import ImagePromptModel
from ldm.device import keep_graphs, on_ascend
from ldm.errors import UserError
from ldm.files import cache_folder, printable, reason, temporary_folder, write_text

# Flags that only say what goes through the graphs and where results go. All others may change graphs or their order.
DATA_FLAGS = {"img", "prompt", "negative_prompt", "data_path", "negative_data_path", "ip_scale", "scale", "seed",
              "latents", "ref_img", "ref_mask", "invert_mask", "paste_original", "mask_blur", "control_image", "config",
              "ckpt_path", "ip_adapter", "vae", "n_iter", "output_path", "skip_save", "skip_grid", "log_level",
              "graph_cache", "from_png", "script", "given"}
# Where any of these is given, the number of steps decides which graph is called when.
STEP_FLAGS = "guidance_start", "guidance_end", "deep_every", "control_image"
# So many kinds of runs are kept, those used last: 45 MB each for SD-1.5. What a killed run has left goes after a day.
KEPT, LEFT_SECONDS = 10, 86400
SUMS = "sums.json"

log = logging.getLogger(__name__)


class RunGraphs:
    """The graphs of a run and of those like it, in a folder that holds all of them or is not there.

    Args:
        folder: of all kept graphs; made by `use`.
        model: whose networks the graphs are of; nothing of it has run yet.
        args: all flags, defaults filled in.
    """

    def __init__(self, folder: Path, model: ImagePromptModel, args: argparse.Namespace):
        self.path = folder / _key(model, args)
        self.unfinished: Path | None = None  # gone when the process ends
        self._cleanup = contextlib.ExitStack()

    @property
    def kept(self) -> bool:
        """Whether a run like this one has left its graphs."""
        return self.path.is_dir()

    @property
    def new(self) -> Path:
        """Where graphs are while they are compiled."""
        return self.unfinished / "graphs"

    def drop_damaged(self) -> None:
        """Remove kept graphs that are not what was kept.

        Raises:
            OSError: they cannot be removed.
        """
        if self.kept and not _whole(self.path):
            log.warning("compiled graphs in %s are damaged; they are compiled anew", printable(self.path))
            shutil.rmtree(self.path)

    def use(self) -> None:
        """From now on MindSpore takes the kept graphs, or keeps those it compiles.

        Raises:
            OSError: the folder cannot be written to.
        """
        if self.kept:
            os.utime(self.path)
            keep_graphs(self.path)
            return
        atexit.register(self._cleanup.close)
        self.unfinished = self._cleanup.enter_context(temporary_folder(self.path.parent, f"{self.path.name}-"))
        self.new.mkdir()
        keep_graphs(self.new)

    def keep(self) -> None:
        """Let later runs use what this one has compiled, now that it is complete; forget the oldest.

        The images are made by now, so whatever goes wrong costs the next run its time and no more.
        """
        if self.unfinished is None:
            return
        try:
            if not self.kept:  # they are where another run was faster
                write_text(self.new / SUMS, json.dumps(_sums(self.new)))
                self.new.rename(self.path)
        except OSError as error:
            if not self.kept:
                log.info("compiled graphs are not kept in %s (%s)", printable(self.path.parent), reason(error))
        self._cleanup.close()
        with contextlib.suppress(OSError):
            _forget(self.path.parent)


def _sums(folder: Path) -> dict:
    """Path in the folder -> sha256 of each file in it but the list of sums."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if not path.is_dir() and path != folder / SUMS}


def _whole(folder: Path) -> bool:
    """Whether a folder holds the files that were kept in it, and nothing else."""
    try:
        return json.loads((folder / SUMS).read_bytes()) == _sums(folder)
    except (OSError, ValueError, RecursionError):
        return False


def _forget(folder: Path) -> None:
    """Remove the graphs used longest ago, and what killed runs have left; another run may be doing the same."""
    whole, left = [], []
    for path in folder.iterdir():
        if re.fullmatch(r"[0-9a-f]{16}(-\w+)?", path.name):
            with contextlib.suppress(OSError):
                (left if "-" in path.name else whole).append((path.stat().st_mtime, path))
    old = [pair for pair in left if pair[0] < time.time() - LEFT_SECONDS]
    for _, path in sorted(whole, reverse=True)[KEPT:] + old:
        shutil.rmtree(path, ignore_errors=True)


def run_graphs(model: ImagePromptModel, args: argparse.Namespace) -> RunGraphs | None:
    """Those of a run, below `--graph_cache` or the user's cache; None where no graphs are kept.

    They are not if this process may have compiled others before, for then their numbers differ.
    """
    folder = args.graph_cache
    if folder is None:
        folder = None if on_ascend() else cache_folder()
    if folder is None or str(folder) == "none" or not args.own_process:
        return None
    graphs = RunGraphs(folder, model, args)
    try:
        graphs.drop_damaged()
    except OSError as error:
        log.warning("compiled graphs are not used: %s cannot be removed (%s)", printable(graphs.path), reason(error))
        return None
    return graphs


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
            raise UserError(f"--graph_cache {printable(args.graph_cache)}: cannot write there ({reason(error)}); name "
                            "another folder") from None
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
