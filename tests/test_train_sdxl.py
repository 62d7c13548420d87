"""train_sdxl.py end to end on small stand-ins: what SDXL has beyond SD-1.5; the trainer has its tests in
test_train_sd.py.
"""
from __future__ import annotations

import re

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

import image_variation_sdxl
from gm.conditioner import Sizes
from ip_adapter.config import ModelConfig
from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.data.features import FrozenEncoders, training_inputs
from ip_adapter.data.stream import Draw, stack
from ip_adapter.families import SDXL
from ip_adapter.training.step import NoisePredictionLoss
from ip_adapter.weights.loading import build_model
from ip_adapter.weights.merging import merge
from ldm.model import Condition
from tests.support.arrays import arrays, assert_equal
from tests.support.scripts import assert_adapter_is_used, assert_mistakes, log_of, narrow_xl
from train_sdxl import main


@pytest.fixture(scope="module")
def words(world, merged_xl, tmp_path_factory) -> list:
    """Flags of a quick run."""
    config = narrow_xl("training/sd_xl_base_finetune_910b.yaml", tmp_path_factory.mktemp("config") / "small.yaml")
    return ["--config", config, "--data_path", world, "--weight", merged_xl, "--image_size", "64", "--per_batch_size",
            "2", "--ms_mode", "1", "--total_step", "4", "--save_ckpt_interval", "2"]


@pytest.fixture(scope="module")
def model(merged_xl):
    return build_model(merged_xl, ModelConfig(num_heads=-1, num_head_channels=32), train_adapter=True, family=SDXL)


def test_going_on_is_exact(words, tmp_path, monkeypatch, outcome):
    """By the folder's time: stopped after 2 of 4 steps, resumed, equal to one run; also with features kept."""
    monkeypatch.chdir(tmp_path)
    assert outcome(main, *words, "--save_path", "one")[0] == 0
    status, said = outcome(main, *words, "--total_step", "2")
    assert status == 0, said
    (tmp_path / "runs" / "2001.01.01-00:00:00" / "weights").mkdir(parents=True)  # an earlier one, which saved nothing
    status, said = outcome(main, *words, "--resume", "True")
    assert status == 0 and "going on after step 2 of 4" in said, said
    timed, = (path for path in (tmp_path / "runs").iterdir() if not path.name.startswith("2001"))
    assert re.fullmatch(r"\d{4}\.\d\d\.\d\d-\d\d:\d\d:\d\d", timed.name)
    names = {f"SDXL-base-1.0-{n}_ip_only.{end}" for n in (2, 4) for end in ("ckpt", "safetensors")}
    assert {path.name for path in (timed / "weights").iterdir()} == names | {"train_resume.ckpt"}
    one, two = (arrays(folder / "weights" / "train_resume.ckpt") for folder in (tmp_path / "one", timed))
    assert_equal(one, two)
    for name in ("kept", "again"):
        assert outcome(main, *words, "--save_path", name, "--cache_dir", "cache")[0] == 0
    for row, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "kept")):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-3)
    assert_equal(*(arrays(tmp_path / name / "weights" / "train_resume.ckpt") for name in ("kept", "again")))


def test_the_files_are_used(words, standins_xl, merged_xl, tmp_path, outcome):
    """Merged, or given to the script in either format: the same picture, another than before."""
    status, said = outcome(main, *words, "--total_step", "2", "--base_learning_rate", "0.01", "--save_path", tmp_path,
                           "--ema_decay", "0")
    assert status == 0, said
    adapter = tmp_path / "weights" / "SDXL-base-1.0-2_ip_only.ckpt"
    assert arrays(adapter).keys() < arrays(merged_xl).keys()
    assert arrays(adapter.with_suffix(".safetensors")).keys() == arrays(standins_xl["ip_adapter"]).keys()
    merge(SDXL, **{**standins_xl, "controlnet": None, "ip_adapter": adapter}, out=tmp_path / "full.ckpt")
    config = narrow_xl("inference/sd_xl_base.yaml", tmp_path / "small.yaml")
    assert_adapter_is_used(outcome, image_variation_sdxl.main, ["--config", config],
                           (tmp_path / "full.ckpt", merged_xl), adapter, tmp_path)


