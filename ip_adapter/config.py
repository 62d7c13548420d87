"""Configuration: YAML files checked against dataclasses; an unknown key or a wrong type stops the run.

The sizes of networks are not configured: they are read off the checkpoint (`ldm/architecture.py`).
"""
from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Tuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import UserError

if TYPE_CHECKING:  # command lines read configurations before anything large is imported
    from ldm.schedule import NoiseSchedule

ROOT = Path(__file__).resolve().parent.parent
STATE = "train_resume.ckpt"  # of a training, beside what it publishes: all that the next step depends on
MAX_SIZE = 4096  # pixels of a side that can be asked for


@dataclass
class ModelConfig:
    """What the tensors of a checkpoint do not tell.

    Attributes:
        num_heads: heads of every UNet attention, or -1.
        num_head_channels: channels of one head, or -1 if `num_heads` counts.
        norm_groups: of every group norm of the UNet, the ControlNets and the autoencoder.
        image_heads: heads of the image encoder.
        image_activation: of the image encoder, "gelu" (OpenCLIP's) or "quick_gelu" (OpenAI's); "" goes by the width of
            its embedding.
        scale_factor: what the autoencoder's latents are multiplied by.
        beta_start: beta of timestep 0.
        beta_end: beta of timestep 999.
        prediction: "eps" for a UNet that predicts the noise, "v" for the velocity.
    """

    num_heads: int = 8
    num_head_channels: int = -1
    norm_groups: int = 32
    image_heads: int = 16
    image_activation: str = ""
    scale_factor: float = 0.18215
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: str = "eps"

    def __post_init__(self) -> None:
        if self.image_activation not in ("", "gelu", "quick_gelu"):
            raise UserError(f"model.image_activation is '{self.image_activation}', expected gelu, quick_gelu or '' to "
                            "go by the width of the embedding")

    def schedule(self) -> NoiseSchedule:
        """The noise the model was trained with, and what it predicts."""
        from ldm.schedule import NoiseSchedule
        return NoiseSchedule(self.beta_start, self.beta_end, self.prediction)


@dataclass
class SamplingConfig:
    """Defaults of the flags of the same name."""

    prompt: str = "best quality, high quality"
    negative_prompt: str = "monochrome, lowres, bad anatomy, worst quality, low quality"
    sampling_steps: int = 50
    scale: float = 7.5
    ip_scale: float = 1.0
    control_scale: float = 1.0
    H: int = 512
    W: int = 512
    n_samples: int = 4
    n_iter: int = 1
    seed: int = 42
    sampler: str = "EulerEDMSampler"
    discretization: str = "DiffusersDDPMDiscretization"
    guider: str = "VanillaCFG"


@dataclass
class InferenceConfig:
    """Everything an inference script takes from its YAML file.

    Attributes:
        name: name of the model, for metadata and messages.
        model: what the tensors do not tell.
        sampling: defaults of flags.
        ckpt_path: candidates for the merged checkpoint; the first that exists is the default.
        img: default picture, empty for none; so the next three.
        ref_img: default reference.
        ref_mask: default mask.
        control_image: default hint of a ControlNet.
        output_path: default output folder.
    """

    name: str = "SD-1.5"
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    ckpt_path: Tuple[str, ...] = ()
    img: str = ""
    ref_img: str = ""
    ref_mask: str = ""
    control_image: str = ""
    output_path: str = "outputs/demo/SD"


def _setting(default, text: str, *aliases: str):
    """A field that is a YAML key and a flag, with the flag's help and the other names of both."""
    return field(default=default, metadata={"help": text, "aliases": aliases})


