"""What the pictures of a run imply: the output's size, masks, hints and when they act."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ip_adapter.images.preprocess import canny, latent_mask, latent_pixels, paste, read_mask
from ip_adapter.inference.inputs import Hint, open_inputs, set_size
from ldm.errors import UserError
from ldm.sampling.schedule import leading_timesteps
from tests.support.arrays import DATA


def flags(img, **given) -> SimpleNamespace:
    """What a parser would give."""
    nothing = {"control_image": [], "control_scale": [], "control_start": [], "control_end": [], "canny": []}
    return SimpleNamespace(**{"img": img, "H": None, "W": None, "default_size": (512, 512),
                              "default_control_scale": 1.0, **nothing, **given})


@pytest.mark.parametrize("size, given, expected", [
    ((640, 480), (None, None), (640, 480)),
    ((101, 60), (None, None), (104, 64)),
    ((99, 3), (None, None), (96, 8)),
    ((1000, 500), (256, None), (512, 256)),
    ((1000, 500), (None, 256), (256, 128)),
    ((6000, 4000), (768, None), (1152, 768)),
    ((6000, 4000), (512, 512), (512, 512)),
])
def test_size_is_the_references(size, given, expected):
    args = flags(None, H=given[0], W=given[1])
    set_size(args, size, "--ref_img x.png")
    assert (args.W, args.H) == expected


@pytest.mark.parametrize("size, height", [((6000, 4000), None), ((9000, 100), None), ((9000, 100), 96)])
def test_nobody_gets_a_huge_picture_unasked(size, height):
    with pytest.raises(UserError, match="--ref_img x.png: .* give --H or --W"):
        set_size(flags(None, H=height), size, "--ref_img x.png")


def test_a_hint_gives_its_proportions_at_the_default_size(picture):
    args = flags(picture, control_image=[picture])
    inputs = open_inputs(args)
    assert (args.W, args.H) == (680, 512) and inputs.hints[0].picture.size == (680, 512)
    assert [image.size for image in inputs.shown()] == [(80, 60), (680, 512)]


def test_the_reference_is_resized_with_a_notice(picture, caplog):
    args = flags(picture, ref_img=picture)
    with caplog.at_level("INFO"):
        inputs = open_inputs(args)
    assert inputs.reference.size == (80, 64) == (args.W, args.H)
    assert "--ref_img" in caplog.text and "resized from 80x60 to 80x64" in caplog.text


def test_settings_for_all_hints_or_one_each(picture):
    args = flags(picture, control_image=[picture, picture], control_scale=[0.5, 0.25], control_end=[0.8],
                 canny=[[0, 0], [100, 200]])
    first, second = open_inputs(args).hints
    assert (first.scale, first.start, first.end, first.made) == (0.5, 0.0, 0.8, False)
    assert (second.scale, second.start, second.end, second.made) == (0.25, 0.0, 0.8, True)


@pytest.mark.parametrize("given, message", [
    ({"control_scale": [0.5]}, "--control_scale has nothing to act on"),
    ({"canny": [[1, 2]]}, "--canny has nothing to act on"),
    ({"control_image": 2, "control_scale": [1, 2, 3]}, "--control_scale is given 3 times, expected once, or 2 times"),
    ({"control_image": 1, "control_start": [0.5], "control_end": [0.5]}, "--control_start 0.5 is not before"),
])
def test_settings_that_do_not_fit(picture, given, message):
    given = {**given, "control_image": [picture] * given.get("control_image", 0)}
    with pytest.raises(UserError, match=message):
        open_inputs(flags(picture, **given))


@pytest.mark.parametrize("start, end, expected", [
    (0, 1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), (0, 0.5, [0, 1, 2, 3, 4]), (0.25, 0.75, [3, 4, 5, 6]), (0.95, 1, [])])
def test_a_hint_acts_in_whole_steps(start, end, expected):
    timesteps = leading_timesteps(10)
    assert Hint(None, 1.0, start, end).acting(timesteps) == {int(timesteps[i]) for i in expected}


def test_edges_are_white_on_black():
    pixels = np.zeros((32, 40, 3), np.uint8)
    pixels[8:24, 10:30] = (200, 30, 30)
    edges = np.asarray(canny(Image.fromarray(pixels), 100, 200))
    assert edges.shape == (32, 40, 3) and set(np.unique(edges)) == {0, 255}
    assert (edges[..., 0] == edges[..., 2]).all()
    ys, xs = np.nonzero(edges[..., 0])
    np.testing.assert_allclose((ys.min(), ys.max(), xs.min(), xs.max()), (8, 23, 10, 29), atol=1)


@pytest.fixture
def mask_file(tmp_path):
    pixels = np.zeros((40, 48), np.uint8)
    pixels[8:32, 16:40] = 255
    pixels[20:22, 20:22] = 127
    path = tmp_path / "mask.png"
    Image.fromarray(pixels).save(path)
    return path


def test_masks(mask_file):
    mask = read_mask(mask_file, 48, 40)
    assert mask.sum() == 24 * 24 - 4 and mask[8, 16] and not mask[7, 16] and not mask[20, 20]
    np.testing.assert_array_equal(read_mask(mask_file, 48, 40, invert=True), ~mask)
    small = latent_mask(mask)
    assert small.shape == (1, 1, 5, 6) and small.dtype == np.float32
    np.testing.assert_array_equal(small[0, 0], mask[::8, ::8])
    assert small.sum() == 9


def test_a_mask_of_another_size_is_resized_with_a_notice(mask_file, caplog):
    with caplog.at_level("INFO"):
        mask = read_mask(mask_file, 96, 80)
    assert "mask.png: resized from 48x40 to 96x80" in caplog.text
    assert mask[20, 40] and mask[58, 76] and not mask[10, 40] and not mask[70, 40]


def test_nothing_to_repaint(tmp_path):
    pixels = np.zeros((32, 32), np.uint8)
    path = tmp_path / "mask.png"
    Image.fromarray(pixels).save(path)
    with pytest.raises(UserError, match="nothing to repaint, no pixel is white; --invert_mask repaints black"):
        read_mask(path, 32, 32)
    with pytest.raises(UserError, match="no pixel is black; leave --invert_mask out"):
        Image.fromarray(pixels + 255).save(path)
        read_mask(path, 32, 32, invert=True)
    pixels[9:15, 9:15] = 255
    Image.fromarray(pixels).save(path)
    with pytest.raises(UserError, match="white part is thinner than the latents' cells"):
        read_mask(path, 32, 32)


@pytest.mark.parametrize("name", ["mask_white_on_transparent.png", "mask_P_trans0.png"])
def test_of_a_mask_transparency_does_not_count(name, caplog):
    """As in diffusers; over white everything would be repainted."""
    assert read_mask(DATA / "faults" / name, 96, 96).mean() == pytest.approx(0.583, abs=0.001)
    assert not caplog.records


def test_repainting_everything_is_said(tmp_path, caplog):
    Image.new("RGBA", (32, 32), (255, 255, 255, 0)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", 32, 32).all()
    assert "--ref_mask" in caplog.text and "everything is repainted, all its pixels are white" in caplog.text
    Image.new("L", (32, 32)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", 32, 32, invert=True).all()
    assert "all its pixels are black (transparency does not count); paint what is to be kept white" in caplog.text


def test_of_a_hint_transparency_does_not_count_but_edges_are_those_of_what_is_seen(tmp_path):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[16:48, 16:48] = 255
    path = tmp_path / "hint.png"
    Image.fromarray(pixels).save(path)
    args = flags(path, control_image=[path, path], canny=[[0, 0], [100, 200]], H=64, W=64)
    inputs = open_inputs(args)
    hint, edges = (np.asarray(one.picture) for one in inputs.hints)
    np.testing.assert_array_equal(hint, pixels[..., :3])
    assert not edges.any() and np.asarray(inputs.image).all()  # white on white


@pytest.mark.parametrize("blur", [0, 1, 4, 20])
def test_kept_pixels_stay_identical_whatever_the_edge(mask_file, blur):
    mask, rng = read_mask(mask_file, 48, 40), np.random.default_rng(0)
    original = rng.integers(0, 256, (40, 48, 3), np.uint8)
    pictures = rng.integers(0, 256, (2, 40, 48, 3), np.uint8)
    result = paste(pictures, Image.fromarray(original), mask, blur)
    assert result.dtype == np.uint8
    for picture, made in zip(result, pictures):
        np.testing.assert_array_equal(picture[~mask], original[~mask])
        if blur == 0:
            np.testing.assert_array_equal(picture[mask], made[mask])


def test_a_soft_edge_rises_inwards():
    mask = np.zeros((64, 64), bool)
    mask[:, 20:] = True
    row = paste(np.full((1, 64, 64, 3), 200, np.uint8), Image.new("RGB", (64, 64)), mask, 4)[0, 32, :, 0].astype(int)
    assert (row[:20] == 0).all() and (np.diff(row[19:36]) >= 0).all() and 0 < row[22] < 150 and (row[36:] == 200).all()


def test_latent_pixels():
    image = Image.fromarray(np.array([[[0, 255, 51]]], np.uint8))
    np.testing.assert_allclose(latent_pixels(image).ravel(), [-1, 1, -0.6], atol=1e-6)
