"""Which files a run loads: what the flags name, or what the merge tools have left where they leave it."""
from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ip_adapter.build import ExtraParts
from ip_adapter.cli import first_existing
from ip_adapter.config import ROOT, InferenceConfig
from ip_adapter.families import SD15, Family
from ldm.checkpoint_file import open_checkpoint
from ldm.errors import UserError
from ldm.names import CONTROLNET_PREFIX

log = logging.getLogger(__name__)


def extra_parts(args: argparse.Namespace) -> ExtraParts:
    """The files that stand in for parts of the checkpoint, a ControlNet for each hint.

    Raises:
        UserError: hints and ControlNets are not equally many.
    """
    hints, files = len(args.control_image), len(args.controlnet)
    if files > hints:
        raise UserError(f"--controlnet is given {files} times, --control_image {hints} times; "
                        "every ControlNet needs a hint")
    if hints - files > 1:
        raise UserError(f"--control_image is given {hints} times, --controlnet {files} times; the checkpoint's own "
                        "ControlNet serves one hint only, give --controlnet for the others")
    return ExtraParts(args.ip_adapter, args.vae, [None] * (hints - files) + args.controlnet)


def default_weights(args: argparse.Namespace, config: InferenceConfig, family: Family = SD15,
                    flag: str = "--ckpt_path", controlled: bool = False) -> Path:
    """The checkpoint to load: the flag's, else the first default that exists and fits.

    Beside a default, the merge tools keep files that differ in kind under names of their own, NAME.KIND.ckpt.

    Args:
        args: parsed flags, of which `ckpt_path` counts.
        config: names the defaults.
        family: whose tool makes them.
        flag: that names a checkpoint, for messages.
        controlled: whether it has to hold a ControlNet.

    Raises:
        UserError: neither flag nor file.
    """
    if args.ckpt_path:
        return args.ckpt_path
    first = first_existing(config.ckpt_path, flag, f"make it with {family.tool} or try --version demo")
    if not controlled or _holds_controlnet(first):
        return first
    named = [Path(folder) / path for path in config.ckpt_path for folder in (".", ROOT)]
    for path in (beside for one in named for beside in sorted(one.parent.glob(f"{one.stem}.*{one.suffix}"))):
        if _holds_controlnet(path):
            log.info("%s holds no ControlNet; using %s", first.name, path)
            return path
    return first


def _holds_controlnet(path: Path) -> bool:
    with open_checkpoint(path) as file:
        return any(name.startswith(CONTROLNET_PREFIX) for name in file.tensors)
