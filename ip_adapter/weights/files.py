"""Which files a run loads: what the flags name, or what the merge tools have left where they leave it."""
from __future__ import annotations

import argparse
import glob
import logging
from pathlib import Path

from ip_adapter.cli.parser import first_existing
from ip_adapter.config import ROOT, InferenceConfig
from ip_adapter.families import SD15, Family
from ip_adapter.weights.loading import ExtraParts
from ip_adapter.weights.parts import ENCODERS, MergedKind, adapter_width, kind_of_file, merged_kind
from ldm.checkpoints.file import open_checkpoint
from ldm.errors import UserError

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
    """The checkpoint to load: the flag's, else the first default that exists; where that does not hold what the run
    needs, one that does and that the merge tool has put into the same folder, named NAME.KIND.ckpt.

    A run needs an adapter, the image encoder that the adapter of --ip_adapter was trained with, and, if it has a hint
    without a ControlNet file, a ControlNet. A line says which file is used instead, and why.

    Args:
        args: parsed flags, of which `ckpt_path` and `ip_adapter` count.
        config: names the defaults.
        family: of the model.
        flag: that names a checkpoint, for messages.
        controlled: whether it has to hold a ControlNet.

    Returns:
        The checkpoint; the first one if none fits: what it lacks is said when it is loaded.

    Raises:
        UserError: neither flag nor file, or the first one is no checkpoint.
    """
    names = [args.ckpt_path] if args.ckpt_path else config.ckpt_path
    named = list(dict.fromkeys(Path(folder) / name for name in names for folder in (".", ROOT)))
    others = [path for one in named for path in sorted(one.parent.glob(f"{glob.escape(one.stem)}.*{one.suffix}"))]
    paths = [path for path in (*named, *others) if path.is_file()]
    first = paths[0] if paths else first_existing(names, flag, f"make it with {family.tool} or try --version demo")
    with open_checkpoint(first) as file:
        kind = merged_kind(file.tensors)
    width = adapter_width(args.ip_adapter) if args.ip_adapter else None
    lacking = _lacking(kind, family, width, bool(args.ip_adapter), controlled)
    for path in paths[1:] if lacking else []:
        other = kind_of_file(path)
        if other and not _lacking(other, family, width, bool(args.ip_adapter), controlled):
            log.info("%s holds no %s; using %s", first, lacking, path)
            return path
    return first


def _lacking(kind: MergedKind, family: Family, width: int | None, adapter_given: bool, controlled: bool) -> str:
    """What a run needs that a file of this kind does not hold, as words that follow "no"; empty if it fits."""
    if kind.family != family.name or not kind.encoder:
        return f"{family.name} model"
    if width not in (None, kind.encoder):
        return f"{ENCODERS.get(width, f'image encoder of width {width}')}, which --ip_adapter was trained with"
    if not (kind.tokens or adapter_given):
        return "adapter"
    return "ControlNet" if controlled and not kind.controlnet else ""
