"""What the networks under the demo model's adapter are trained with: sizes, first weights, losses, inputs.

A whole Stable Diffusion in small, in the order autoencoder, text and image encoder, UNet, ControlNet; its adapter is
trained by train_sd.py like any other.
"""
from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ip_adapter.config import TrainingConfig
from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.data.feature_cache import FeatureBatch, FeatureCache
from ip_adapter.data.features import FrozenEncoders
from ip_adapter.demo.model_file import network_parameters, save_model
from ip_adapter.families import SD15, SDXL, Family
from ip_adapter.image_prompt import ImageProjConfig
from ip_adapter.images.preprocess import canny, hint_pixels
from ip_adapter.patch import unpatch_cross_attention
from ip_adapter.training.step import NoisePredictionLoss
from ip_adapter.weights.dummy import write_standins
from ip_adapter.weights.loading import ImagePromptModel
from ip_adapter.weights.merging import merge
from ip_adapter.weights.parts import ModelSizes
from ldm.checkpoints.file import open_checkpoint, save_arrays
from ldm.errors import UserError
from ldm.files import temporary_folder
from ldm.modules.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.modules.clip import CLIPImageConfig, CLIPImageTransformer, CLIPTextConfig, CLIPTextTransformer
from ldm.modules.controlnet import ControlNet
from ldm.modules.operators import matmul_nt
from ldm.modules.unet import UNetConfig, UNetModel

DEMO = ModelSizes(
    UNetConfig(model_channels=32, channel_mult=(2, 2, 3, 3), context_dim=64, norm_groups=4),
    AutoencoderConfig(channels=32, channel_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4),
    (CLIPTextConfig(width=64, layers=3, heads=1, mlp_width=256),),
    CLIPImageConfig(width=128, layers=3, mlp_width=512, patch_size=32, embed_dim=64),
    ImageProjConfig(embed_dim=64, context_dim=64),
)
DEMO_XL = replace(  # 30 MB in float16 with ControlNet and adapter, so that both demo models stay below 60
    DEMO,
    unet=UNetConfig(model_channels=32, channel_mult=(2, 2, 2), transformer_depth=(0, 1, 2), middle_depth=2,
                    context_dim=128, num_heads=-1, num_head_channels=32, use_linear=True, adm_in_channels=64 + 6 * 256,
                    norm_groups=4),
    texts=(*DEMO.texts, replace(DEMO.texts[0], activation="gelu", projection=64)),
    proj=ImageProjConfig(embed_dim=64, context_dim=128),
)
KL_WEIGHT = 1e-3  # of the mean over a latent's elements, against a mean over pixels
EDGES = 100, 200  # Canny's thresholds of the hints the ControlNet learns from


def demo_start(path: Path, seed: int, family: Family = SD15, image_encoder: Path | None = None) -> None:
    """Write the merged checkpoint of a family that training begins with: seeded weights, no adapter.

    The last layer of every residual branch of the UNet is zero, so that at first it passes its input on.

    Args:
        path: to write.
        seed: of the weights.
        family: of the model.
        image_encoder: checkpoint whose image encoder takes the seeded one's place, or None.
    """
    with temporary_folder(tempfile.gettempdir()) as folder:
        seeded = folder / "seeded.ckpt"
        standins = write_standins(folder, DEMO_XL if family is SDXL else DEMO, seed, family)
        replaced = {"controlnet": None, **({"open_clip_vit": image_encoder} if image_encoder else {})}
        merge(family, **{**standins, **replaced}, out=seeded, skip_ip=True)
        with open_checkpoint(seeded) as file:
            arrays = {name: file.read(name) for name in file.tensors}
    last = r"^model\.diffusion_model\.(out\.2\.|.*\.(out_layers_conv|out_layers\.3|proj_out)\.)"
    save_arrays(path, {name: 0 * value if re.search(last, name) else value for name, value in arrays.items()})


