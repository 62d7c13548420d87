"""The user's document from top to bottom, its commands as printed, in one folder with small files at its paths."""
from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ip_adapter.families import SDXL
from ip_adapter.weights.dummy import write_standins
from ip_adapter.weights.parts import ModelSizes
from tests.support.arrays import DATA, arrays
from tests.support.dummies import SHALLOW, SHALLOW_XL
from tests.support.scripts import ROOT, every_core

pytestmark = pytest.mark.slow

COMMANDS = r"""
python tools/merge_ckpts_sdxl.py
python tools/merge_ckpts_sd.py
python tools/merge_ckpts_sdxl.py -h
python tools/merge_ckpts_sd.py -h
python image_variation_sdxl.py --img path_of_the_image --weight path_of_the_ckpt --num_cols 4
python image_variation_sdxl.py --img path_of_the_image --weight path_of_the_ckpt --prompt "your magic prompt" --num_cols 4 --ip_scale 0.6
python image_variation_sdxl.py --img assets/woman.png --num_cols 4
python image_variation_sdxl.py --img assets/woman.png --prompt "best quality, high quality, wearing sunglasses on the beach"  --num_cols 4 --ip_scale 0.6 --seed 43
python image_variation_sdxl.py -h
python tools/merge_ckpts_sdxl.py --ip_adapter checkpoints/sdxl_models/IP-Adapter/ip-adapter_sdxl_vit-h.safetensors --open_clip_vit checkpoints/sd_models/IP-Adapter/image_encoder/model.safetensors --controlnet path_of_the_controlnet_checkpoint
python controlnet_sdxl.py --img path_of_the_image --control_image path_of_the_control_image --weight path_of_the_ckpt --num_cols 3
python controlnet_sdxl.py --img assets/statue.png --control_img assets/structure_controls/depth.png --ncols 3 --seed 0
python image_variation_sd.py --img path_of_the_image --ckpt_path path_of_the_ckpt --n_samples 4
python image_variation_sd.py --img assets/woman.png
python image_to_image_sd.py --img path_of_the_image --ref_img path_of_the_ref_image --ckpt_path path_of_the_ckpt --n_samples 4 --strength 0.6
python image_to_image_sd.py --img assets/river.png --ref_img assets/vermeer.jpg
python image_inpainting_sd.py --img path_of_the_image --ref_img path_of_the_ref_image --ref_mask path_of_the_mask_image --ckpt_path path_of_the_ckpt --n_samples 4 --strength 0.7
python image_inpainting_sd.py --img assets/girl.png --ref_img assets/inpainting/image.png --ref_mask assets/inpainting/mask.png --seed 0
python tools/merge_ckpts_sd.py --controlnet path_of_the_controlnet_checkpoint
python controlnet_sd.py --img path_of_the_image --control_image path_of_the_control_image --ckpt_path path_of_the_ckpt --n_samples 4
python controlnet_sd.py --img assets/statue.png --control_img assets/structure_controls/depth.png
python controlnet_sd.py --img assets/girl.png --control_img assets/structure_controls/openpose.png
python train_sdxl.py --data_path ./datasets/pokemon_blip/train --save_ckpt_interval 5000 --weight checkpoints/sdxl_models/merged/sd_xl_base_1.0_ms_ip_adapter.ckpt
mpirun -n 4 python train_sdxl.py --data_path ./datasets/pokemon_blip/train --is_parallel True --save_ckpt_interval 5000 --weight checkpoints/sdxl_models/merged/sd_xl_base_1.0_ms_ip_adapter.ckpt
python train_sdxl.py -h
python tools/merge_ckpts_sdxl.py --ip_adpater runs/YYYY.mm.DD-HH:MM:SS/weights/SDXL-base-1.0-200000_ip_only.ckpt --out runs/YYYY.mm.DD-HH:MM:SS/weights/SDXL-base-1.0-200000_full.ckpt
python image_variation_sdxl.py --img assets/woman.png --weight runs/YYYY.mm.DD-HH:MM:SS/weights/SDXL-base-1.0-200000_full.ckpt
python train_sd.py --data_path ./datasets/pokemon_blip/train --pretrained_model_path checkpoints/sd_models/merged/sd_v1.5_ip_adapter.ckpt
python train_sd.py -h
python tools/merge_ckpts_sd.py --ip_adpater runs/ckpt/sd-2000.ckpt --out runs/ckpt/sd-2000_full.ckpt
python image_variation_sd.py --img assets/woman.png --ckpt_path runs/ckpt/sd-2000_full.ckpt
python tools/merge_ckpts_sdxl.py --skip_ip --out checkpoints/sdxl_models/merged/sd_xl_base_1.0_ms_ip_adapter_train.ckpt
python tools/prepare_coco.py --label path_of_captions_train2017.json --image path_of_train2017
python train_sdxl.py --data_path COCO2017/train2017 --weight checkpoints/sd_xl_base_1.0_ms_ip_adapter_train.ckpt
mpirun -n 8 python train_sdxl.py --data_path COCO2017/train2017 --is_parallel True --weight checkpoints/sd_xl_base_1.0_ms_ip_adapter_train.ckpt
"""  # noqa: E501
# The document's words for files of the reader's own.
OWN = {"path_of_the_image": "assets/woman.png", "path_of_the_control_image": "assets/structure_controls/depth.png",
       "path_of_the_ref_image": "assets/river.png", "path_of_the_mask_image": "assets/inpainting/mask.png",
       "path_of_captions_train2017.json": "captions_train2017.json", "path_of_train2017": "COCO2017/train2017"}
