"""Every command of the README, and those of the user's document that exist so far, run on small stand-in files."""
from __future__ import annotations

import re
import shlex
import shutil

import pytest

from ldm.checkpoint_file import save_arrays
from tests.conftest import DATA, ROOT, arrays, shell

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```shell\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines() if line.startswith("python ")]
DOCUMENT = [
    "python tools/merge_ckpts_sd.py --ip_adpater runs/ckpt/sd-2000.ckpt --out runs/ckpt/sd-2000_full.ckpt",
    "python tools/merge_ckpts_sd.py -h",
    "python image_variation_sd.py --img assets/woman.png --ckpt_path runs/ckpt/sd-2000_full.ckpt --n_samples 4",
]
SMALL = " --H 64 --W 64 --sampling_steps 2"  # what is printed makes 512x512 in 50 steps


@pytest.fixture(scope="module")
def workplace(standins, merged, tmp_path_factory):
    """A folder as the README asks for it, with small files under the public names."""
    folder = tmp_path_factory.mktemp("workplace")
    models = folder / "checkpoints" / "sd_models"
    shutil.copytree(standins["sd"].parent, models)
    (folder / "assets").mkdir()
    shutil.copy(DATA / "input.png", folder / "assets" / "woman.png")
    adapter = {name: value for name, value in arrays(merged).items() if "_ip." in name or "image_proj" in name}
    save_arrays(folder / "runs" / "ckpt" / "sd-2000.ckpt", adapter)
    for name in ("tools", "image_variation_sd.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("command", COMMANDS + DOCUMENT)
def test_command(workplace, command):
    """In the order of the page: each finds what those before it made."""
    small = SMALL if "image_variation" in command else ""
    result = shell(*shlex.split(command + small), cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


def test_outputs_are_where_the_page_says(workplace):
    assert (workplace / "checkpoints/sd_models/merged/sd_v1.5_ip_adapter.ckpt.sha256").exists()
    assert len(list((workplace / "outputs/demo/SD/samples").glob("*.png"))) == 16
    assert (workplace / "outputs/demo/SD/grid-00000.png").exists()


def test_the_first_command_makes_pictures(tmp_path):
    first = BLOCKS[0].split("&&")[-1].strip().replace(".venv/bin/python image", f"python {ROOT}/image")
    result = shell(*shlex.split(first + SMALL), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "outputs/demo/SD/samples").glob("*.png"))) == 4


def test_ci_runs_the_test_command_of_the_page():
    ci = (ROOT / ".ci" / "run").read_text()
    for part in ("-m pip install -r requirements.txt -r tests/requirements.txt", "-m pytest"):
        assert part in BLOCKS[1] and part in ci
