"""Every command of the README, and those of the user's document that exist so far, run on small stand-in files."""
from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import replace

import pytest
from PIL import Image

from ip_adapter.families import SDXL
from ip_adapter.image_prompt import ImageProjConfig
from ip_adapter.weights.dummy import write_clip_standin, write_standins
from ldm.checkpoints.file import save_arrays
from tests.support.arrays import DATA, arrays
from tests.support.dummies import SHALLOW, SHALLOW_XL
from tests.support.scripts import ROOT, narrow_xl, shell

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```shell\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines() if line.startswith(("python ", "mpirun "))]
DOCUMENT = [
    "python tools/merge_ckpts_sd.py --ip_adpater runs/ckpt/sd-2000.ckpt --out runs/ckpt/sd-2000_full.ckpt",
    "python tools/merge_ckpts_sd.py -h",
    "python image_variation_sd.py --img assets/woman.png --ckpt_path runs/ckpt/sd-2000_full.ckpt --n_samples 4",
    "python image_to_image_sd.py --img assets/river.png --ref_img assets/vermeer.jpg",
    "python image_inpainting_sd.py --img assets/girl.png --ref_img assets/inpainting/image.png "
    "--ref_mask assets/inpainting/mask.png --ckpt_path runs/ckpt/sd-2000_full.ckpt --n_samples 4 --strength 0.7",
    "python controlnet_sd.py --img assets/statue.png --control_img assets/structure_controls/depth.png",
    "python controlnet_sd.py --img assets/girl.png --control_img assets/structure_controls/openpose.png",
    "python image_variation_sdxl.py --img assets/woman.png --prompt 'best quality, high quality, wearing sunglasses "
    "on the beach' --num_cols 4 --ip_scale 0.6 --seed 43",
    "python tools/merge_ckpts_sdxl.py "
    "--ip_adapter checkpoints/sdxl_models/IP-Adapter/ip-adapter_sdxl_vit-h.safetensors "
    "--open_clip_vit checkpoints/sd_models/IP-Adapter/image_encoder/model.safetensors --controlnet "
    "checkpoints/sdxl_models/controlnet-depth-sdxl-1.0/diffusion_pytorch_model.safetensors",
    "python controlnet_sdxl.py --img assets/statue.png --control_img assets/structure_controls/depth.png --ncols 3 "
    "--seed 0",
]
XL_PICTURES = 4 + 1 + 1 + 3 + 4 + 4 + 4 + 3  # of the page's commands, then of the document's
PICTURES = {"woman.png": "input.png", "river.png": "input.png", "vermeer.jpg": "input.png", "girl.png": "input.png",
            "statue.png": "input.png", "inpainting/image.png": "input.png", "inpainting/mask.png": "mask.png",
            "structure_controls/depth.png": "hint.png", "structure_controls/openpose.png": "hint.png"}
SMALL = " --H 64 --W 64 --sampling_steps 2"  # what is printed makes 512x512 in 50 steps
SHORT = " --image_size 64 --train_batch_size 2 --max_steps 2 --ms_mode 1"  # or trains for hours
# By the script, what keeps a command short; the demo's own networks are drawn, trained and judged in miniature.
FLAGS = {"train_sd.py": SHORT, "train_demo.py": SHORT.replace("64", "32"), "draw_world.py": " --count 4 --size 64",
         "evaluate.py": " --count 1 --variations 1 --size 64 --sampling_steps 2",
         "evaluate_demo.py": " --count 2 --variations 1 --steps 2 --ms_mode 1", "merge_ckpts_sd.py": "",
         "merge_ckpts_sdxl.py": "", "convert_checkpoint.py": "", "prepare_coco.py": "",
         "train_sdxl.py": SHORT + " --config small_xl_training.yaml",
         "image_variation_sdxl.py": SMALL + " --config small_xl.yaml",
         "controlnet_sdxl.py": SMALL + " --config small_xl.yaml",
         "benchmark.py": " --task unet_step --H 64 --W 64 --repeat 1 --ms_mode 1"}
# Of a stage of the demo models' training, which SHORT ends at step 2.
STAGE_FILE = r"(runs/demo_\w+/(?:ckpt/\w+-|weights/SDXL-base-1\.0-))\d+(?=[._])"
TIMED_FILE = r"runs/YYYY\.mm\.DD-HH:MM:SS/(weights/SDXL-base-1.0-)200000"  # of SDXL's training, likewise


@pytest.fixture(scope="module")
def workplace(standins, standins_xl, merged, tmp_path_factory):
    """A folder as the README asks for it, with small files under the public names."""
    folder = tmp_path_factory.mktemp("workplace")
    models = folder / "checkpoints" / "sd_models"
    shutil.copytree(standins["base"].parent, models)
    for name, source in PICTURES.items():
        path = folder / "assets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(DATA / source).convert("RGB").save(path)
    pokemon = folder / "datasets" / "pokemon_blip" / "train"
    pokemon.mkdir(parents=True)
    Image.open(DATA / "input.png").convert("RGB").save(pokemon / "img1.jpg")
    (pokemon / "img_txt.csv").write_text("dir,text\nimg1.jpg,a red circle\n")
    for name in ("val2017", "train2017"):
        shutil.copytree(pokemon, folder / "COCO2017" / name)
    (folder / "COCO2017" / "annotations").mkdir()
    (folder / "COCO2017" / "annotations" / "captions_train2017.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "img1.jpg"}], "annotations": [{"image_id": 1, "caption": "a red circle"}]}))
    write_clip_standin(folder / "checkpoints" / "clip-vit-large-patch14" / "model.safetensors")
    shutil.copy(standins["controlnet"], models / "control_v11p_sd15_canny.safetensors")
    shutil.copy(standins["ip_adapter"], models / "IP-Adapter" / "ip-adapter_sd15_light.safetensors")
    adapter = {name: value for name, value in arrays(merged).items() if "_ip." in name or "image_proj" in name}
    save_arrays(folder / "runs" / "ckpt" / "sd-2000.ckpt", adapter)
    xl = folder / "checkpoints" / "sdxl_models"
    shutil.copytree(standins_xl["base"].parent, xl)
    sizes = replace(SHALLOW_XL, image=SHALLOW.image, proj=ImageProjConfig(SHALLOW.image.embed_dim, 192))
    vit_h = write_standins(tmp_path_factory.mktemp("vit-h"), sizes, family=SDXL)["ip_adapter"]
    shutil.copy(vit_h, xl / "IP-Adapter" / "ip-adapter_sdxl_vit-h.safetensors")
    narrow_xl("inference/sd_xl_base.yaml", folder / "small_xl.yaml")
    narrow_xl("training/sd_xl_base_finetune_910b.yaml", folder / "small_xl_training.yaml")
    for script in [ROOT / "tools", *ROOT.glob("*_sd.py"), *ROOT.glob("*_sdxl.py")]:
        (folder / script.name).symlink_to(script)
    return folder


@pytest.mark.parametrize("command", COMMANDS + DOCUMENT)
def test_command(workplace, outcome, monkeypatch, command):
    """In the order of the page: each finds what those before it made.

    Python's run in this process: one of its own takes twice as long, to start MindSpore.
    """
    script = re.search(r"(\w+\.py)", command).group(1)
    small = "" if command.endswith("-h") else FLAGS.get(script, SMALL)
    timed = sorted((workplace / "runs").glob("????.??.??-??:??:??"))
    if "--version demo" in command:
        small = re.sub(r" --config \S+", "", small)
    command = re.sub(STAGE_FILE, r"\g<1>2", command)
    if timed:
        command = re.sub(TIMED_FILE, rf"runs/{timed[0].name}/\g<1>2", command)
    words = shlex.split(command + small)
    if words[0] == "python":
        monkeypatch.chdir(workplace)
        monkeypatch.setattr(sys, "argv", words[1:])
        # Not as "__main__": that would block signals in this process, and so in all that later tests start.
        status, said = outcome(lambda _: runpy.run_path(words[1])["main"]())
    else:
        result = shell(*words, cwd=workplace)
        status, said = result.returncode, result.stderr
    assert status == 0, said
    assert "Traceback" not in said


def test_outputs_are_where_the_page_says(workplace):
    assert (workplace / "checkpoints/sd_models/merged/sd_v1.5_ip_adapter.ckpt").exists()
    assert not list(workplace.rglob("*.sha256"))  # fingerprints are remembered in the user's cache
    assert (workplace / "assets/sd_demo.safetensors").exists()
    runs = sum("_sd.py --img" in command for command in COMMANDS + DOCUMENT)
    assert len(list((workplace / "outputs/demo/SD/samples").glob("*.png"))) == 4 * runs
    assert len(list((workplace / "outputs/demo/SD").glob("canny-*.png"))) == 2
    assert len(list((workplace / "outputs/demo/SDXL-base-1.0/samples").glob("*.png"))) == XL_PICTURES
    assert (workplace / "assets/sdxl_demo.safetensors").exists()
    for run in ("runs", "runs/scratch", "runs/two", "runs/demo", "runs/demo_adapter"):
        assert {path.name for path in (workplace / run / "ckpt").iterdir()} >= {"sd-2.ckpt", "sd-2.safetensors"}
    assert (workplace / "outputs/demo/SD/grid-00000.png").exists()
    for run in (workplace / "runs").glob("????.??.??-??:??:??"):
        assert (run / "weights" / "SDXL-base-1.0-2_ip_only.ckpt").exists()
    assert len(list((workplace / "runs").glob("????.??.??-??:??:??/weights/SDXL-base-1.0-2_full.ckpt"))) == 1
    assert (workplace / "COCO2017/train2017/img_txt.csv").read_text() == "dir,text\nimg1.jpg,a red circle\n"


def test_the_first_command_makes_pictures(tmp_path):
    first = BLOCKS[0].split("&&")[-1].strip().replace(".venv/bin/python image", f"python {ROOT}/image")
    result = shell(*shlex.split(first + SMALL), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "outputs/demo/SD/samples").glob("*.png"))) == 4


def test_ci_runs_the_test_command_of_the_page():
    ci = (ROOT / ".ci" / "run").read_text()
    for part in ("-m pip install -r requirements.txt -r tests/requirements.txt", "-m pytest -n 2 --dist loadfile"):
        assert part in BLOCKS[1] and part in ci
