"""image_variation_sd.py end to end: the same pictures as diffusers, repeatable, and clear about mistakes."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import ip_adapter.inference.run as run
from image_variation_sd import main
from ldm.checkpoints.file import save_arrays
from ldm.model import LatentDiffusion
from tests.support.arrays import DATA, arrays, pictures, psnr
from tests.support.scripts import ROOT, assert_mistakes, shell

SMALL = ["--H", "64", "--W", "64", "--sampling_steps", "2"]


def test_the_picture_of_diffusers(recorded, tmp_path, outcome):
    """Recorded by tests/record/record_sd.sh, at an odd latent size; rounding alone leaves more than 80 dB."""
    status, _ = outcome(main, "--ckpt_path", recorded, "--img", DATA / "input.png", "--latents",
                        DATA / "sd_latents.npy", "--H", "72", "--W", "104", "--sampling_steps", "7", "--prompt",
                        "a red circle", "--ip_scale", "0.8", "--output_path", tmp_path)
    assert status == 0
    made = pictures(tmp_path)
    assert len(made) == 2
    for n, picture in enumerate(made):
        assert psnr(picture, Image.open(DATA / f"sd_reference_image_variation_{n}.png")) > 70


def test_picture_n_depends_on_its_own_seed_only(merged, tmp_path, outcome):
    outcome(main, "--ckpt_path", merged, "--img", DATA / "input.png", *SMALL, "--n_samples", "3", "--seed", "5",
            "--output_path", tmp_path / "together")
    for seed in (5, 6, 7):
        outcome(main, "--ckpt_path", merged, "--img", DATA / "input.png", *SMALL, "--n_samples", "1", "--seed", seed,
                "--output_path", tmp_path / "single")
    together, single = pictures(tmp_path / "together"), pictures(tmp_path / "single")
    assert len(together) == len(single) == 3
    for a, b in zip(together, single):
        assert psnr(a, b) > 70
    assert psnr(together[0], together[1]) < 30


def test_settings_files_and_prompt_lists(merged, tmp_path, outcome):
    (tmp_path / "prompts.txt").write_text("ein Hund 犬 🐶\n\na red\u2028circle\n", encoding="utf-8")
    (tmp_path / "not.txt").write_text("\nblurred\n", encoding="utf-8")  # none for the first
    folder = tmp_path / "a folder with spaces"
    status, said = outcome(main, "--weight", merged, "--img", DATA / "input.png", *SMALL, "--num_cols", "1",
                           "--num_trials", "2", "--data_path", tmp_path / "prompts.txt",
                           "--negative_data_path", tmp_path / "not.txt", "--output_path", folder)
    assert status == 0 and f"4 images in {folder}" in said and "step/s" in said and "img/s" in said
    paths = sorted((folder / "samples").glob("*.png"))
    texts = [Image.open(path).text for path in paths]
    assert [text["prompt"] for text in texts] == ["ein Hund 犬 🐶"] * 2 + ["a red\u2028circle"] * 2
    assert [text["negative_prompt"] for text in texts] == ["", "", "blurred", "blurred"]
    assert [text["seed"] for text in texts] == ["42", "43", "44", "45"]
    assert texts[0]["sampling_steps"] == "2" and len(texts[0]["ckpt_path_sha256"]) == 64
    assert sorted(path.name for path in folder.glob("*.png")) == [f"grid-{n:05d}.png" for n in range(4)]
    assert Image.open(folder / "grid-00000.png").size == (128, 64)


def test_nothing_is_written_if_asked(merged, tmp_path, outcome):
    status, _ = outcome(main, "--ckpt_path", merged, "--img", DATA / "input.png", *SMALL, "--n_samples", "1",
                        "--skip_save", "--skip_grid", "--output_path", tmp_path / "out")
    assert status == 0 and not (tmp_path / "out").exists()


def test_scale_0_ignores_the_picture(merged, tmp_path, outcome, picture):
    for image in (DATA / "input.png", picture):
        outcome(main, "--ckpt_path", merged, "--img", image, *SMALL, "--n_samples", "1", "--ip_scale", "0",
                "--output_path", tmp_path / "zero")
    first, second = pictures(tmp_path / "zero")
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_float16_stays_close(merged, tmp_path, outcome):
    for dtype in ("float32", "float16"):
        status, said = outcome(main, "--ckpt_path", merged, "--img", DATA / "input.png", *SMALL, "--n_samples", "1",
                               "--dtype", dtype, "--output_path", tmp_path / "dtype")
        assert status == 0, said
    full, half = pictures(tmp_path / "dtype")
    assert psnr(full, half) > 35


@pytest.mark.slow
def test_demo_in_graph_mode(tmp_path, monkeypatch):
    """Compiled, from kept graphs, with kept graphs of another kind of run at hand, and operator by operator."""
    def made(folder, *flags):
        result = shell("python", ROOT / "image_variation_sd.py", "--version", "demo", *SMALL, "--n_samples", "1",
                       "--output_path", folder, *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return pictures(tmp_path / folder)

    def kept():
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*.mindir")}

    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    compiled, = made("compiled", "--ms_mode", "0")
    before = kept()
    assert len(before) > 3
    again, = made("again", "--ms_mode", "0")
    plain, = made("plain", "--ms_mode", "0", "--ip_scale", "0", "--seed", "7")
    assert before == kept()
    np.testing.assert_array_equal(again, compiled)
    assert psnr(compiled, made("pynative", "--ms_mode", "1")[0]) > 70
    assert psnr(plain, made("pynative_plain", "--ms_mode", "1", "--ip_scale", "0", "--seed", "7")[0]) > 70


@pytest.mark.slow
def test_graphs_are_compiled_where_that_saves_time(merged, tmp_path, outcome, monkeypatch):
    compiled, compile_ = [], LatentDiffusion.compile

    def counted(diffusion):
        compiled.append(True)
        if len(compiled) == 1:  # once will do
            compile_(diffusion)

    monkeypatch.setattr(LatentDiffusion, "compile", counted)
    monkeypatch.setattr(run, "use_graphs", lambda *_: None)
    few = 1 << 30  # positions to compile for, more than are made
    for positions, kept, flags in ((1, False, ()), (few, False, ()), (1, True, ("--ms_mode", "1")), (few, True, ()),
                                   (few, False, ("--graph_cache", "graphs"))):
        monkeypatch.setattr(run, "COMPILED_POSITIONS", positions)
        monkeypatch.setattr(run, "run_graphs", lambda *_, kept=kept: SimpleNamespace(kept=kept))
        status, said = outcome(main, "--ckpt_path", merged, "--img", DATA / "input.png", *SMALL, "--n_samples", "1",
                               *flags, "--output_path", tmp_path / "made")
        assert status == 0, said
    assert len(compiled) == 3
    graph, *others = pictures(tmp_path / "made")
    assert all(psnr(graph, other) > 70 for other in others)


def test_help_is_complete():
    result = shell("python", ROOT / "image_variation_sd.py", "-h", cwd=ROOT)
    assert result.returncode == 0
    for flag in ("--img", "--prompt", "--guidance_scale", "--sample_step", "--num_cols", "--ncols", "--latents",
                 "--weight", "default: 7.5", "default: 50", "best quality, high quality"):
        assert flag in " ".join(result.stdout.split())


def mistakes(folder, merged, standins) -> dict:
    """Flags, and what the one line says."""
    def file(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    np.save(folder / "wrong.npy", np.zeros((1, 4, 9, 9), np.float32))
    np.save(folder / "two.npy", np.zeros((2, 4, 8, 8), np.float32))
    np.save(folder / "nan.npy", np.full((1, 4, 8, 8), np.nan, np.float32))
    np.save(folder / "huge.npy", np.full((1, 4, 8, 8), 1e30, np.float32))
    tensors = arrays(merged)
    some = {name: value for name, value in tensors.items() if "first_stage_model.encoder" not in name}
    save_arrays(folder / "part.ckpt", some)
    broken = dict(tensors)
    broken["model.diffusion_model.out.2.conv.bias"] = np.array([1, np.inf, 0, 0], np.float32)
    save_arrays(folder / "inf.ckpt", broken)
    save_arrays(folder / "xl.ckpt", {"conditioner.embedders.0.weight": np.zeros(3, np.float32)})
    return {
        "--img": (["--img", folder / "absent.png"], "absent.png: no such file"),
        "empty picture": (["--img", file("empty.png", b"")], "--img .*is empty"),
        "not a picture": (["--img", file("text.png", b"text")], "--img .*is not an image"),
        "folder": (["--img", folder], "is a folder"),
        "--ckpt_path": (["--ckpt_path", folder / "absent.ckpt"], "absent.ckpt: no such file"),
        "--ip_adapter": (["--ip_adapter", folder / "absent.bin"], "absent.bin: no such file"),
        "no adapter": (["--ip_adapter", standins["vae"]], "--ip_adapter .*holds no adapter"),
        "--vae": (["--vae", standins["ip_adapter"]], "--vae .*holds no autoencoder"),
        "--controlnet": (["--controlnet", standins["controlnet"]], "--controlnet is given 1 times, --control_image 0"),
        "truncated": (["--ckpt_path", file("cut.ckpt", merged.read_bytes()[:100000])], "cut.ckpt"),
        "incomplete": (["--ckpt_path", folder / "part.ckpt"], "part.ckpt: holds no autoencoder"),
        "infinite": (["--ckpt_path", folder / "inf.ckpt"], "out.2.conv.bias holds NaN or infinite"),
        "SDXL": (["--ckpt_path", folder / "xl.ckpt"], "is an SDXL checkpoint.*image_variation_sdxl"),
        "torch": (["--ckpt_path", standins["base"]], "original torch checkpoint.*merge_ckpts_sd"),
        "steps": (["--sampling_steps", "0"], "--sampling_steps.*0 is out of range, expected 1 to 1000"),
        "steps not a number": (["--sampling_steps", "many"], "'many' is not a whole number"),
        "scale": (["--scale", "nan"], "nan is out of range"),
        "ip_scale": (["--ip_scale", "-1"], "-1 is out of range, expected 0 to 10"),
        "size": (["--H", "100"], "100 is not a multiple of 8; the nearest are 96 and 104"),
        "size 0": (["--W", "0"], "0 is out of range"),
        "count": (["--n_samples", "0"], "0 is out of range"),
        "seed": (["--seed", "-1"], "-1 is out of range"),
        "unknown flag": (["--ip_scal", "1"], "unknown flag --ip_scal; did you mean --ip_scale"),
        "device": (["--device_target", "Ascend"], "--device_target Ascend: MindSpore finds no such device"),
        "config": (["--config", folder / "absent.yaml"], "--config .*absent.yaml: no such file"),
        "config key": (["--config", file("key.yaml", b"sampling: {stps: 3}")], "key.yaml: .*stps"),
        "prompts": (["--data_path", file("blank.txt", b"\n\n")], "holds no prompt"),
        "prompts not text": (["--data_path", file("bytes.txt", b"\xff\xfe\x00\xd8")], "not UTF-8"),
        "negatives": (["--negative_data_path", file("three.txt", b"a\nb\nc")], "has 3 lines, expected 1"),
        "latents shape": (["--latents", folder / "wrong.npy"], "--latents .*expected float32 .n, 4, 8, 8."),
        "latents count": (["--latents", folder / "two.npy", "--n_samples", "3"], "holds 2 starting points, expected 3"),
        "latents nan": (["--latents", folder / "nan.npy"], "values up to nan; expected noise of unit variance"),
        "latents huge": (["--latents", folder / "huge.npy"], "values up to 1e\\+30; expected noise"),
        "latents not npy": (["--latents", file("bad.npy", b"no")], "is not a .npy file"),
        "output": (["--output_path", file("taken", b"")], "--output_path.*taken: is not a folder"),
    }


def test_every_mistake_is_one_line_and_leaves_nothing(merged, standins, tmp_path, outcome):
    folder = tmp_path / "files"
    folder.mkdir()
    words = ["--ckpt_path", merged, "--img", DATA / "input.png", *SMALL]
    assert_mistakes(outcome, main, words, mistakes(folder, merged, standins), folder)


def test_an_image_that_is_not_finite_is_no_image(merged, tmp_path, outcome, monkeypatch):
    """As float16 weights that overflow make it; a flat image with status 0 helps nobody."""
    monkeypatch.setattr("ldm.sampling.ddim.sample_ddim", lambda denoise, x, *_: iter([x * float("nan")]))
    status, said = outcome(main, "--ckpt_path", merged, "--img", DATA / "input.png", *SMALL, "--output_path",
                           tmp_path / "out")
    assert status == 2 and "NaN or infinite values instead of an image" in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_interruption_is_clean(merged, tmp_path, outcome, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("ldm.sampling.ddim.sample_ddim", interrupted)
    status, said = outcome(main, "--ckpt_path", merged, "--img", DATA / "input.png", *SMALL, "--output_path", tmp_path)
    assert status == 130 and "interrupted" in said and "Traceback" not in said
