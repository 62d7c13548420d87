"""Charts, by the pixels of their lines."""
from __future__ import annotations

import numpy as np

from ip_adapter.images.charts import BLUE, GREY, ORANGE, Curve, chart, loss_chart


def pixels(picture, colour) -> np.ndarray:
    """(row, column) of all pixels of a colour below the line of the title."""
    found = np.argwhere((np.asarray(picture) == colour).all(-1))
    return found[found[:, 0] >= 28]


def test_lines_go_from_corner_to_corner():
    picture = chart([Curve([2, 1, 4], [10.0, np.nan, 30.0]), Curve([2, 4], [30.0, 10.0], ORANGE, "other")], "title")
    assert picture.size == (640, 320)
    for colour, first, last in ((BLUE, 292, 28), (ORANGE, 28, 292)):
        found = pixels(picture, colour)
        left, right = (found[found[:, 1] == column][:, 0].mean() for column in (58, 624))
        assert abs(left - first) < 4 and abs(right - last) < 4


def test_an_axis_from_zero_keeps_proportions():
    found = pixels(chart([Curve([0, 1], [1.0, 2.0])], "", from_zero=True), BLUE)
    assert abs(found[found[:, 1] == 62][:, 0].mean() - 160) < 4  # half way up


def test_a_loss_shows_values_and_their_mean():
    losses = np.where(np.arange(400) % 2, 1.0, 3.0).tolist() + [float("inf")]
    picture = loss_chart(losses, "loss")
    grey, blue = pixels(picture, GREY), pixels(picture, BLUE)
    assert grey[:, 0].max() > 280 and grey[:, 0].min() < 40
    late = blue[blue[:, 1] > 200]
    assert abs(late[:, 0] - 160).max() < 6
    assert loss_chart([float("nan")], "loss").size == (640, 320)
