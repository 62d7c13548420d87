"""The merge steps of the SDXL page one after the other: no merge takes the place of one of another kind."""
from __future__ import annotations

import os
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import controlnet_sdxl
import image_variation_sdxl
from ip_adapter.families import SDXL
from ip_adapter.weights.dummy import write_standins
from ip_adapter.weights.parts import MergedKind, kind_of_file
from ldm.checkpoints.file import save_arrays
from tests.support.arrays import DATA, arrays
from tests.support.dummies import SHALLOW_XL
from tests.support.scripts import ROOT, narrow_xl

MERGE = runpy.run_path(str(ROOT / "tools" / "merge_ckpts_sdxl.py"))["main"]
CONVERT = runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"))["main"]
MODELS = Path("checkpoints/sdxl_models")
PLAIN = MODELS / "merged" / "sd_xl_base_1.0_ms_ip_adapter.ckpt"
CONTROL = PLAIN.with_name("sd_xl_base_1.0_ms_ip_adapter.vit-h.controlnet.ckpt")
VIT_H, VIT_BIGG = 1024, 1280


def with_encoder(width: int):
    """The small sizes with the embedding of one of the published image encoders."""
    return replace(SHALLOW_XL, image=replace(SHALLOW_XL.image, embed_dim=width),
                   proj=SHALLOW_XL.proj._replace(embed_dim=width))


@pytest.fixture
def control_words(tmp_path, monkeypatch) -> list:
    """The document's folder, in which the test runs; flags of its ControlNet merge."""
    monkeypatch.chdir(tmp_path)
    big = write_standins(tmp_path / "big", with_encoder(VIT_BIGG), family=SDXL)
    h = write_standins(tmp_path / "h", with_encoder(VIT_H), family=SDXL)
    places = {MODELS / "sd_xl_base_1.0.safetensors": big["base"],
              MODELS / "IP-Adapter/image_encoder/model.safetensors": big["open_clip_vit"],
              MODELS / "IP-Adapter/ip-adapter_sdxl.safetensors": big["ip_adapter"],
              MODELS / "IP-Adapter/ip-adapter_sdxl_vit-h.safetensors": h["ip_adapter"],
              Path("checkpoints/sd_models/IP-Adapter/image_encoder/model.safetensors"): h["open_clip_vit"],
              MODELS / "depth.safetensors": h["controlnet"]}
    for place, file in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    return ["--ip_adapter", MODELS / "IP-Adapter/ip-adapter_sdxl_vit-h.safetensors", "--open_clip_vit",
            "checkpoints/sd_models/IP-Adapter/image_encoder/model.safetensors", "--controlnet",
            MODELS / "depth.safetensors"]


def test_the_document(control_words, tmp_path, outcome):
    config = narrow_xl("inference/sd_xl_base.yaml", tmp_path / "small.yaml")
    small = ["--config", config, "--img", DATA / "input.png", "--H", "64", "--W", "64", "--sample_step", "2"]
    hint = ["--control_image", DATA / "hint.png"]

    def run(main, *flags) -> str:
        status, said = outcome(main, *flags)
        assert status == 0, said
        return said

    def used(main, *flags) -> tuple:
        """The checkpoint that an image names, and what was said."""
        said = run(main, *small, *flags, "--output_path", tmp_path / "out")
        return Image.open(sorted((tmp_path / "out" / "samples").iterdir())[-1]).text["ckpt_path"], said

    run(CONVERT, "--source", MODELS / "sd_xl_base_1.0.safetensors", "--out", MODELS / "sd_xl_base_1.0_ms.ckpt")
    assert "replacing" not in run(MERGE)
    before = PLAIN.stat().st_mtime_ns

    said = run(MERGE, *control_words)
    assert f"{PLAIN} is kept (SDXL, ViT-bigG (1280), an adapter of 4 tokens, no ControlNet); " in said
    assert f"this merge (SDXL, ViT-H (1024), an adapter of 4 tokens, a ControlNet) goes to {CONTROL.name}" in said
    assert f"tensors merged into {CONTROL}" in said and "replacing" not in said
    assert PLAIN.stat().st_mtime_ns == before and kind_of_file(PLAIN) == MergedKind("SDXL", VIT_BIGG, 4, False)
    assert kind_of_file(CONTROL) == MergedKind("SDXL", VIT_H, 4, True)

    name, said = used(image_variation_sdxl.main)
    assert name == PLAIN.name and f"loading {PLAIN}" in said and "holds no" not in said
    for flags in ([], ["--weight", PLAIN]):  # the document names the file that it thinks was replaced
        name, said = used(controlnet_sdxl.main, *hint, *flags)
        assert name == CONTROL.name and f"{PLAIN} holds no ControlNet; using {CONTROL}" in said
    name, said = used(controlnet_sdxl.main, *hint, "--controlnet", MODELS / "depth.safetensors")
    assert name == PLAIN.name
    name, said = used(image_variation_sdxl.main, *control_words[:2])
    assert name == CONTROL.name
    assert f"{PLAIN} holds no ViT-H (1024), which --ip_adapter was trained with; using {CONTROL}" in said

    finetuned = {key: value for key, value in arrays(PLAIN).items() if "_ip." in key or "image_proj" in key}
    save_arrays(tmp_path / "SDXL-base-1.0-2_ip_only.ckpt", finetuned)
    said = run(MERGE, "--ip_adpater", tmp_path / "SDXL-base-1.0-2_ip_only.ckpt", "--out", tmp_path / "full.ckpt")
    assert "is kept" not in said and kind_of_file(tmp_path / "full.ckpt") == kind_of_file(PLAIN)

    said = run(MERGE)
    assert f"replacing {PLAIN} (SDXL, ViT-bigG (1280), an adapter of 4 tokens, no ControlNet; " in said
    assert PLAIN.stat().st_mtime_ns > before
    assert f"replacing {CONTROL} (" in run(MERGE, *control_words)
    assert sorted(PLAIN.parent.iterdir()) == [PLAIN, CONTROL]


def test_a_merge_with_a_controlnet_first(control_words, outcome):
    """It takes the default name, as the document says; the plain merge then leaves it there."""
    for flags in (control_words, []):
        status, said = outcome(MERGE, "--sd_xl_base", MODELS / "sd_xl_base_1.0.safetensors", *flags)
        assert status == 0, said
    assert kind_of_file(PLAIN) == MergedKind("SDXL", VIT_H, 4, True)
    plain = PLAIN.with_name("sd_xl_base_1.0_ms_ip_adapter.plain.ckpt")
    assert kind_of_file(plain) == MergedKind("SDXL", VIT_BIGG, 4, False)
    status, said = outcome(MERGE, "--sd_xl_base", PLAIN, *control_words)
    assert status == 2 and f"--out {PLAIN}: is the file of --sd_xl_base, which is read" in said


def test_a_missing_default_is_named(control_words, outcome):
    (MODELS / "IP-Adapter/ip-adapter_sdxl.safetensors").unlink()
    words = ["--sd_xl_base", MODELS / "sd_xl_base_1.0.safetensors"]
    status, said = outcome(MERGE, *words)
    assert status == 2 and "--ip_adapter: no file checkpoints/sdxl_models/IP-Adapter/ip-adapter_sdxl" in said
    status, said = outcome(MERGE, *words, "--skip_ip", "--out", "train.ckpt")  # needs none
    assert status == 0 and kind_of_file(Path("train.ckpt")) == MergedKind("SDXL", VIT_BIGG, 0, False)
