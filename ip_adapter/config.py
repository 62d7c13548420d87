"""Configuration: YAML files checked against dataclasses; an unknown key, a wrong type or a value out of range stops
the run. What a value may be stands beside its default, and holds for the flag of the same name too.

The sizes of networks are not configured: they are read off the checkpoint (`ldm/checkpoints/architecture.py`).
"""
from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Tuple

import yaml
from omegaconf import DictConfig, OmegaConf

from gm.choices import DISCRETIZATIONS, GUIDERS, SAMPLERS
from ldm.errors import UserError
from ldm.files import check_readable, printable, reason

if TYPE_CHECKING:  # command lines read configurations before anything large is imported
    from ldm.sampling.schedule import NoiseSchedule

ROOT = Path(__file__).resolve().parent.parent
STATE = "train_resume.ckpt"  # of a training, beside what it publishes: all that the next step depends on
MAX_SIZE = 4096  # pixels of a side that can be asked for
MAX_BYTES, MAX_DEPTH = 1 << 15, 8  # of a YAML file: the largest that ships has 1 KB and two levels
MANY = 10**9  # of steps, epochs and the like: no run gets there
BELOW_ONE = 0.9999999  # the largest decay: at 1 an average never moves


class Limits(NamedTuple):
    """What a number may be; both ends are included."""

    at_least: float
    at_most: float
    multiple_of: int = 1
    also: tuple = ()  # values outside that have a meaning of their own

    def allow(self, value: float) -> bool:
        """Whether a number is finite and within these."""
        return value in self.also or math.isfinite(value) and (
            self.at_least <= value <= self.at_most and (self.multiple_of == 1 or value % self.multiple_of == 0))

    def __str__(self) -> str:
        also = "".join(f"{value} or " for value in self.also)
        step = f", a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{also}{self.at_least:g} to {self.at_most:.10g}{step}"


def limited(default: float, at_least: float, at_most: float, multiple_of: int = 1, also: tuple = (), **more) -> Any:
    """A field for a number within limits; `more` is further metadata."""
    return field(default=default, metadata={"limits": Limits(at_least, at_most, multiple_of, also), **more})


def one_word(default: str, *words: str, **more) -> Any:
    """A field for one of these words; `more` is further metadata."""
    return field(default=default, metadata={"words": words, **more})


def setting_of(schema: type, name: str) -> Field:
    """The field of a configuration with this name; its metadata holds what its value may be."""
    return next(setting for setting in fields(schema) if setting.name == name)


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

    num_heads: int = limited(8, 1, 1024, also=(-1,))
    num_head_channels: int = limited(-1, 1, 4096, also=(-1,))
    norm_groups: int = limited(32, 1, 1024)
    image_heads: int = limited(16, 1, 1024)
    image_activation: str = one_word("", "gelu", "quick_gelu", "")
    scale_factor: float = limited(0.18215, 1e-4, 1e4)
    beta_start: float = limited(0.00085, 1e-7, 0.05)  # beyond, float32 does not hold the noise of the last timestep
    beta_end: float = limited(0.012, 1e-7, 0.05)
    prediction: str = one_word("eps", "eps", "v")

    def __post_init__(self) -> None:
        if self.beta_start > self.beta_end:
            raise UserError(f"model.beta_start is {self.beta_start}, expected at most model.beta_end, which is "
                            f"{self.beta_end}")

    def schedule(self) -> NoiseSchedule:
        """The noise the model was trained with, and what it predicts."""
        from ldm.sampling.schedule import NoiseSchedule
        return NoiseSchedule(self.beta_start, self.beta_end, self.prediction)


@dataclass
class SamplingConfig:
    """Defaults of the flags of the same name."""

    prompt: str = "best quality, high quality"
    negative_prompt: str = "monochrome, lowres, bad anatomy, worst quality, low quality"
    sampling_steps: int = limited(50, 1, 1000)
    scale: float = limited(7.5, 0, 100)
    ip_scale: float = limited(1.0, 0, 10)
    control_scale: float = limited(1.0, 0, 10)
    H: int = limited(512, 8, MAX_SIZE, multiple_of=8)
    W: int = limited(512, 8, MAX_SIZE, multiple_of=8)
    n_samples: int = limited(4, 1, 1000)
    n_iter: int = limited(1, 1, 100000)
    seed: int = limited(42, 0, 2**63)
    sampler: str = one_word("EulerEDMSampler", *SAMPLERS, *SAMPLERS.values())
    discretization: str = one_word("DiffusersDDPMDiscretization", *DISCRETIZATIONS)
    guider: str = one_word("VanillaCFG", *GUIDERS)


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