class AutoencoderLoss(nn.Cell):
    """Mean absolute and mean squared error of the pixels, and the divergence of the posterior from a unit normal.

    Source:
        arXiv 1312.6114, eq. 10, with weights of our own.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__(auto_prefix=False)
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def construct(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] and (B, z, H / 8, W / 8) unit noise -> () float32."""
        moments = self.quant_conv(self.encoder(pixels))
        mean, log_variance = ops.split(moments, moments.shape[1] // 2, 1)
        divergence = 0.5 * (ops.square(mean) + ops.exp(log_variance) - 1.0 - log_variance).mean()
        error = self.decoder(self.post_quant_conv(mean + ops.exp(0.5 * log_variance) * noise)) - pixels
        return ops.abs(error).mean() + ops.square(error).mean() + KL_WEIGHT * divergence


class ContrastiveLoss(nn.Cell):
    """Cross-entropy of finding each picture's caption in the batch, and each caption's picture; mean of text encoders.

    Source:
        CLIP (arXiv 2103.00020), fig. 3; the text's pooled state needs no projection, for it is as wide as the image
        embedding.
    """

    def __init__(self, texts: list[CLIPTextTransformer], image: CLIPImageTransformer):
        super().__init__()  # with prefixes: all have a positional_embedding
        self.texts, self.image = nn.CellList(texts), image
        self.logit_scale = Parameter(Tensor(np.log(1 / 0.07), ms.float32), "logit_scale")

    def construct(self, pixels: Tensor, *tokens: Tensor) -> Tensor:
        """(B, 3, 224, 224), and (B, T) int32 for each text encoder -> () float32."""
        image, total = self._unit(self.image(pixels)), 0.0
        for i in range(len(self.texts)):
            text = self._unit(self.texts[i](tokens[i])[2])
            logits = ops.minimum(ops.exp(self.logit_scale), 100.0) * matmul_nt(text, image)
            own = ops.arange(logits.shape[0])
            total = total + 0.5 * (ops.cross_entropy(logits, own) + ops.cross_entropy(logits.T, own))
        return total / len(self.texts)

    def _unit(self, x: Tensor) -> Tensor:
        return x / ops.sqrt(ops.square(x).sum(-1, keepdims=True))


class ControlNetLoss(nn.Cell):
    """Mean squared error of the noise a UNet predicts with a ControlNet's residuals; arXiv 2302.05543, eq. 5."""

    def __init__(self, unet: UNetModel, controlnet: ControlNet):
        super().__init__()  # with prefixes: the ControlNet has the names of the UNet
        self.unet, self.controlnet = unet, controlnet

    def construct(self, x: Tensor, timesteps: Tensor, target: Tensor, text: Tensor, vector: Tensor,
                  hint: Tensor) -> Tensor:
        """As `NoisePredictionLoss`, with hints (B, 3, H, W) in [0, 1] in place of embeddings."""
        embedded, whole = self.controlnet.input_hint_block(hint), Tensor(1.0, ms.float32)
        residuals = self.controlnet(x, timesteps, text, embedded, whole, vector)
        return ops.square(self.unet(x, timesteps, text, vector, residuals) - target).mean()


class Stage(NamedTuple):
    """How one part of the demo model is trained."""

    loss: nn.Cell
    parameters: dict  # name -> parameter that trains
    make: Callable  # (row, position) -> sample
    collate: Callable  # (step, positions, samples) -> batch
    inputs: Callable  # batch -> what the loss takes
    publish: Callable  # (path without suffix, trained arrays) -> the files written


def autoencoder_stage(model: ImagePromptModel, dataset: ImageTextDataset, args) -> Stage:
    """The autoencoder, on pictures alone."""
    vae, z = model.diffusion.vae, model.diffusion.vae.config.latent_channels

    def make(row: int, position: int) -> tuple:
        image = dataset.square(row, args.image_size)
        shape = z, args.image_size // 8, args.image_size // 8
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1
        return pixels, np.random.default_rng([args.seed, position]).standard_normal(shape, np.float32)

    def publish(path: Path, trained: dict) -> list:
        rows = range(0, len(dataset), max(1, len(dataset) // 128))
        moments = np.concatenate([vae.encode(Tensor(make(row, 0)[0][None])).asnumpy() for row in rows])
        return save_model(path, model, normalised(trained, moments, model.diffusion.scale_factor))

    return Stage(AutoencoderLoss(vae), network_parameters({"vae": vae}), make, _columns, _tensors, publish)


def normalised(trained: dict, moments: np.ndarray, scale_factor: float) -> dict:
    """The same autoencoder with latents that have mean 0 and, times `scale_factor`, deviation 1 in every channel.

    Args:
        trained: `vae.path` -> array; weights of convolutions in any shape that begins with the output channels.
        moments: (N, 2 z, h, w) what it encodes pictures to.
        scale_factor: as in SD-1.5.
    """
    z = moments.shape[1] // 2
    mean, deviation = moments[:, :z].mean((0, 2, 3)), moments[:, :z].std((0, 2, 3))
    gain = 1 / (scale_factor * deviation)
    out, quant, post = dict(trained), "vae.quant_conv.", "vae.post_quant_conv."
    weight, bias = trained[quant + "weight"].copy(), trained[quant + "bias"].copy()
    _rows(weight)[:z] *= gain[:, None]
    bias[:z] = (bias[:z] - mean) * gain
    bias[z:] += 2 * np.log(gain)  # the log variance
    out[quant + "weight"], out[quant + "bias"] = weight, bias
    weight = _rows(trained[post + "weight"])
    out[post + "weight"] = (weight / gain).reshape(trained[post + "weight"].shape)
    out[post + "bias"] = trained[post + "bias"] + weight @ mean
    return out


def _rows(weight: np.ndarray) -> np.ndarray:
    """The weight of a 1x1 convolution as a matrix; on Ascend the network keeps it in four dimensions."""
    return weight.reshape(len(weight), -1)


def encoder_stage(model: ImagePromptModel, dataset: ImageTextDataset, args) -> Stage:
    """Text and image encoders together."""
    texts, image = model.diffusion.text_encoders, model.embedder.image_encoder
    for config in (text.config for text in texts):
        if (config.projection or config.width) != image.config.embed_dim:
            raise UserError(f"--pretrained_model_path {args.pretrained_model_path}: its pooled text is "
                            f"{config.projection or config.width} wide, its image embedding {image.config.embed_dim}; "
                            "only a model with equal widths, such as the demo model, can learn both together")
    loss = ContrastiveLoss(texts, image)

    def make(row: int, position: int) -> tuple:
        sample = dataset.sample(row, None)
        return (sample.clip_pixels, *(tokenizer([sample.text])[0] for tokenizer in model.diffusion.tokenizers))

    cells = {**{f"text{n}": text for n, text in enumerate(texts)}, "image": image}
    return Stage(loss, {**network_parameters(cells), "logit_scale": loss.logit_scale}, make,
                 _columns, _tensors, lambda path, trained: save_model(path, model, trained))


def unet_stage(model: ImagePromptModel, dataset: ImageTextDataset, args) -> Stage:
    """The UNet under text alone."""
    unet, cache = model.diffusion.unet, _features(model, dataset, args)
    noisy = _noisy(cache.encoders, args)
    return Stage(NoisePredictionLoss(unet), network_parameters({"unet": unet}), cache.sample, cache.collate,
                 lambda batch: noisy(batch)[:5], lambda path, trained: save_model(path, model, trained))


def controlnet_stage(model: ImagePromptModel, dataset: ImageTextDataset, args) -> Stage:
    """A ControlNet on edges, that starts as the UNet's copy and in silence."""
    diffusion, cache = model.diffusion, _features(model, dataset, args)
    controlnet = ControlNet(diffusion.unet.config)
    diffusion.controlnets.append(controlnet)
    copied = dict(diffusion.unet.parameters_and_names())
    for path, parameter in controlnet.parameters_and_names():
        if path in copied:
            parameter.set_data(Tensor(copied[path].asnumpy()))
    start_at_zero(controlnet, r"^(zero_convs|middle_block_out)\.")
    noisy = _noisy(cache.encoders, args)

    def make(row: int, position: int) -> tuple:
        return cache.sample(row, position), hint_pixels(canny(dataset.square(row, args.image_size), *EDGES))[0]

    def collate(step: int, positions: np.ndarray, samples: list) -> _Arrays:
        records, hints = zip(*samples)
        return _Arrays(step, (cache.collate(step, positions, records), np.stack(hints)))

    return Stage(ControlNetLoss(diffusion.unet, controlnet), network_parameters({"controlnet": controlnet}), make,
                 collate, lambda batch: (*noisy(batch.arrays[0])[:5], Tensor(batch.arrays[1])),
                 lambda path, trained: save_model(path, model, trained))


# What is trained of which family. SDXL's demo model shares the autoencoder of the other.
STAGES = {"vae": (SD15, autoencoder_stage), "clip": (SD15, encoder_stage), "unet": (SD15, unet_stage),
          "controlnet": (SD15, controlnet_stage), "clip_xl": (SDXL, encoder_stage), "unet_xl": (SDXL, unet_stage),
          "controlnet_xl": (SDXL, controlnet_stage)}


def start_at_zero(cell: nn.Cell, pattern: str) -> None:
    """Set the parameters to zero whose path matches."""
    for path, parameter in cell.parameters_and_names():
        if re.search(pattern, path):
            parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))


class _Arrays(NamedTuple):
    step: int
    arrays: tuple


def _columns(step: int, positions: np.ndarray, samples: list) -> _Arrays:
    return _Arrays(step, tuple(np.stack(column) for column in zip(*samples)))


def _tensors(batch: _Arrays) -> tuple:
    return tuple(Tensor(array) for array in batch.arrays)


def _features(model: ImagePromptModel, dataset: ImageTextDataset, args) -> FeatureCache:
    """The features of all pictures, computed once; the UNet is left without image attention."""
    unpatch_cross_attention(model.diffusion.unet)
    cache = FeatureCache(Path(args.cache_dir), FrozenEncoders(model), (args.image_size, args.image_size))
    cache.fill(dataset, 64)
    return cache


def _noisy(encoders: FrozenEncoders, args: TrainingConfig) -> Callable:
    """FeatureBatch -> what `training_inputs` gives."""
    def inputs(batch: FeatureBatch) -> tuple:
        drops = 0.0, args.drop_text_prob, 0.0
        return encoders.inputs(batch.features, batch.positions, args.seed, drops, args.p2_k)
    return inputs