OWN_SD = {"path_of_the_ckpt": "checkpoints/sd_models/merged/sd_v1.5_ip_adapter.ckpt",
          "path_of_the_controlnet_checkpoint":
              "checkpoints/sd_models/control_v11f1p_sd15_depth/diffusion_pytorch_model.safetensors"}
OWN_XL = {"path_of_the_ckpt": "checkpoints/sdxl_models/merged/sd_xl_base_1.0_ms_ip_adapter.ckpt",
          "path_of_the_controlnet_checkpoint":
              "checkpoints/sdxl_models/controlnet-depth-sdxl-1.0/diffusion_pytorch_model.safetensors"}
KINDS = {"controlnet_sd.py": "checkpoints/sd_models/merged/sd_v1.5_ip_adapter.controlnet.ckpt",
         "controlnet_sdxl.py": "checkpoints/sdxl_models/merged/sd_xl_base_1.0_ms_ip_adapter.vit-h.controlnet.ckpt"}
SAMPLING = ["--H", "64", "--W", "64", "--sampling_steps", "2"]  # what is printed makes 512x512 in 50 steps
TRAINING = ["--image_size", "64", "--train_batch_size", "1", "--max_steps", "2", "--ms_mode", "1"]
# What the README has the superuser set, and who starts more processes than there are cores.
OPEN_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


def embedding(sizes: ModelSizes, width: int) -> ModelSizes:
    """Image embeddings as wide as the published ones, by which the kinds of encoders are told apart."""
    return replace(sizes, image=replace(sizes.image, embed_dim=width), proj=sizes.proj._replace(embed_dim=width))