def _number(default: float, at_least: float, at_most: float, text: str, *aliases: str, multiple_of: int = 1) -> Any:
    """A `_setting` that is a number within limits."""
    return limited(default, at_least, at_most, multiple_of, help=text, aliases=aliases)


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
    image_size: int = _number(512, 8, MAX_SIZE, "side of the square trained on, a multiple of 8", multiple_of=8)
    buckets: bool = _setting(False, "instead of squares, sizes near the pictures' own proportions with as many pixels, "
                                    "one for each batch; a graph is compiled for each")
    random_crop: bool = _setting(False, "draw the place of the square instead of taking the centre")
    max_broken: int = _number(100, 0, MANY, "so many pictures that cannot be read are skipped")
    num_workers: int = _number(2, 1, 256, "threads that read pictures")
    cache_dir: str = _setting("", "folder for latents, text states and image embeddings, which are then computed once "
                                  "and kept for later runs; the encoders leave memory")
    recompute: bool = _setting(False, "compute the activations of the UNet's blocks again for the gradients instead of "
                                      "keeping them: less memory, more time; graph mode only")
    train_batch_size: int = _number(16, 1, 100000, "pictures in a batch on each device", "per_batch_size")
    gradient_accumulation_steps: int = _number(1, 1, 100000, "batches for one optimizer step")
    epochs: int = _number(100, 0, MANY, "passes over the data")
    max_steps: int = _number(2000, 0, MANY, "stop after so many optimizer steps if the epochs take more; 0 for no "
                             "limit", "total_step")
    seed: int = _number(42, 0, 2**63, "of the order of the data, the noise and what is dropped")
    start_learning_rate: float = _number(1e-4, 0, 10, "learning rate after the warm-up", "base_learning_rate")
    end_learning_rate: float = _number(0.0, 0, 10, "where a cosine schedule ends")
    scheduler: str = one_word("constant", "constant", "cosine", aliases=(), help="constant or cosine")
    warmup_steps: int = _number(0, 0, MANY, "optimizer steps over which the learning rate rises")
    beta1: float = _number(0.9, 0, BELOW_ONE, "AdamW: decay of the mean of gradients")
    beta2: float = _number(0.999, 0, BELOW_ONE, "AdamW: decay of the mean of squared gradients")
    weight_decay: float = _number(0.01, 0, 10, "AdamW: weight decay")
    p2_k: float = _number(0.0, 0, 1e6, "draw timesteps in proportion to 1 / (k + signal-to-noise ratio), as P2 "
                          "weighting weighs errors; 0 draws all alike")
    max_grad_norm: float = _number(0.0, 0, 1e9, "clip gradients to this norm; 0 for never")
    ema_decay: float = _number(0.0, 0, BELOW_ONE, "save an average of the weights with this decay, such as 0.999; 0 "
                               "for none")
    init_loss_scale: float = _number(65536.0, 1, 2**31, "float16: what the loss is multiplied by at first")
    loss_scale_factor: float = _number(2.0, 1, 1024, "float16: by which the scale falls and rises")
    scale_window: int = _number(1000, 0, MANY, "float16: good steps after which the scale rises")
    drop_image_prob: float = _number(0.05, 0, 1, "share of samples trained without the picture")
    drop_text_prob: float = _number(0.05, 0, 1, "share of samples trained without the text")
    drop_both_prob: float = _number(0.05, 0, 1, "share of samples trained without both")
    ckpt_save_interval: int = _number(500, 1, MANY, "save every so many epochs, or steps with --step_mode True",
                                      "save_ckpt_interval")
    step_mode: bool = _setting(True, "--ckpt_save_interval counts optimizer steps, not epochs")
    validation_interval: int = _number(0, 0, MANY, "write validation pictures every so many optimizer steps; 0 for "
                                       "never")
    validation_data: str = _setting("", "folder with pictures and img_txt.csv to validate on; empty for the training "
                                        "data")
    validation_count: int = _number(4, 1, 100, "its first so many rows")
    validation_steps: int = _number(20, 1, 1000, "denoising steps of validation pictures")
    is_parallel: bool = _setting(False, "one of several processes, started by mpirun or msrun")
    ckpt_max_keep: int = _number(5, 0, MANY, "so many of the last checkpoints are kept; 0 for all")


