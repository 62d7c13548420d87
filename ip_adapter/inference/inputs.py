"""The pictures a run is given (image prompt, reference, mask, hints) and the size of the output they imply."""
from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ip_adapter.config import MAX_SIZE
from ip_adapter.images.preprocess import canny, fit, open_image, read_mask
from ldm.errors import UserError
from ldm.files import printable

MAX_PIXELS_UNASKED = 1536 * 1536  # of an output whose size no flag gives: above, attention takes tens of gigabytes


@dataclass
class Hint:
    """What one ControlNet follows.

    Attributes:
        picture: RGB at the size of the output.
        scale: how strongly.
        start: fraction of the steps before it acts.
        end: fraction of the steps after which it no longer acts.
        made: whether the picture was made here, from the edges of another.
    """

    picture: Image.Image
    scale: float
    start: float
    end: float
    made: bool = False

    def acting(self, timesteps: np.ndarray) -> set:
        """Those of a sampler's timesteps at which it acts."""
        return timesteps_between(timesteps, self.start, self.end)


def timesteps_between(timesteps: np.ndarray, start: float, end: float) -> set:
    """Those of a sampler's timesteps whose whole step lies between two fractions of all steps."""
    n = len(timesteps)
    return {float(t) for i, t in enumerate(timesteps) if i / n >= start and (i + 1) / n <= end}


@dataclass
class Inputs:
    """The pictures of a run.

    Attributes:
        image: the image prompt, RGB of any size.
        reference: what is changed, RGB at the size of the output, or None.
        mask: (H, W) bool, True where the reference is repainted, or None.
        hints: one for each ControlNet.
    """

    image: Image.Image
    reference: Image.Image | None
    mask: np.ndarray | None
    hints: list[Hint]

    def shown(self) -> list:
        """What the grid shows on the left of what was made."""
        mask = None if self.mask is None else Image.fromarray(self.mask).convert("RGB")
        pictures = [self.image, self.reference, mask] + [hint.picture for hint in self.hints]
        return [picture for picture in pictures if picture is not None]


def open_inputs(args: argparse.Namespace) -> Inputs:
    """Open the pictures the flags name, and fill in `--H` and `--W` where they were not given.

    The size is the reference's, rounded to multiples of 8; without a reference the first hint's proportions at the
    default size; without both the default.

    Raises:
        UserError: a picture cannot be used, or flags do not fit together.
    """
    image = open_image(args.img)
    reference = open_image(args.ref_img, "--ref_img") if getattr(args, "ref_img", None) else None
    settings = hint_settings(args)
    # Of a hint transparency does not count, as in diffusers; edges are taken from a picture as it is seen.
    pictures = [open_image(path, "--control_image", background="white" if edges != (0, 0) else None)
                for path, (*_, edges) in zip(args.control_image, settings)]
    width, height = args.default_size
    if reference is not None:
        set_size(args, reference.size, f"--ref_img {printable(args.ref_img)}")
    elif pictures:
        shrink = min(width, height) / min(pictures[0].size)
        size = tuple(side * shrink for side in pictures[0].size)
        set_size(args, size, f"--control_image {printable(args.control_image[0])}")
    args.H, args.W = args.H or height, args.W or width
    if reference is not None:
        reference = fit(reference, args.W, args.H, f"--ref_img {printable(args.ref_img)}")
    mask = read_mask(args.ref_mask, args.W, args.H, args.invert_mask) if getattr(args, "ref_mask", None) else None
    hints = []
    for path, picture, (scale, start, end, edges) in zip(args.control_image, pictures, settings):
        picture = fit(picture, args.W, args.H, f"--control_image {printable(path)}")
        made = edges != (0, 0)
        hints.append(Hint(canny(picture, *edges) if made else picture, scale, start, end, made))
    return Inputs(image, reference, mask, hints)


def set_size(args: argparse.Namespace, size: tuple, source: str) -> None:
    """Fill in the sides no flag gives from a picture's width and height, keeping its proportions.

    Raises:
        UserError: the output would be larger than what is made unasked.
    """
    width, height = size
    unasked = args.H is None and args.W is None
    scale = args.H / height if args.H else args.W / width if args.W else 1.0
    rounded = [max(8, 8 * int(side * scale / 8 + 0.5)) for side in size]
    args.W, args.H = args.W or rounded[0], args.H or rounded[1]
    if max(args.W, args.H) > MAX_SIZE or unasked and args.W * args.H > MAX_PIXELS_UNASKED:
        raise UserError(f"{source}: {args.W}x{args.H} pixels, more than are made at once without being asked for; "
                        "give --H or --W, such as --H 768 (the other side follows)")


def hint_settings(args: argparse.Namespace) -> list:
    """(scale, start, end, (low, high) of Canny's edges) for each `--control_image`.

    Raises:
        UserError: a flag without a hint, or given neither once nor once for each hint.
    """
    n = len(args.control_image)
    columns = []
    for flag, default in (("control_scale", args.default_control_scale), ("control_start", 0.0), ("control_end", 1.0),
                          ("canny", (0, 0))):
        values = getattr(args, flag)
        if values and n == 0:
            raise UserError(f"--{flag} has nothing to act on; give --control_image FILE as well")
        if len(values) not in (0, 1, n):
            raise UserError(f"--{flag} is given {len(values)} times, expected once, or {n} times: once for each "
                            "--control_image")
        columns.append((list(values) or [default]) * (1 if len(values) > 1 else n))
    for start, end in zip(columns[1], columns[2]):
        if start >= end:
            raise UserError(f"--control_start {start} is not before --control_end {end}; both are fractions of the "
                            "steps, 0 to 1")
    return list(zip(*columns[:3], (tuple(edges) for edges in columns[3])))
