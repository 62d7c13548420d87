"""The drawn world: what is drawn is what is said, and the judge sees it, also through blur, noise and compression."""
from __future__ import annotations

import dataclasses
import io
import itertools

import cv2
import numpy as np
import pytest
from PIL import Image

from ip_adapter.demo.scenes import (
    CAPTIONS,
    COLOURS,
    NEUTRAL,
    SHAPES,
    Scene,
    Seen,
    agreement,
    caption,
    draw,
    iou,
    look,
    outline,
    place,
    random_scene,
    shape_mask,
    training_caption,
)

SCENE = Scene("star", "orange", "black", 0.3, 0.35, 0.25, 10.0)


def scenes(count: int, seed: int = 0) -> list:
    return [random_scene(np.random.default_rng([seed, number])) for number in range(count)]


def degrade(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blur of 1.5 pixels, every channel off by 20, noise of deviation 12 and JPEG at quality 40, all at once."""
    pixels = cv2.GaussianBlur(np.asarray(image, np.float32), (0, 0), 1.5)
    pixels += rng.choice([-20, 20], 3) + rng.normal(0, 12, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=40)
    return Image.open(file)


def deform(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Every point wanders by 1.5 % of the side, its neighbours along with it."""
    size = image.width
    shifts = [cv2.GaussianBlur(rng.normal(size=(size, size)).astype(np.float32), (0, 0), size / 12) for _ in range(2)]
    down, across = np.mgrid[:size, :size].astype(np.float32)
    maps = [base + shift / shift.std() * 0.015 * size for base, shift in zip((across, down), shifts)]
    return Image.fromarray(cv2.remap(np.asarray(image), *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))


def right(size: int, change, count: int = 300) -> tuple:
    """The shares of colours, grounds and shapes judged right, and the mean IoU with the mask."""
    answers, overlaps = [], []
    for number, scene in enumerate(scenes(count, size)):
        seen = look(change(draw(scene, size), np.random.default_rng([1, number])))
        answers.append(agreement(scene, seen))
        overlaps.append(iou(seen.mask, shape_mask(scene, size)))
    return (*np.mean(answers, axis=0), np.mean(overlaps))


@pytest.mark.parametrize("size", [96, 128])
def test_drawn_pictures_are_judged_right(size):
    colour, ground, shape, overlap = right(size, lambda image, rng: image)
    assert colour == ground == shape == 1 and overlap > 0.99


@pytest.mark.parametrize("size", [96, 128])
def test_degraded_pictures_are_judged_right(size):
    colour, ground, shape, overlap = right(size, degrade)
    assert colour >= 0.99 and ground >= 0.99 and shape >= 0.99 and overlap > 0.95


def test_deformed_pictures_are_judged_right():
    colour, ground, shape, _ = right(128, lambda image, rng: degrade(deform(image, rng), rng), 200)
    assert colour >= 0.99 and ground >= 0.99 and shape >= 0.97


def test_names_agree_by_chance_only():
    drawn = scenes(300)
    seen = [look(draw(scene, 64)) for scene in scenes(300, seed=1)]
    colour, ground, shape = np.mean([agreement(*pair) for pair in itertools.product(drawn, seen)], axis=0)
    assert colour == pytest.approx(1 / len(COLOURS), abs=0.01) and ground == pytest.approx(1 / len(COLOURS), abs=0.01)
    assert shape == pytest.approx(1 / len(SHAPES), abs=0.01)


def test_a_colour_keeps_its_name_when_25_off():
    for name, off in itertools.product(COLOURS, itertools.product([-25, 0, 25], repeat=3)):
        pixel = np.clip(np.add(COLOURS[name], off), 0, 255)
        assert look(Image.new("RGB", (8, 8), tuple(int(v) for v in pixel))).ground == name, (name, off)


def test_middle_grey_has_no_name():
    assert look(Image.new("RGB", (64, 64), (128, 128, 128))).ground is None


@pytest.mark.parametrize("scene", scenes(6))
def test_drawing_is_repeatable_at_any_size(scene):
    assert draw(scene).tobytes() == draw(dataclasses.replace(scene)).tobytes()
    small, large = np.asarray(draw(scene, 64), float), np.asarray(draw(scene, 256).resize((64, 64), Image.BOX), float)
    assert np.abs(small - large).mean() < 1  # of 255, at the edge
    assert draw(dataclasses.replace(scene, angle=scene.angle + 1)).tobytes() != draw(scene).tobytes()


def test_scenes_are_whole_various_and_survive_text():
    drawn = scenes(500)
    for scene in drawn:
        assert scene.colour != scene.ground
        assert scene.size < min(scene.x, scene.y, 1 - scene.x, 1 - scene.y)
        assert not shape_mask(scene, 96)[[0, -1]].any() and not shape_mask(scene, 96)[:, [0, -1]].any()
        x = float(str(scene.x))
        assert draw(dataclasses.replace(scene, x=x), 32).tobytes() == draw(scene, 32).tobytes()
    assert {scene.shape for scene in drawn} == set(SHAPES)
    assert {scene.colour for scene in drawn} == {scene.ground for scene in drawn} == set(COLOURS)


def test_position_and_area_are_those_of_the_scene():
    for scene in scenes(60):
        y, x = np.nonzero(look(draw(scene)).mask)
        assert (x.mean() + 0.5) / 128 == pytest.approx(scene.x, abs=0.01)
        assert (y.mean() + 0.5) / 128 == pytest.approx(scene.y, abs=0.01)
    circle = dataclasses.replace(SCENE, shape="circle")
    assert shape_mask(circle, 256).mean() == pytest.approx(np.pi * SCENE.size**2, rel=0.02)


def test_the_plain_caption():
    assert caption(SCENE) == "an orange star on a black ground"
    assert caption(dataclasses.replace(SCENE, ground="orange", colour="red")) == "a red star on an orange ground"


def test_captions_name_what_is_drawn_and_places_are_true():
    said = set()
    true = {"left": lambda s: s.x < 0.45, "right": lambda s: s.x > 0.55, "upper": lambda s: s.y < 0.45,
            "top": lambda s: s.y < 0.45, "lower": lambda s: s.y > 0.55, "bottom": lambda s: s.y > 0.55,
            "middle": lambda s: max(abs(s.x - 0.5), abs(s.y - 0.5)) < 0.05}
    for number, scene in enumerate(scenes(2000)):
        words = caption(scene, np.random.default_rng(number)).replace(",", "").split()
        assert scene.shape in words and {scene.colour, scene.ground} == set(words) & set(COLOURS)
        assert ("ground" in words) != ("background" in words)
        assert all(check(scene) for word, check in true.items() if word in words), (scene, words)
        assert " a orange" not in f" {' '.join(words)}"
        said.update(words)
    assert set(true) <= said


@pytest.mark.parametrize("captions", CAPTIONS)
def test_captions_to_train_on_say_nothing_wrong(captions):
    """Some are whole, some partial, some say nothing; which, follows from the generator alone."""
    said = [(scene, training_caption(scene, np.random.default_rng(n), captions))
            for n, scene in enumerate(scenes(1000))]
    kinds = {"whole": 0, "partial": 0, "neutral": 0}
    for scene, text in said:
        words = set(text.replace(",", "").split())
        assert words & set(COLOURS) <= {scene.colour, scene.ground} and words & set(SHAPES) <= {scene.shape}
        whole = {scene.colour, scene.ground, scene.shape} <= words
        kinds["whole" if whole else "neutral" if text in NEUTRAL else "partial"] += 1
    assert tuple(kinds.values()) == pytest.approx([1000 * share for share in CAPTIONS[captions]], abs=60)
    assert sum(text.startswith(f"{NEUTRAL[0]}, ") for _, text in said) == pytest.approx(90, abs=40)
    assert all(text == training_caption(scene, np.random.default_rng(n), captions)
               for n, (scene, text) in enumerate(said))


@pytest.mark.parametrize("x, y, words", [
    (0.3, 0.3, "in the upper left"), (0.7, 0.7, "in the lower right"), (0.3, 0.5, "on the left"),
    (0.5, 0.7, "at the bottom"), (0.5, 0.5, "in the middle"), (0.45, 0.5, "")])
def test_places(x, y, words):
    assert place(x, y) == words


def test_the_outline_is_the_border_of_the_mask():
    square = np.ones((3, 3), np.uint8)
    for size, scene in itertools.product((96, 128), scenes(100)):
        edges = np.asarray(outline(scene, size))
        assert edges.shape == (size, size, 3) and set(np.unique(edges)) == {0, 255}
        drawn, mask = (edges[:, :, 0] > 0).astype(np.uint8), shape_mask(scene, size).astype(np.uint8)
        border = mask - cv2.erode(mask, square)
        assert not (drawn & ~cv2.dilate(border, square)).any()  # nothing elsewhere
        assert not (border & ~cv2.dilate(drawn, square)).any()  # no gaps
        assert iou(cv2.dilate(drawn, square) > 0, cv2.dilate(border, square) > 0) > 0.5


def test_a_picture_without_anything_in_it():
    rng = np.random.default_rng(0)
    for colour in COLOURS.values():
        noisy = np.clip(rng.normal(colour, 12, (96, 96, 3)), 0, 255).astype(np.uint8)
        for image in (Image.new("RGB", (96, 96), colour), Image.fromarray(noisy)):
            seen = look(image)
            assert seen.shape is seen.colour is None and not seen.mask.any() and seen.ground is not None


def test_noise_and_odd_pictures_are_answered():
    rng = np.random.default_rng(0)
    for deviation in (20, 60, 200):
        noise = np.clip(rng.normal(128, deviation, (128, 128, 3)), 0, 255).astype(np.uint8)
        assert look(Image.fromarray(noise)).shape is None
    for height, width in ((1, 1), (1, 40), (40, 1), (2, 3), (7, 90)):
        seen = look(Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)))
        assert seen.mask.shape == (height, width)
    for soft in (3, 10, 30):
        cloud = cv2.GaussianBlur(rng.normal(size=(96, 96, 3)), (0, 0), soft)
        look(Image.fromarray(np.clip(128 + 60 * cloud / cloud.std(), 0, 255).astype(np.uint8)))
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 30:] = 255
    look(Image.fromarray(halves))
    assert look(draw(SCENE).convert("RGBA")).shape == look(draw(SCENE).resize((128, 120))).shape == "star"


def test_a_blob_is_no_shape():
    crescent = np.zeros((128, 128, 3), np.uint8)
    cv2.ellipse(crescent, (64, 64), (45, 20), 30, 0, 200, (255, 255, 255), 12)
    seen = look(Image.fromarray(crescent))
    assert seen.shape is None and (seen.colour, seen.ground) == ("white", "black") and seen.mask.any()


def test_iou_and_agreement():
    a, b = np.array([1, 1, 0], bool), np.array([0, 1, 1], bool)
    assert iou(a, b) == pytest.approx(1 / 3) and iou(a, a) == 1 and iou(a & ~a, b & ~b) == 0
    seen = look(draw(SCENE))
    assert agreement(SCENE, seen) == agreement(seen, seen) == (True, True, True)
    assert agreement(dataclasses.replace(SCENE, ground="blue"), seen) == (True, False, True)
    nothing = Seen(None, None, None, a)
    assert agreement(nothing, nothing) == (False, False, False)