def test_what_the_network_is_told(model, world):
    """Sizes are each picture's own; a dropped text is the empty text's tokens and pooled state."""
    dataset = ImageTextDataset(world, 48, random_crop=True)
    batch = stack(0, np.arange(3), [dataset.sample(n, np.random.default_rng(n)) for n in range(3)])
    encoders = FrozenEncoders(model)
    noise = np.zeros((4, 6, 6), np.float32)
    drawn = [Draw(9, noise, noise, drop_image=n == 1, drop_text=n == 2) for n in range(3)]
    _, _, _, text, vector, embedding = training_inputs(encoders.features(batch), drawn, encoders.empty_text,
                                                       model.diffusion)
    assert (embedding.asnumpy()[1] == 0).all() and embedding.asnumpy()[[0, 2]].any(1).all()
    for n, caption in enumerate((batch.texts[0], batch.texts[1], "")):
        assert batch.sizes[n].tolist()[:2] == [64, 64] and batch.sizes[n].tolist()[4:] == [48, 48]
        model.diffusion.sizes = Sizes(*np.split(batch.sizes[n], 3))
        expected = model.diffusion.condition([caption])
        np.testing.assert_allclose(text.asnumpy()[n], expected.context.asnumpy()[0], atol=2e-3)
        np.testing.assert_allclose(vector.asnumpy()[n], expected.vector.asnumpy()[0], atol=2e-3)


def test_the_loss_sees_the_vector(model):
    rng = np.random.default_rng(0)
    x, noise = (Tensor(rng.standard_normal((2, 4, 8, 8)).astype(np.float32)) for _ in range(2))
    text, vector, embedding = (Tensor(rng.standard_normal(shape).astype(np.float32)) for shape in (
        (2, 77, 192), (2, 128 + 6 * 256), (2, 48)))
    timesteps = Tensor(np.array([3, 700], np.float32))
    loss = NoisePredictionLoss(model.diffusion.unet, model.embedder.image_proj)
    tokens, _ = model.embedder.project(embedding)
    context = Condition(np.concatenate([text.asnumpy(), tokens.asnumpy()], 1), vector)
    predicted = model.diffusion.unet(x, timesteps, Tensor(context.context), context.vector).asnumpy()
    got = float(loss(x, timesteps, noise, text, vector, embedding).asnumpy())
    assert got == pytest.approx(((predicted - noise.asnumpy()) ** 2).mean(), rel=1e-5)
    assert got != pytest.approx(float(loss(x, timesteps, noise, text, vector * 0, embedding).asnumpy()), rel=1e-4)


def test_from_scratch_with_validation(words, standins_xl, tmp_path, outcome):
    bare = tmp_path / "bare.ckpt"
    merge(SDXL, **{**standins_xl, "ip_adapter": None, "controlnet": None}, out=bare, skip_ip=True)
    status, said = outcome(main, *words, "--weight", bare, "--total_step", "2", "--save_path", tmp_path,
                           "--validation_interval", "2", "--validation_steps", "2", "--validation_count", "1")
    assert status == 0, said
    assert (tmp_path / "validation" / "step-2-00000.png").exists()
    assert "conditioner.embedders.2.image_proj.proj.weight" in arrays(tmp_path / "weights/SDXL-base-1.0-2_ip_only.ckpt")


def test_mistakes(words, merged, tmp_path, outcome):
    (tmp_path / "in").mkdir()
    twice, words = tmp_path / "in" / "twice.yaml", [*words, "--save_path", tmp_path / "out"]
    twice.write_text("per_batch_size: 2\ntrain_batch_size: 4\n")
    assert_mistakes(outcome, main, words, {
        "SD-1.5": (["--weight", merged], "is an SD-1.5 checkpoint, expected SDXL"),
        "no end": (["--total_step", "0"], "--epochs 0 and --max_steps 0 together have no end"),
        "two names": (["--config", twice], "per_batch_size and train_batch_size are two names of one setting"),
        "misspelt": (["--per_batchsize", "2"], "unknown flag --per_batchsize; did you mean --per_batch_size"),
    }, tmp_path / "in")


def test_buckets(words, tmp_path, outcome):
    """Pictures of two proportions: batches of either, exact after a stop, the same with features kept."""
    data = tmp_path / "data"
    data.mkdir()
    for n in range(8):
        Image.new("RGB", (96, 48) if n % 2 else (48, 96), (30 * n, 90, 200 - 20 * n)).save(data / f"{n}.png")
    (data / "img_txt.csv").write_text("dir,text\n" + "".join(f"{n}.png,number {n}\n" for n in range(8)))
    words = [*words, "--data_path", data, "--buckets", "True", "--save_path"]
    status, said = outcome(main, *words, tmp_path / "one")
    assert status == 0 and re.search(r"buckets: \d+x\d+ \(4\), \d+x\d+ \(4\)", said), said
    assert outcome(main, *words, tmp_path / "two", "--total_step", "2")[0] == 0
    assert outcome(main, *words, tmp_path / "two", "--resume", "True")[0] == 0
    assert_equal(*(arrays(tmp_path / name / "weights" / "train_resume.ckpt") for name in ("one", "two")))
    status, said = outcome(main, *words, tmp_path / "kept", "--cache_dir", tmp_path / "cache")
    assert status == 0 and len(list((tmp_path / "cache").glob("*.f16"))) == 2, said
    for row, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "kept")):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-3)
    status, said = outcome(main, *words[:-3], "--save_path", tmp_path / "two", "--resume", "True")
    assert status == 2 and "--buckets" in said
