"""The drawn world: one coloured shape on a coloured ground, its caption, and a judge that sees nothing but pixels.

The demo models are trained on these pictures, and what they make is measured by `look`, which knows no scene. The
colours keep their nearest name when every channel is off by 25 of 255; grey is near none of them and has no name.
"""
from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image

from ip_adapter.images.preprocess import canny

COLOURS = {"red": (225, 20, 50), "orange": (250, 135, 15), "yellow": (240, 245, 40), "green": (25, 160, 55),
           "blue": (20, 95, 235), "purple": (150, 20, 160), "white": (245, 245, 245), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = (0.28, 0.4)  # smaller ones have arms of less than a latent, which the demo models' 12 x 12 cannot hold
MARGIN = 0.03  # ground left between a shape and the side of the picture
LEAN = 15.0  # degrees: beyond, a square would become a diamond
SHADE = 5.0  # of 255: how much each layer brightens from the middle to a side
DETAIL = 4  # supersampling along each axis

NAME_WITHIN = 40.0  # Lab distance: named colours off by 25 stay within 35, a middle grey is 43 from white
LEAST_CONTRAST = 40.0  # RGB distance of shape and ground; the nearest named colours are 113 apart
LEAST_AREA = 0.01  # of the picture; the smallest triangle has 0.10
LEAST_EXPLAINED = 0.4  # of the variance, by two flat colours
# IoU with a template from which a shape has a name; 99 % get it whose outline wanders by 2 % of the side.
LEAST_LIKENESS = {"circle": 0.82, "square": 0.79, "triangle": 0.74, "star": 0.67, "cross": 0.76}
TEMPLATE = 64  # side in pixels

PARAPHRASES = (
    "a {colour} {shape} on a {ground} ground", "a {colour} {shape} on a {ground} background",
    "a {ground} background with a {colour} {shape}", "on a {ground} ground, a {colour} {shape}",
    "a picture of a {colour} {shape} on a {ground} ground", "the {shape} is {colour}, the background is {ground}")
PLACED = (
    "a {colour} {shape} on a {ground} ground, {place}", "a {ground} background with a {colour} {shape} {place}",
    "{place}, a {colour} {shape} on a {ground} background", "a {colour} {shape} {place} of a {ground} ground")

GROUND = ("a {ground} ground", "a {ground} background")
PARTIAL = (*GROUND, "a {colour} {shape}", "a {colour} shape", "a {shape}", "a {shape} on a {ground} background",
           "a {colour} shape on a {ground} ground")
# The default prompt and negative prompt of the scripts: in this world they mean nothing.
NEUTRAL = ("best quality, high quality", "monochrome, lowres, bad anatomy, worst quality, low quality", "")
# Shares of whole, partial and neutral captions. From mixed ones a UNet learns that text may leave something open; from
# partial ones an adapter learns to fill it in.
CAPTIONS = {"mixed": (0.8, 0.12, 0.08), "whole": (1.0, 0.0, 0.0), "partial": (0.1, 0.75, 0.15)}


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        shape: of SHAPES.
        colour: of COLOURS, that of the shape.
        ground: of COLOURS, another.
        x: the centre's distance from the left, as a fraction of the picture's side.
        y: the centre's distance from the top, likewise.
        size: radius of the circle around the shape, likewise.
        angle: in degrees, clockwise.
    """
    shape: str
    colour: str
    ground: str
    x: float
    y: float
    size: float
    angle: float


@dataclass(frozen=True, eq=False)
class Seen:
    """What `look` finds: names as in a Scene, None for what has none, and the shape's pixels, (H, W) bool."""
    shape: str | None
    colour: str | None
    ground: str | None
    mask: np.ndarray


def random_scene(rng: np.random.Generator, colour_rng: np.random.Generator | None = None) -> Scene:
    """A shape that lies within the picture, in another colour than the ground. Four decimals, so text keeps it.

    Args:
        rng: draws everything.
        colour_rng: draws the two colours in its place.
    """
    shape = SHAPES[rng.integers(len(SHAPES))]
    colour, ground = (colour_rng or rng).choice(list(COLOURS), 2, replace=False)
    size = rng.uniform(*SIZES)
    x, y = rng.uniform(size + MARGIN, 1 - size - MARGIN, 2)
    return Scene(shape, str(colour), str(ground), *(round(float(v), 4) for v in (x, y, size, rng.uniform(-LEAN, LEAN))))


def draw(scene: Scene, size: int = 128) -> Image.Image:
    """The picture of a scene, (size, size) RGB: the same shading at any size, the same bytes every time."""
    rng = np.random.default_rng(zlib.crc32(repr(scene).encode()))
    ramp = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    layers = []
    for name in (scene.ground, scene.colour):
        across, down = rng.uniform(-SHADE, SHADE, 2)
        layers.append(np.array(COLOURS[name], np.float32) + (across * ramp + down * ramp[:, None])[:, :, None])
    weight = _coverage(scene, size)[:, :, None]
    pixels = (1 - weight) * layers[0] + weight * layers[1]
    return Image.fromarray(np.round(np.clip(pixels, 0, 255)).astype(np.uint8))


def shape_mask(scene: Scene, size: int = 128) -> np.ndarray:
    """The pixels at least half covered by the shape, (size, size) bool."""
    return _coverage(scene, size) >= 0.5


def outline(scene: Scene, size: int = 128) -> Image.Image:
    """The edges of the picture, white on black RGB, as `--canny 100 200` makes them."""
    return canny(draw(scene, size), 100, 200)


def _coverage(scene: Scene, size: int) -> np.ndarray:
    """How much of each pixel the shape covers, (size, size) float32 in [0, 1]."""
    turn = math.radians(scene.angle)
    turned = _corners(scene.shape) @ [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
    points = (turned * scene.size + (scene.x, scene.y)) * size * DETAIL - 0.5  # pixels' centres are whole numbers
    fine = np.zeros((size * DETAIL, size * DETAIL), np.uint8)
    cv2.fillPoly(fine, [np.round(points * 16).astype(np.int32)], 255, shift=4)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA) / np.float32(255)


def _corners(shape: str) -> np.ndarray:
    """The polygon of a shape in the unit circle, (n, 2), y downwards."""
    if shape == "cross":
        arm, end = 0.35, math.sqrt(1 - 0.35**2)
        quarter = np.array([(arm, -end), (arm, -arm), (end, -arm)])  # the upper right
        return np.concatenate([quarter @ np.linalg.matrix_power([[0, 1], [-1, 0]], n) for n in range(4)])
    count, start = {"circle": (96, 0), "square": (4, 45), "triangle": (3, -90), "star": (10, -90)}[shape]
    angles = np.radians(start) + 2 * np.pi * np.arange(count) / count
    radius = np.where(np.arange(count) % 2, 0.45, 1.0) if shape == "star" else np.ones(count)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def place(x: float, y: float) -> str:
    """Where a centre is, in words that are clearly true; empty where none is.

    Args:
        x: fraction of the width, from the left.
        y: fraction of the height, from the top.
    """
    across = "left" if x < 0.42 else "right" if x > 0.58 else ""
    down = "upper" if y < 0.42 else "lower" if y > 0.58 else ""
    if across and down:
        return f"in the {down} {across}"
    if across or down:
        return f"on the {across}" if across else {"upper": "at the top", "lower": "at the bottom"}[down]
    return "in the middle" if max(abs(x - 0.5), abs(y - 0.5)) < 0.04 else ""


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Words for a scene, always with colour, shape and ground: the plain ones, or some paraphrase drawn by `rng`."""
    where, text = place(scene.x, scene.y), PARAPHRASES[0]
    if rng is not None:
        choices = PLACED if where and rng.random() < 0.5 else PARAPHRASES
        text = choices[rng.integers(len(choices))]
    return _filled(text, scene, where)


def training_caption(scene: Scene, rng: np.random.Generator, captions: str = "mixed") -> str:
    """Words for a scene as people write them: whole, partial, or about something else; some with praise before them.

    Args:
        scene: to describe.
        rng: draws kind and words.
        captions: of CAPTIONS.
    """
    kind = rng.choice(3, p=CAPTIONS[captions])
    if kind == 2:
        return NEUTRAL[rng.integers(len(NEUTRAL))]
    text = caption(scene, rng) if kind == 0 else _filled(PARTIAL[rng.integers(len(PARTIAL))], scene)
    return f"{NEUTRAL[0]}, {text}" if rng.random() < 0.1 else text


def other_ground(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same shape on a ground that neither it nor its own ground has the colour of."""
    names = [name for name in COLOURS if name not in (scene.ground, scene.colour)]
    return replace(scene, ground=names[rng.integers(len(names))])


def ground_caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Words for the ground alone: the plain ones, or some drawn by `rng`."""
    return _filled(GROUND[0 if rng is None else rng.integers(len(GROUND))], scene)


def _filled(pattern: str, scene: Scene, where: str = "") -> str:
    return pattern.format(**vars(scene), place=where).replace("a orange", "an orange")


def look(image: Image.Image) -> Seen:
    """Judge a picture by its pixels: two colours, the area of one within the other, and the nearest kind of shape.

    Args:
        image: of any size, drawn or generated.

    Returns:
        Colour names are the nearest in Lab, the shape is that of the most similar template. With nothing to see, as in
        a flat picture or in noise, shape and colour are None and the mask is empty.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    side = min(pixels.shape[:2])
    pixels = cv2.GaussianBlur(pixels, (0, 0), max(side / 128, 0.5))  # noise and checkerboards
    rim = np.ones(pixels.shape[:2], bool)
    width = max(side // 24, 1)
    rim[width:-width, width:-width] = False
    ground = np.median(pixels[rim], axis=0)
    nothing = Seen(None, None, _colour_name(ground), np.zeros(rim.shape, bool))

    away = np.linalg.norm(pixels - ground, axis=2)
    level, _ = cv2.threshold(np.clip(away, 0, 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    rough = _largest_part(away > level)
    if not rough.any():
        return nothing
    colour = np.median(pixels[rough], axis=0)
    axis = colour - ground
    if np.linalg.norm(axis) < LEAST_CONTRAST:
        return nothing
    mask = _largest_part((pixels - ground) @ axis > axis @ axis / 2)  # nearer to the shape's colour than the ground's
    if mask.mean() < LEAST_AREA or mask.all() or _explained(pixels, mask) < LEAST_EXPLAINED:
        return nothing
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    core = depth > depth.max() / 3  # away from the blurred edge
    return Seen(_shape_name(mask), _colour_name(np.median(pixels[core], axis=0)), nothing.ground, mask)


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part with its holes filled, (H, W) bool."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    part = np.zeros(mask.shape, np.uint8)
    if contours:
        cv2.drawContours(part, [max(contours, key=cv2.contourArea)], -1, 1, cv2.FILLED)
    return part.astype(bool)


def _explained(pixels: np.ndarray, mask: np.ndarray) -> float:
    """The share of the variance that is gone with the means within and without the mask."""
    rest = pixels - np.where(mask[:, :, None], pixels[mask].mean(0), pixels[~mask].mean(0))
    return 1 - float(np.square(rest).sum() / np.square(pixels - pixels.mean((0, 1))).sum())


def _colour_name(rgb: np.ndarray) -> str | None:
    """The nearest name in Lab, None if none is near."""
    points = np.concatenate([[rgb], list(COLOURS.values())]).astype(np.float32)[None] / 255
    lab = cv2.cvtColor(points, cv2.COLOR_RGB2LAB)[0]
    distances = np.linalg.norm(lab[1:] - lab[0], axis=1)
    return list(COLOURS)[distances.argmin()] if distances.min() < NAME_WITHIN else None


def _shape_name(mask: np.ndarray) -> str | None:
    """The kind with the template of highest IoU, None if all are unlike."""
    names, templates = _templates()
    found = _normalise(mask).ravel()
    shared = (templates & found).sum(1)
    likeness = shared / (templates | found).sum(1)
    name = names[likeness.argmax()]
    return name if likeness.max() >= LEAST_LIKENESS[name] else None


@lru_cache(maxsize=None)
def _templates() -> tuple:
    """Every kind at small rotations: names, and masks (n, TEMPLATE ** 2) bool."""
    scenes = [Scene(shape, "", "", 0.5, 0.5, 0.4, float(angle)) for shape in SHAPES for angle in range(-20, 21, 4)]
    masks = np.stack([_normalise(shape_mask(scene, 128)).ravel() for scene in scenes])
    return [scene.shape for scene in scenes], masks


def _normalise(mask: np.ndarray) -> np.ndarray:
    """A mask moved and scaled to one centre and one area, (TEMPLATE, TEMPLATE) bool."""
    y, x = np.nonzero(mask)
    scale = TEMPLATE * math.sqrt(0.28 / len(x))  # the share of the area with which a star just fits
    shift = TEMPLATE / 2 - 0.5
    matrix = np.array([[scale, 0, shift - scale * x.mean()], [0, scale, shift - scale * y.mean()]])
    return cv2.warpAffine(mask.astype(np.float32), matrix, (TEMPLATE, TEMPLATE)) > 0.5


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks of equal size, 0 if both are empty."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def agreement(expected: Scene | Seen, seen: Seen) -> tuple:
    """Whether colour, ground and shape are as expected, three bools; what has no name never is."""
    pairs = [(getattr(expected, key), getattr(seen, key)) for key in ("colour", "ground", "shape")]
    return tuple(wanted is not None and wanted == found for wanted, found in pairs)