@dataclass
class TrainingConfig:
    """Everything a training script takes from its YAML file; every key but `name` and `model` is a flag too."""

    name: str = "SD-1.5"
    model: ModelConfig = field(default_factory=ModelConfig)
    data_path: str = _setting("", "folder with pictures and img_txt.csv (columns dir,text and perhaps image_prompt), "
                              "or the .csv itself")
    pretrained_model_path: str = _setting("", "merged checkpoint, with an adapter to finetune or without (--skip_ip)",
                                          "weight")
    output_path: str = _setting("runs", "folder for checkpoints, log and loss picture; {time} stands for when the "
                                        "training began", "save_path")
    image_size: int = _setting(512, "side of the square trained on, a multiple of 8")
    buckets: bool = _setting(False, "instead of squares, sizes near the pictures' own proportions with as many pixels, "
                                    "one for each batch; a graph is compiled for each")
    random_crop: bool = _setting(False, "draw the place of the square instead of taking the centre")
    max_broken: int = _setting(100, "so many pictures that cannot be read are skipped")
    num_workers: int = _setting(2, "threads that read pictures")
    cache_dir: str = _setting("", "folder for latents, text states and image embeddings, which are then computed once "
                                  "and kept for later runs; the encoders leave memory")
    recompute: bool = _setting(False, "compute the activations of the UNet's blocks again for the gradients instead of "
                                      "keeping them: less memory, more time; graph mode only")
    train_batch_size: int = _setting(16, "pictures in a batch on each device", "per_batch_size")
    gradient_accumulation_steps: int = _setting(1, "batches for one optimizer step")
    epochs: int = _setting(100, "passes over the data")
    max_steps: int = _setting(2000, "stop after so many optimizer steps if the epochs take more; 0 for no limit",
                              "total_step")
    seed: int = _setting(42, "of the order of the data, the noise and what is dropped")
    start_learning_rate: float = _setting(1e-4, "learning rate after the warm-up", "base_learning_rate")
    end_learning_rate: float = _setting(0.0, "where a cosine schedule ends")
    scheduler: str = _setting("constant", "constant or cosine")
    warmup_steps: int = _setting(0, "optimizer steps over which the learning rate rises")
    beta1: float = _setting(0.9, "AdamW: decay of the mean of gradients")
    beta2: float = _setting(0.999, "AdamW: decay of the mean of squared gradients")
    weight_decay: float = _setting(0.01, "AdamW: weight decay")
    p2_k: float = _setting(0.0, "draw timesteps in proportion to 1 / (k + signal-to-noise ratio), as P2 weighting "
                                "weighs errors; 0 draws all alike")
    max_grad_norm: float = _setting(0.0, "clip gradients to this norm; 0 for never")
    ema_decay: float = _setting(0.0, "save an average of the weights with this decay, such as 0.999; 0 for none")
    init_loss_scale: float = _setting(65536.0, "float16: what the loss is multiplied by at first")
    loss_scale_factor: float = _setting(2.0, "float16: by which the scale falls and rises")
    scale_window: int = _setting(1000, "float16: good steps after which the scale rises")
    drop_image_prob: float = _setting(0.05, "share of samples trained without the picture")
    drop_text_prob: float = _setting(0.05, "share of samples trained without the text")
    drop_both_prob: float = _setting(0.05, "share of samples trained without both")
    ckpt_save_interval: int = _setting(500, "save every so many epochs, or steps with --step_mode True",
                                       "save_ckpt_interval")
    step_mode: bool = _setting(True, "--ckpt_save_interval counts optimizer steps, not epochs")
    validation_interval: int = _setting(0, "write validation pictures every so many optimizer steps; 0 for never")
    validation_data: str = _setting("", "folder with pictures and img_txt.csv to validate on; empty for the training "
                                        "data")
    validation_count: int = _setting(4, "its first so many rows")
    validation_steps: int = _setting(20, "denoising steps of validation pictures")
    is_parallel: bool = _setting(False, "one of several processes, started by mpirun or msrun")
    ckpt_max_keep: int = _setting(5, "so many of the last checkpoints are kept; 0 for all")


def load_config(schema: type, path) -> object:
    """A YAML file as an instance of `schema`.

    Args:
        schema: a dataclass; its defaults stand where the file is silent.
        path: the YAML file. In place of a block, `model` may name another file, relative to this one, that has it.

    Raises:
        UserError: missing file, broken YAML, unknown key or wrong type; the message names the key.
    """
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file; expected a YAML file such as those in configs/inference")
    try:
        given = OmegaConf.load(path)
        if isinstance(given.get("model"), str):
            given["model"] = load_config(InferenceConfig, Path(path).parent / given["model"]).model
        for setting in fields(schema):
            for alias in set(given) & set(setting.metadata.get("aliases", ())):
                if setting.name in given:
                    raise UserError(f"--config {path}: {alias} and {setting.name} are two names of one setting")
                given[setting.name] = given.pop(alias)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except UserError:
        raise
    except (OmegaConfBaseException, ValueError) as error:
        reason = str(error).strip().splitlines()
        key = getattr(error, "full_key", None)
        raise UserError(f"--config {path}: {f'key {key}: ' if key else ''}{reason[0] if reason else error}") from None
    except Exception as error:  # the YAML parser's own errors
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
