"""CLIP-I and CLIP-T: a whole CLIP file against transformers, scores by their formulas."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ip_adapter.evaluation.clip_score import open_scorer
from ip_adapter.weights.dummy import write_clip_standin
from ldm.checkpoints.file import CheckpointError
from tests.support.arrays import DATA


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    write_clip_standin(path)
    return open_scorer(path, "quick_gelu")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_embeddings_equal_transformers(scorer):
    """Recorded by tests/record/record_clip.py."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with np.load(DATA / "clip_reference.npz") as expected:
        text = scorer.text_encoder(Tensor(expected["tokens"]))[2].asnumpy()
        image = scorer.image_encoder(Tensor(pixels)).asnumpy()
        np.testing.assert_allclose(unit(text), expected["text"], atol=2e-5)
        np.testing.assert_allclose(unit(image), expected["image"], atol=2e-5)


def test_the_activation_is_that_of_both_encoders(scorer, tmp_path):
    """quick_gelu is what the numbers above were recorded with; gelu gives others, for images and for texts."""
    write_clip_standin(tmp_path / "clip.safetensors")
    other = open_scorer(tmp_path / "clip.safetensors", "gelu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8))
    tokens = Tensor(scorer.tokenizer(["a cat"]))
    for one, name in ((scorer, "quick_gelu"), (other, "gelu")):
        assert one.image_encoder.config.activation == one.text_encoder.config.activation == name
    assert np.abs(scorer.images([image]) - other.images([image])).max() > 1e-4
    texts = [unit(one.text_encoder(tokens)[2].asnumpy()) for one in (scorer, other)]
    assert np.abs(texts[0] - texts[1]).max() > 1e-4


def test_a_picture_is_like_itself(scorer):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    assert scorer.clip_i(pictures[:1], Image.fromarray(pictures[0])) == pytest.approx(1, abs=1e-5)
    among = scorer.clip_i(pictures, Image.fromarray(pictures[0]))
    embeddings = scorer.images([Image.fromarray(picture) for picture in pictures])
    assert among == pytest.approx(float((embeddings @ embeddings[0]).mean()), abs=1e-5) and among < 1


def test_clip_t_is_the_clip_score(scorer):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3)).astype(np.uint8)
    text = unit(scorer.text_encoder(Tensor(scorer.tokenizer(["a cat"])))[2].asnumpy())[0]
    cosines = scorer.images([Image.fromarray(picture) for picture in pictures]) @ text
    assert scorer.clip_t(pictures, "a cat") == pytest.approx(2.5 * np.maximum(cosines, 0).mean(), abs=1e-5)


def test_what_is_no_clip_is_named(standins, tmp_path):
    for path in (standins["open_clip_vit"], standins["vae"]):
        with pytest.raises(CheckpointError, match="--clip .*holds no whole CLIP; expected image and text encoder"):
            open_scorer(path, "gelu")