def load_config(schema: type, path) -> Any:
    """A YAML file as an instance of `schema`.

    Args:
        schema: a dataclass; its defaults stand where the file is silent.
        path: the YAML file. In place of a block, `model` may name another file, relative to this one, that has it.

    Raises:
        UserError: no file in YAML, an unknown key, a wrong type or a value out of range; the message names the key.
    """
    given = _read(path)
    if isinstance(given.get("model"), str):
        other = Path(path).parent / given["model"]
        if isinstance(_read(other).get("model"), str):
            raise UserError(f"--config {printable(path)}: model names {printable(other)}, which names another file; "
                            "expected a file with the block itself")
        given["model"] = load_config(InferenceConfig, other).model
    shown = f"--config {printable(path)}"
    try:
        for setting in fields(schema):
            for alias in set(given) & set(setting.metadata.get("aliases", ())):
                if setting.name in given:
                    raise UserError(f"{alias} and {setting.name} are two names of one setting")
                given[setting.name] = given.pop(alias)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
        _check(config)
        return config
    except UserError as error:
        raise UserError(f"{shown}: {printable(error)}") from None
    except Exception as error:  # OmegaConf's own, and Python's where it converts a value
        lines, key = str(error).strip().splitlines(), getattr(error, "full_key", None)
        why = printable(lines[0] if lines else type(error).__name__)[:200]
        raise UserError(f"{shown}: {f'key {printable(key)}: ' if key else ''}{why}") from None


def _read(path) -> DictConfig:
    """Keys and values of a small YAML file; bounded in time and memory, whatever the file is.

    Raises:
        UserError: it cannot be read, or holds what no configuration needs.
    """
    shown = f"--config {printable(path)}"
    check_readable(path, "--config", "a YAML file such as those in configs/inference")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{shown}: is larger than {MAX_BYTES} bytes; expected a YAML file such as those in "
                            "configs/inference")
        text = content.decode("utf-8-sig")
        _check_events(text)
        given = OmegaConf.create(text)
    except UserError as error:
        raise error if str(error).startswith(shown) else UserError(f"{shown}: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({reason(error)})") from None
    except Exception as error:  # the YAML parser's own errors, and Python's where it converts a value
        raise UserError(f"{shown}: not valid YAML ({printable(' '.join(str(error).split()))[:200]})") from None
    if not isinstance(given, DictConfig):
        raise UserError(f"{shown}: holds a list; expected keys and values such as those in configs/inference")
    return given


def _check_events(text: str) -> None:
    """Refuse what a small file can make large, or what would take values from elsewhere.

    Raises:
        UserError: saying what.
        yaml.YAMLError: no YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        where = f"line {event.start_mark.line + 1}"
        if depth > MAX_DEPTH:
            raise UserError(f"{where} is nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{where} holds an alias, *{printable(event.anchor)}; write the value out")
        if isinstance(event, yaml.ScalarEvent):
            if "${" in event.value:  # environment variables would end up in the metadata of every image
                raise UserError(f"{where} holds ${{...}}, which is not filled in here; write the value out")
            if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in event.value):
                raise UserError(f"{where} holds half a character or a NUL, which no file can store")


def _check(config: Any, block: str = "") -> None:
    """Check the values of a configuration against what their fields allow.

    Raises:
        UserError: naming the key.
    """
    for setting in fields(config):
        key, value = f"{block}{setting.name}", getattr(config, setting.name)
        limits, words = setting.metadata.get("limits"), setting.metadata.get("words")
        if is_dataclass(value):
            _check(value, f"{key}.")
        if limits and not limits.allow(value):
            raise UserError(f"{key} is {str(value)[:40]}, expected {limits}")
        if words and value not in words:
            expected = [repr(word) if not word else word for word in words]
            raise UserError(f"{key} is {value[:40]!r}, expected {', '.join(expected[:-1])} or {expected[-1]}")
