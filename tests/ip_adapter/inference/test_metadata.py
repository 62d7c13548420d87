"""What images are stored with, and `--from_png`, which makes them again."""
from __future__ import annotations

import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

import image_inpainting_sd
import image_variation_sd
import image_variation_sdxl
from ip_adapter.inference.metadata import with_png
from tests.support.arrays import DATA, pictures
from tests.support.scripts import overridden

PROMPT = "--a \"hat\",\nof 'felt'; 帽子"


@pytest.fixture
def made(merged, tmp_path, outcome, monkeypatch):
    """An image made of a relative and an absolute path, third of its run, and the texts in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "input.png", "in put.png")
    status, said = outcome(image_variation_sd.main, "--weight", merged, "--img", "in put.png", "--height", "64",
                           "--W", "72", "--steps", "2", f"--prompt={PROMPT}", "--negative_prompt", "", "--seed", "5",
                           "--n_samples", "3", "--cfg_scale", "3", "--output_path", "made")
    assert status == 0, said
    return tmp_path / "made" / "samples" / "00002.png"


def test_every_setting_has_the_name_of_its_flag(made, merged):
    with Image.open(made) as image:
        text = image.text
    assert {name: text[name] for name in ("script", "prompt", "negative_prompt", "seed", "sampling_steps", "scale", "H",
                                          "W", "sampler", "img", "ckpt_path")} == {
        "script": "image_variation_sd.py", "prompt": PROMPT, "negative_prompt": "", "seed": "7",
        "sampling_steps": "2", "scale": "3.0", "H": "64", "W": "72", "sampler": "DDIM", "img": "in put.png",
        "ckpt_path": merged.name}
    assert len(text["ckpt_path_sha256"]) == len(text["img_sha256"]) == 64
    assert not any(str(folder) in value for value in text.values() for folder in (merged.parent, made.parent))


def test_parameters_are_those_of_a1111(made):
    with Image.open(made) as image:
        prompt, negative, settings = image.text["parameters"].rsplit("\n", 2)
        digest = image.text["ckpt_path_sha256"][:10]
    assert (prompt, negative) == (PROMPT, "Negative prompt: ")
    assert settings == (f"Steps: 2, Sampler: DDIM, CFG scale: 3.0, Seed: 7, Size: 72x64, Model hash: {digest}, "
                        "Model: SD-1.5")


def test_the_command_makes_the_image_again(made, merged, outcome):
    """The checkpoint lies elsewhere, so only its name is in the command."""
    with Image.open(made) as image:
        python, script, *words = shlex.split(image.text["command"])
    assert (python, script) == ("python", "image_variation_sd.py")
    words = overridden(words, ["--ckpt_path", merged])
    status, said = outcome(image_variation_sd.main, *words, "--output_path", "again")
    assert status == 0, said
    again, = pictures("again")
    np.testing.assert_array_equal(again, np.asarray(Image.open(made)))


def test_from_png_takes_what_is_not_given(made, merged, outcome):
    for flags, folder in (([], "again"), (["--prompt", "a cap"], "other")):
        status, said = outcome(image_variation_sd.main, "--from-png", made, "--model", merged, *flags,
                               "--output_path", folder)
        assert status == 0, said
    (again,), (other,) = pictures("again"), pictures("other")
    np.testing.assert_array_equal(again, np.asarray(Image.open(made)))
    assert again.shape == other.shape and not np.array_equal(again, other)
    with Image.open("other/samples/00000.png") as image:
        assert image.text["prompt"] == "a cap" and image.text["seed"] == "7"


def test_from_png_of_another_script(made, outcome):
    for main in (image_variation_sdxl.main, image_inpainting_sd.main):
        status, said = outcome(main, "--from_png", made)
        assert status == 2 and "was made by image_variation_sd.py; run that script" in said


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_a_file_without_a_command(content, tmp_path, outcome):
    path = tmp_path / "a.png"
    path.write_bytes(content) if content is not None else Image.new("RGB", (8, 8)).save(path)
    status, said = outcome(image_variation_sd.main, "--from_png", path)
    assert status == 2 and len(said.splitlines()) == 1 and "holds no command that made it" in said


def test_given_flags_count_instead_of_those_of_the_image(tmp_path):
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_itxt("command", "python a.py --canny 1 2 --canny 3 4 --prompt=--x --H 8 --flag")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    given = ["--from_png", str(tmp_path / "a.png"), "--canny=5", "6", "--prompt", "y"]
    assert with_png(given, "a.py") == ["--H", "8", "--flag", *given]
    assert with_png(given[2:], "a.py") == given[2:]
