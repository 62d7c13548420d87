"""Training of the demo model's own networks: losses by their formulas, first weights, every stage end to end."""
from __future__ import annotations

import argparse
import runpy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ip_adapter.config import ModelConfig
from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.demo.model_file import network_parameters, save_model
from ip_adapter.demo.scenes import draw, random_scene, training_caption
from ip_adapter.demo.stages import (
    KL_WEIGHT,
    STAGES,
    AutoencoderLoss,
    ContrastiveLoss,
    ControlNetLoss,
    demo_start,
    normalised,
    start_at_zero,
)
from ip_adapter.families import SD15, SDXL
from ip_adapter.patch import unpatch_cross_attention
from ip_adapter.training.step import NoisePredictionLoss
from ip_adapter.weights.loading import ExtraParts, build_model
from ip_adapter.weights.merging import merge
from ldm.modules.controlnet import ControlNet
from tests.support.arrays import arrays
from tests.support.dummies import SHALLOW
from tests.support.scripts import ROOT


@pytest.fixture(scope="module")
def bare(standins, tmp_path_factory):
    """Merged stand-ins without an adapter: what every stage begins with."""
    path = tmp_path_factory.mktemp("bare") / "bare.ckpt"
    merge(SD15, **{**standins, "ip_adapter": None, "controlnet": None}, out=path, skip_ip=True)
    return path


@pytest.fixture
def model(bare):
    return build_model(bare, ModelConfig(), train_adapter=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    rows = ["dir,text"]
    for n in range(6):
        rng = np.random.default_rng(n)
        scene = random_scene(rng)
        draw(scene, 32).save(folder / f"{n}.png")
        rows.append(f'{n}.png,"{training_caption(scene, rng)}"')
    (folder / "img_txt.csv").write_text("\n".join(rows) + "\n")
    return folder


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_autoencoders_loss(model):
    rng = np.random.default_rng(0)
    vae = model.diffusion.vae
    pixels = rng.uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    noise = rng.standard_normal((2, 4, 4, 4)).astype(np.float32)
    mean, log_variance = np.split(vae.encode(Tensor(pixels)).asnumpy(), 2, 1)
    error = vae(Tensor(mean + np.exp(log_variance / 2) * noise)).asnumpy() - pixels
    divergence = (mean**2 + np.exp(log_variance) - 1 - log_variance).mean() / 2
    expected = np.abs(error).mean() + (error**2).mean() + KL_WEIGHT * divergence
    assert float(AutoencoderLoss(vae)(Tensor(pixels), Tensor(noise)).asnumpy()) == pytest.approx(expected, rel=1e-5)


def test_the_contrastive_loss(model):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((5, 8)).astype(np.float32) for _ in range(2))

    class Fixed(ms.nn.Cell):
        def __init__(self, value):
            super().__init__()
            self.value = Tensor(value)

        def construct(self, x):
            return self.value

    class Text(Fixed):
        def construct(self, x):
            return x, x, self.value

    loss = ContrastiveLoss([Text(a), Text(a)], Fixed(b))(Tensor(0.0), Tensor(0.0), Tensor(0.0))
    logits = np.exp(np.log(1 / 0.07)) * unit(a) @ unit(b).T
    log_p = [np.diag(logits - np.log(np.exp(logits).sum(axis, keepdims=True))) for axis in (0, 1)]
    assert float(loss.asnumpy()) == pytest.approx(-np.mean(log_p), rel=1e-5)