# Heads too are as wide as the published ones, which no tensor tells.
SMALL_XL = replace(SHALLOW_XL, unet=replace(SHALLOW_XL.unet, num_head_channels=64))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder as the document describes it before its first command."""
    models, xl = tmp_path / "checkpoints" / "sd_models", tmp_path / "checkpoints" / "sdxl_models"
    write_standins(models, embedding(SHALLOW, 1024))["base"].rename(tmp_path / "base.safetensors")
    write_standins(xl, embedding(SMALL_XL, 1280), family=SDXL)["base"].rename(tmp_path / "base_xl.safetensors")
    vit_h = write_standins(tmp_path / "vit-h", embedding(SMALL_XL, 1024), family=SDXL)["ip_adapter"]
    vit_h.rename(xl / "IP-Adapter" / "ip-adapter_sdxl_vit-h.safetensors")
    for name in ("woman.png", "river.png", "vermeer.jpg", "girl.png", "statue.png", "inpainting/image.png",
                 "inpainting/mask.png", "structure_controls/depth.png", "structure_controls/openpose.png"):
        path = tmp_path / "assets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(DATA / ("mask.png" if "mask" in name else "input.png")).convert("RGB").save(path)
    pokemon, coco = tmp_path / "datasets/pokemon_blip/train", tmp_path / "COCO2017/train2017"
    for place in (pokemon, coco):
        place.mkdir(parents=True)
        for n in range(8):
            Image.open(DATA / "input.png").convert("RGB").save(place / f"img{n}.jpg")
    (pokemon / "img_txt.csv").write_text("dir,text\n" + "".join(f"img{n}.jpg,a red circle\n" for n in range(8)))
    (tmp_path / "captions_train2017.json").write_text(json.dumps({
        "images": [{"id": n, "file_name": f"img{n}.jpg"} for n in range(8)],
        "annotations": [{"image_id": n, "caption": "a red circle"} for n in range(8)]}))
    for script in [ROOT / "tools", *ROOT.glob("*_sd.py"), *ROOT.glob("*_sdxl.py")]:
        (tmp_path / script.name).symlink_to(script)
    return tmp_path


def test_the_document(folder, outcome, monkeypatch):
    """Every command succeeds, and what it says will be written is there, of the kind that later commands need."""
    monkeypatch.chdir(folder)
    convert(outcome, monkeypatch)
    for number, command in enumerate(COMMANDS.strip().splitlines(), 1):
        words = written_out(command)
        before = sorted(folder.glob("runs/*"))
        status, said = run(words, outcome, monkeypatch)
        assert status == 0 and "Traceback" not in said, f"command {number}: {command}\n{said}"
        if "train_sdxl" in command and "-h" not in words:
            made, = set(folder.glob("runs/*")) - set(before)
            assert (made / "weights/SDXL-base-1.0-2_ip_only.ckpt").exists(), command
    assert_outputs(folder)


def convert(outcome, monkeypatch) -> None:
    """The document points to other projects for this."""
    for source, out in (("base", "checkpoints/sd_models/sd_v1.5_d0ab7146.ckpt"),
                        ("base_xl", "checkpoints/sdxl_models/sd_xl_base_1.0_ms.ckpt")):
        words = ["python", "tools/convert_checkpoint.py", "--source", f"{source}.safetensors", "--out", out]
        status, said = run(words, outcome, monkeypatch)
        assert status == 0, said


def written_out(command: str) -> list:
    """The words of a command, with files of the reader's own, in small, and shorter."""
    script, words = re.search(r"\w+\.py", command)[0], shlex.split(command)
    own = {**OWN, **(OWN_XL if "sdxl" in script else OWN_SD)}
    if script in KINDS:
        own["path_of_the_ckpt"] = KINDS[script]
    words = [own.get(word, word) for word in words]
    if "YYYY" in command:
        run_of = sorted(Path("runs").glob("????.??.??-??:??:??"))[0].name
        words = [word.replace("YYYY.mm.DD-HH:MM:SS", run_of).replace("200000", "2") for word in words]
    words = [word.replace("sd-2000", "sd-2") for word in words]
    if "-h" in words or script.startswith(("merge", "prepare")):
        return words
    return words + (TRAINING if script.startswith("train") else SAMPLING)


def run(words: list, outcome, monkeypatch) -> tuple:
    """Status and standard error of a command; Python's runs in this process, which has started MindSpore already."""
    if words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        return outcome(lambda _: runpy.run_path(words[1], run_name="__main__"))
    here = {"python": sys.executable, "mpirun": str(Path(sys.executable).parent / "mpirun")}
    words = [here.get(word, word) for word in words] + ["--cpu_threads", "1"]
    with every_core():
        result = subprocess.run(words, env={**os.environ, **OPEN_MPI},
                                capture_output=True, text=True, timeout=600)
    return result.returncode, result.stderr


def assert_outputs(folder: Path) -> None:
    """The places the document names, and the kinds of merged files."""
    merged = {path.name: arrays(path) for path in folder.glob("checkpoints/*/merged/*.ckpt")}
    assert merged.keys() == {"sd_v1.5_ip_adapter.ckpt", "sd_v1.5_ip_adapter.controlnet.ckpt",
                             "sd_xl_base_1.0_ms_ip_adapter.ckpt", "sd_xl_base_1.0_ms_ip_adapter.vit-h.controlnet.ckpt",
                             "sd_xl_base_1.0_ms_ip_adapter_train.ckpt"}
    for name, tensors in merged.items():
        assert any("control" in tensor for tensor in tensors) == ("controlnet" in name), name
        assert any("image_proj" in tensor for tensor in tensors) == ("_train" not in name), name
    assert len(list(folder.glob("outputs/demo/SDXL-base-1.0/samples/*.png"))) == 4 * 4 + 2 * 3 + 1
    assert len(list(folder.glob("outputs/demo/SD/samples/*.png"))) == 4 * 10
    assert {path.name for path in (folder / "runs/ckpt").iterdir()} >= {"sd-2.ckpt", "sd-2_full.ckpt"}
    assert len(list(folder.glob("runs/????.??.??-??:??:??"))) == 4
    assert (folder / "COCO2017/train2017/img_txt.csv").read_text().splitlines()[:2] == [
        "dir,text", "img0.jpg,a red circle"]
