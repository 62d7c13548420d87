"""Compiled graphs kept from run to run, for a minute or more of compiling each time.

MindSpore keeps graphs by their number in a run and asks only whether the code has changed, so a graph of another size
would be taken for the right one. Here every kind of run has a folder of its own.
"""
from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import mindspore as ms

from ip_adapter.build import ImagePromptModel
from ip_adapter.config import ROOT
from ldm.device import keep_graphs

# Flags that only say what goes through the graphs and where results go. All others may change graphs or their order.
DATA_FLAGS = {"img", "prompt", "negative_prompt", "data_path", "negative_data_path", "ip_scale", "scale", "seed",
              "latents", "ref_img", "ref_mask", "invert_mask", "paste_original", "mask_blur", "control_image", "config",
              "ckpt_path", "ip_adapter", "vae", "n_iter", "output_path", "skip_save", "skip_grid", "log_level",
              "graph_cache"}


def keep_run_graphs(folder: Path, model: ImagePromptModel, args: argparse.Namespace) -> Path:
    """Keep the graphs of this run below `folder`, and use those that a run like it has left there.

    Args:
        folder: of all kept graphs; made if it is not there.
        model: whose networks the graphs are of; nothing of it has run yet.
        args: all flags, defaults filled in.

    Returns:
        The folder of runs like this one.
    """
    flags = {name: str(value) for name, value in vars(args).items() if name not in DATA_FLAGS}
    given = {name: getattr(args, name, None) is not None for name in ("ref_img", "ref_mask")}
    networks = [model.embedder.image_encoder, model.embedder.image_proj, *model.diffusion.text_encoders,
                model.diffusion.unet, model.diffusion.vae, *model.diffusion.controlnets]
    weights = [[repr(network.config)] + [(name, parameter.shape, str(parameter.dtype))
                                         for name, parameter in network.parameters_and_names()]
               for network in networks]
    key = hashlib.sha256(json.dumps([ms.__version__, flags, given, args.scale > 1, weights]).encode())
    for path in sorted(path for package in ("ldm", "gm", "ip_adapter") for path in (ROOT / package).rglob("*.py")):
        key.update(path.read_bytes())
    kept = folder / key.hexdigest()[:16]
    keep_graphs(kept)
    return kept
