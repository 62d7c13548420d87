"""Charts drawn as pictures: the loss of a training, the figures of a benchmark."""
from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np
from PIL import Image, ImageDraw

GREY, BLUE, ORANGE = (190, 190, 190), (30, 80, 200), (220, 120, 0)


class Curve(NamedTuple):
    """A line through points, in the order of x; points that are not finite are left out."""

    x: Sequence
    y: Sequence
    colour: tuple = BLUE
    name: str = ""  # shown in the title's line; empty for none


def chart(curves: list[Curve], title: str, from_zero: bool = False, size: tuple = (640, 320)) -> Image.Image:
    """Lines in one frame, with the extremes of both axes written beside it.

    Args:
        curves: drawn in this order.
        title: above the frame, names of curves behind it in their colours.
        from_zero: whether the axis upwards begins at 0 instead of the least value; single points are then marked.
        size: width and height in pixels.
    """
    width, height = size
    left, top, right, bottom = 56, 28, width - 12, height - 28
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    drawn = []
    for curve in curves:
        points = np.array([curve.x, curve.y], float)
        drawn.append(points[:, np.isfinite(points).all(0)])
    if not sum(points.shape[1] for points in drawn):
        return picture
    low, high = (np.concatenate(drawn, 1).min(1), np.concatenate(drawn, 1).max(1))
    low[1] = 0.0 if from_zero else low[1]
    corner, span = np.array([left, bottom]), np.array([right - left, top - bottom])
    pen.rectangle((left, top, right, bottom), outline="black")
    for curve, points in zip(curves, drawn):
        places = (corner + span * (points.T - low) / np.maximum(high - low, 1e-12)).round(1)
        pen.line([tuple(place) for place in places], fill=curve.colour, width=1 if curve.colour == GREY else 2)
        for x, y in places if from_zero else ():
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=curve.colour)
    pen.text((left, 8), title, fill="black")
    place = left + pen.textlength(title)
    for curve in curves:
        pen.text((place + 16, 8), curve.name, fill=curve.colour)
        place += pen.textlength(curve.name) + 16 * bool(curve.name)
    for value, at in ((low[1], bottom), (high[1], top)):
        pen.text((4, at - 6), f"{value:.3g}", fill="black")
    pen.text((left, bottom + 8), f"{low[0]:g}", fill="black")
    pen.text((right - pen.textlength(f"{high[0]:g}"), bottom + 8), f"{high[0]:g}", fill="black")
    return picture


def loss_chart(losses: list, title: str) -> Image.Image:
    """A loss over its steps, counted from 1: every value in grey, a running mean over a twentieth of them in blue."""
    losses = np.array(losses, float)
    steps = np.arange(1, len(losses) + 1)[np.isfinite(losses)]
    finite = losses[np.isfinite(losses)]
    window = max(1, len(finite) // 20)
    sums = np.cumsum(np.insert(finite, 0, 0.0))
    first = np.maximum(np.arange(len(finite)) + 1 - window, 0)
    mean = (sums[1:] - sums[first]) / (np.arange(len(finite)) + 1 - first)
    last = f", mean of the last {window}: {mean[-1]:.4g}" if len(mean) else ""
    return chart([Curve(steps, finite, GREY), Curve(steps, mean)], title + last)
