"""What an image is stored with: every setting under the name of its flag, the command that repeats it, A1111's text."""
from __future__ import annotations

import argparse
import functools
import shlex
from pathlib import Path
from typing import Any

from ip_adapter import __version__
from ip_adapter.cli.parser import Parser
from ldm.errors import UserError
from ldm.files import check_readable, printable

# Flags that an image does not depend on, or that the command states for the one image alone.
NOT_REPEATED = {"prompt", "negative_prompt", "data_path", "negative_data_path", "seed", "n_samples", "n_iter",
                "output_path", "skip_save", "skip_grid", "log_level", "graph_cache", "device_target", "cpu_threads",
                "from_png"}
# Settings every image has, then those that count only where they are given.
ALWAYS = ("prompt", "negative_prompt", "seed", "sampling_steps", "scale", "ip_scale", "sampler", "H", "W", "img")
WHERE_GIVEN = (
    "guider", "discretization", "orig_height", "orig_width", "crop_coords_top", "crop_coords_left", "target_height",
    "target_width", "latents", "ref_img", "ref_mask", "strength", "invert_mask", "paste_original", "mask_blur",
    "control_image", "control_scale", "control_start", "control_end", "canny", "guidance_start", "guidance_end",
    "deep_every")


class Metadata:
    """The texts of the images of a run.

    Args:
        args: parsed flags, as `ip_adapter.cli.inference.inference_args` gives them.
        name: of the model.
        weights: flag -> files of weights that were used.
    """

    def __init__(self, args: argparse.Namespace, name: str, weights: dict):
        self.args, self.name, self.weights = args, name, weights

    @functools.cached_property
    def fingerprints(self) -> dict:
        """Names and sha256 of all weights and input images, `FLAG` and `FLAG_sha256`."""
        from ip_adapter.images.saving import file_sha256
        images = {flag: _as_list(getattr(self.args, flag, None)) for flag in ("img", "ref_img", "ref_mask",
                                                                            "control_image", "latents")}
        names = {flag: ", ".join(path.name for path in paths) for flag, paths in self.weights.items() if paths}
        files = {flag: paths for flag, paths in {**self.weights, **images}.items() if paths}
        return {**names, **{f"{flag}_sha256": ", ".join(file_sha256(path) for path in paths)
                            for flag, paths in files.items()}}

    def of(self, prompt: str, negative_prompt: str, seed: int) -> dict:
        """Name -> text for an image of this prompt and seed."""
        args = {"sampler": "DDIM", **vars(self.args), "prompt": prompt, "negative_prompt": negative_prompt,
                "seed": seed}
        given = [flag for flag in WHERE_GIVEN if args.get(flag) not in (None, [])]
        return {"script": args["script"], **{flag: as_typed(args[flag]) for flag in (*ALWAYS, *given)},
                "dtype": args["dtype"], "model": self.name, **self.fingerprints,
                "program": f"IP-Adapter on MindSpore {__version__}", "command": self._command(args),
                "parameters": self._parameters(args)}

    def _command(self, args: dict) -> str:
        words = [word for action in args["given"] if action.dest not in NOT_REPEATED
                 for word in flag_words(action, args[action.dest])]
        return shlex.join(["python", args["script"], *words, *text_words("--prompt", args["prompt"]),
                           *text_words("--negative_prompt", args["negative_prompt"]), "--seed", str(args["seed"]),
                           "--n_samples", "1"])

    def _parameters(self, args: dict) -> str:
        """The settings as A1111 writes them, for the tools that read that."""
        digest = self.fingerprints.get("ckpt_path_sha256", "")[:10]
        return (f"{args['prompt']}\nNegative prompt: {args['negative_prompt']}\nSteps: {args['sampling_steps']}, "
                f"Sampler: {args['sampler']}, CFG scale: {args['scale']}, Seed: {args['seed']}, Size: "
                f"{args['W']}x{args['H']}, Model hash: {digest}, Model: {self.name}")


def _as_list(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def as_typed(value) -> str:
    """The value of a flag as text; of a repeated flag all its values with commas between them. Of a file that is not
    named relative to where the script runs, only its name: where it lies is nobody's business."""
    if isinstance(value, list):
        return ", ".join(" ".join(map(as_typed, one)) if isinstance(one, list) else as_typed(one) for one in value)
    return value.name if isinstance(value, Path) and value.is_absolute() else str(value)


def flag_words(action: argparse.Action, value: Any) -> list:
    """The words of a command line that give a flag this value."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        return [flag] if value else []
    return [word for one in (value if isinstance(action, argparse._AppendAction) else [value])
            for word in ([flag, *map(as_typed, one)] if isinstance(one, list) else text_words(flag, as_typed(one)))]


def text_words(flag: str, text: str) -> list:
    """A flag and its text, so joined that a text is never taken for a flag."""
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def with_png(words: list, script: str) -> list:
    """The words of a command line, and before them those that made the image of `--from_png`, if it is given.

    Args:
        words: of the command line; flags in them count instead of those of the image.
        script: the name of the script they are for.

    Raises:
        UserError: the image holds no command, or one of another script.
    """
    early = Parser("", add_help=False)
    early.add_argument("--from_png")
    path = early.parse_known_args(early.own_names(words))[0].from_png
    if path is None:
        return words
    made_by, *made = _command_of(path)
    if made_by != script:
        raise UserError(f"--from_png {printable(path)}: was made by {printable(made_by)}; run that script")
    given, kept, taken = {word.split("=")[0] for word in words if word.startswith("--")}, [], True
    for word in made:
        if word.startswith("--"):
            taken = word.split("=")[0] not in given
        kept += [word] if taken else []
    return [*kept, *words]


def _command_of(path: str) -> list:
    """The words that made an image, but for the `python` they begin with."""
    from PIL import Image
    try:
        with Image.open(check_readable(path, "--from_png", "an image made by this script"), formats=["PNG"]) as image:
            words = shlex.split(image.text["command"])[1:]
    except UserError:
        raise
    except (KeyError, SyntaxError, OSError, ValueError):  # also what Pillow says of a file that is no PNG
        words = []
    if not words:
        raise UserError(f"--from_png {printable(path)}: holds no command that made it; expected a PNG that this script "
                        "has written")
    return words