def test_normalised_latents_give_the_same_pictures(model):
    rng = np.random.default_rng(0)
    vae, scale = model.diffusion.vae, 0.18215
    pixels = Tensor(rng.uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32))
    moments = vae.encode(pixels).asnumpy()
    before = vae(Tensor(moments[:, :4])).asnumpy()
    trained = {name: parameter.asnumpy() for name, parameter in network_parameters({"vae": vae}).items()}
    result = normalised(trained, moments, scale)
    for path in ("vae.quant_conv.weight", "vae.post_quant_conv.weight"):  # as Ascend keeps them
        trained[path] = trained[path].reshape(*trained[path].shape[:2], 1, 1)
    for name, value in normalised(trained, moments, scale).items():
        np.testing.assert_array_equal(value.reshape(result[name].shape), result[name])
    for name, value in result.items():
        dict(vae.parameters_and_names())[name[4:]].set_data(Tensor(value))
    after = vae.encode(pixels).asnumpy()
    np.testing.assert_allclose(after[:, :4].mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(after[:, :4].std((0, 2, 3)) * scale, 1, rtol=1e-4)
    np.testing.assert_allclose(vae(Tensor(after[:, :4])).asnumpy(), before, atol=1e-4)
    gain = after[:, :4].std((0, 2, 3)) / moments[:, :4].std((0, 2, 3))  # the deviations grow as the means do
    np.testing.assert_allclose(np.exp(after[:, 4:] / 2), gain[:, None, None] * np.exp(moments[:, 4:] / 2), rtol=1e-4)


def test_the_first_unet_passes_its_input_on(tmp_path):
    """Its prediction is zero; the rest is seeded, so two seeds differ."""
    for seed in (0, 1):
        demo_start(tmp_path / f"{seed}.ckpt", seed)
    unet = build_model(tmp_path / "0.ckpt", ModelConfig(num_heads=2, image_heads=4), train_adapter=True).diffusion.unet
    unpatch_cross_attention(unet)
    rng = np.random.default_rng(0)
    x, context = (Tensor(rng.standard_normal(s).astype(np.float32)) for s in ((1, 4, 6, 6), (1, 77, 64)))
    assert not unet(x, Tensor([500.0]), context).asnumpy().any()
    first, other = arrays(tmp_path / "0.ckpt"), arrays(tmp_path / "1.ckpt")
    name = "first_stage_model.decoder.conv_in.weight"
    assert not np.array_equal(first[name], other[name])


def test_sdxl_may_begin_with_the_image_encoder_of_the_other_family(tmp_path):
    demo_start(tmp_path / "sd.ckpt", 1)
    demo_start(tmp_path / "xl.ckpt", 0, SDXL, tmp_path / "sd.ckpt")
    sd, xl = arrays(tmp_path / "sd.ckpt"), arrays(tmp_path / "xl.ckpt")
    taken = [name for name in xl if name.startswith(SDXL.image_encoder.prefix)]
    assert taken
    for name in taken:
        np.testing.assert_array_equal(xl[name], sd[SD15.image_encoder.prefix + name[len(SDXL.image_encoder.prefix):]])


def test_a_controlnet_starts_in_silence(model):
    rng = np.random.default_rng(0)
    unet = model.diffusion.unet
    unpatch_cross_attention(unet)
    controlnet = ControlNet(unet.config)
    start_at_zero(controlnet, r"^(zero_convs|middle_block_out)\.")
    batch = [Tensor(rng.standard_normal(shape).astype(np.float32)) for shape in (
        (2, 4, 4, 4), (2,), (2, 4, 4, 4), (2, 77, SHALLOW.unet.context_dim))] + [None]
    hint = Tensor(rng.uniform(0, 1, (2, 3, 32, 32)).astype(np.float32))
    with_hint, without = ControlNetLoss(unet, controlnet)(*batch, hint), NoisePredictionLoss(unet)(*batch)
    assert float(with_hint.asnumpy()) == pytest.approx(float(without.asnumpy()), rel=1e-6)


def test_a_saved_model_is_the_model(model, bare, tmp_path):
    path, = save_model(tmp_path / "model", model, {})
    before, after = arrays(bare), arrays(path)
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.dtype == np.float16
        np.testing.assert_array_equal(value, before[name].astype(np.float16), err_msg=name)
    changed = {"unet.middle_block.1.transformer_blocks.0.attn2.to_k.weight": np.full((64, 128), 2, np.float32)}
    path, = save_model(tmp_path / "changed", model, changed)
    block = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2."
    assert (arrays(path)[block + "to_k.weight"] == 2).all() and (arrays(path)[block + "to_k_ip.weight"] == 2).all()


@pytest.mark.parametrize("part", ["vae", "controlnet"])
def test_a_bad_image_does_not_stop_a_part(part, model, world, tmp_path, caplog):
    """Latents, features and hints are those of the next row that can be read; it is told once."""
    for path in (*world.glob("*.png"), world / "img_txt.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (1, 5000)).save(tmp_path / "2.png")
    args = argparse.Namespace(image_size=32, seed=1, cache_dir=tmp_path / "cache", drop_text_prob=0.0, p2_k=0.0)
    _, stage_of = STAGES[part]
    stage = stage_of(model, ImageTextDataset(tmp_path, 32), args)
    bad, following, other = (stage.make(row, 0) for row in (2, 3, 4))
    for one, next_one in zip(bad, following):
        np.testing.assert_array_equal(one, next_one)
    assert not np.array_equal(bad[part == "controlnet"], other[part == "controlnet"])
    assert caplog.text.count("1 x 5000 pixels are too narrow") == 1


@pytest.mark.slow
@pytest.mark.parametrize("part", STAGES)
def test_every_stage(part, bare, standins_xl, world, tmp_path, outcome):
    """Two steps, then one more after a resume: its own part has changed, the others have not, and it loads."""
    main = runpy.run_path(str(ROOT / "tools" / "train_demo.py"))["main"]
    family, _ = STAGES[part]
    if family is SDXL:
        bare = tmp_path / "bare.ckpt"
        merge(SDXL, **{**standins_xl, "ip_adapter": None, "controlnet": None}, out=bare, skip_ip=True)
    if part.startswith("clip"):  # in the stand-ins of the tests the encoders do not fit each other
        bare = tmp_path / "start.ckpt"
        demo_start(bare, 42, family)
    words = ["--part", part, "--data_path", world, "--pretrained_model_path", bare, "--image_size", "32", "--ms_mode",
             "1", "--train_batch_size", "2", "--output_path", tmp_path, "--cache_dir", tmp_path / "cache",
             "--warmup_steps", "0", "--ckpt_max_keep", "0", "--ema_decay", "0"]
    if part in ("vae", "clip", "clip_xl"):
        words = [word for word in words if word not in ("--cache_dir", tmp_path / "cache")]
    status, said = outcome(main, *words, "--max_steps", "2")
    assert status == 0, said
    status, said = outcome(main, *words, "--max_steps", "3", "--resume", "True")
    assert status == 0 and "going on after step 2 of 3" in said, said
    before, after = arrays(bare), arrays(tmp_path / "ckpt" / f"{part}-3.ckpt")
    changed = {name.split(".")[0] for name, value in after.items()
               if name not in before or np.abs(value - before[name]).max() > 2e-3}
    where = {"vae": "first_stage_model", "clip": "embedder", "unet": "model", "controlnet": "model",
             "clip_xl": "conditioner", "unet_xl": "model", "controlnet_xl": "model"}[part]
    assert changed == {where} | ({"cond_stage_model"} & changed)
    assert ("cond_stage_model" in changed) == (part == "clip")
    extra = ExtraParts(controlnets=[None] * part.startswith("controlnet"))
    config = ModelConfig(num_heads=-1, num_head_channels=32) if family is SDXL else ModelConfig()
    assert build_model(tmp_path / "ckpt" / f"{part}-3.ckpt", config, extra=extra, train_adapter=True, family=family)


def test_a_mistake_is_one_line(bare, tmp_path, outcome):
    main = runpy.run_path(str(ROOT / "tools" / "train_demo.py"))["main"]
    status, said = outcome(main, "--part", "unett", "--data_path", tmp_path)
    assert status == 2 and "--part" in said and "unett" in said
    status, said = outcome(main, "--part", "vae", "--data_path", tmp_path, "--pretrained_model_path", bare)
    assert status == 2 and "holds no img_txt.csv" in said
