"""train_sd.py end to end: it learns, goes on exactly after any stop, and what it writes is used everywhere."""
from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import image_variation_sd
from ip_adapter.cli.parser import config_from
from ip_adapter.cli.training import TRAINING, training_parser
from ip_adapter.config import TrainingConfig
from ip_adapter.families import SD15
from ip_adapter.weights.merging import merge
from tests.support.arrays import arrays, assert_equal, pictures, psnr
from tests.support.scripts import ROOT, assert_adapter_is_used, assert_mistakes, log_of
from tests.support.training import parameters
from train_sd import main


@pytest.fixture
def words(world, merged):
    return ["--data_path", world, "--pretrained_model_path", merged, "--version", "demo", "--image_size", "64",
            "--train_batch_size", "2", "--ms_mode", "1", "--max_steps", "4", "--ckpt_save_interval", "2"]


def test_going_on_is_exact(words, tmp_path, outcome):
    """Stopped after 2 of 4 steps and resumed: parameters, optimizer and log equal those of one run, bit for bit."""
    status, said = outcome(main, *words, "--output_path", tmp_path / "one", "--ema_decay", "0.9")
    assert status == 0 and "7.png: no such file" in said, said
    two = [*words, "--output_path", tmp_path / "two", "--ema_decay", "0.9"]
    assert outcome(main, *two, "--max_steps", "2")[0] == 0
    status, said = outcome(main, *two, "--resume", "True")
    assert status == 0 and "going on after step 2 of 4" in said
    assert_equal(parameters(tmp_path / "one"), parameters(tmp_path / "two"))
    assert [row["loss"] for row in log_of(tmp_path / "one")] == [row["loss"] for row in log_of(tmp_path / "two")]
    assert [int(row["step"]) for row in log_of(tmp_path / "two")] == [1, 2, 3, 4]
    assert Image.open(tmp_path / "two" / "loss.png").size == (640, 320)
    status, said = outcome(main, *two, "--resume", "True")
    assert status == 0 and "4 steps in" in said


def test_accumulated_batches_see_the_same_samples(words, tmp_path, outcome):
    """2 x 2 instead of 4: the losses of each step agree, and so do the parameters, but for rounding."""
    for name, sizes in (("whole", ["4", "1"]), ("split", ["2", "2"])):
        status, said = outcome(main, *words, "--max_steps", "2", "--output_path", tmp_path / name,
                               "--train_batch_size", sizes[0], "--gradient_accumulation_steps", sizes[1])
        assert status == 0, said
    whole, split = (log_of(tmp_path / name) for name in ("whole", "split"))
    for a, b in zip(whole, split):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)


def test_cached_features_give_the_same_training(words, world, merged, tmp_path, outcome):
    """But for the rounding of encoders that see other batches; a second run, and one after a kill, compute less."""
    cached = [*words, "--cache_dir", tmp_path / "cache"]
    for name, flags in (("plain", words), ("first", cached), ("second", cached)):
        status, said = outcome(main, *flags, "--output_path", tmp_path / name)
        assert status == 0, said
    plain, first, second = (parameters(tmp_path / name) for name in ("plain", "first", "second"))
    assert_equal(first, second)
    for row, other in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "first")):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-3)
    data, = (tmp_path / "cache").glob("*.f16")
    whole = data.read_bytes()
    size, rest = divmod(len(whole), 9)  # of ten rows one has no picture
    assert rest == 0
    data.write_bytes(whole[: size * 5 + 11])  # killed while writing
    assert outcome(main, *cached, "--output_path", tmp_path / "third")[0] == 0
    assert len(data.read_bytes()) == len(whole) and data.read_bytes()[: size * 5] == whole[: size * 5]
    third = parameters(tmp_path / "third")
    for name in third.keys() - {"run.checksum"}:
        np.testing.assert_allclose(third[name], first[name], atol=2e-3, err_msg=name)
    other = [*cached, "--image_size", "32"]
    assert outcome(main, *other, "--output_path", tmp_path / "small")[0] == 0
    assert len(list((tmp_path / "cache").glob("*.f16"))) == 2


def test_only_the_adapter_trains_and_its_files_are_used(words, merged, standins, tmp_path, outcome):
    status, said = outcome(main, *words, "--max_steps", "2", "--output_path", tmp_path)
    assert status == 0, said
    folder = tmp_path / "ckpt"
    before, after = arrays(merged), arrays(folder / "sd-2.ckpt")
    assert len(after) == 16 and after.keys() < before.keys()
    assert all(not np.array_equal(before[name], value) for name, value in after.items() if "_ip." in name)
    public = arrays(folder / "sd-2.safetensors")
    assert public.keys() == arrays(standins["ip_adapter"]).keys()
    merge(SD15, **{**standins, "controlnet": None, "ip_adapter": folder / "sd-2.ckpt"}, out=tmp_path / "full.ckpt")
    assert_adapter_is_used(outcome, image_variation_sd.main, [], (tmp_path / "full.ckpt", merged),
                           folder / "sd-2.ckpt", tmp_path)


def test_from_scratch(words, standins, tmp_path, outcome):
    """A checkpoint merged with --skip_ip has no projector; training starts one and counts from the text's weights."""
    bare = tmp_path / "bare.ckpt"
    merge(SD15, **{**standins, "ip_adapter": None, "controlnet": None}, out=bare, skip_ip=True)
    status, said = outcome(main, *words, "--pretrained_model_path", bare, "--max_steps", "1", "--output_path", tmp_path,
                           "--start_learning_rate", "0", "--ema_decay", "0")
    assert status == 0, said
    start, base = arrays(tmp_path / "ckpt" / "sd-1.ckpt"), arrays(bare)
    weight = start["embedder.image_proj.proj.weight"]
    assert weight.std() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    block = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2."
    np.testing.assert_array_equal(start[block + "to_v_ip.weight"], base[block + "to_v.weight"])


def test_the_last_checkpoints_are_kept(words, tmp_path, outcome):
    """Only this run's own files go, also after a resume."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for name in ("sd-2000.ckpt", "sd-2000_full.ckpt"):
        (folder / name).write_bytes(b"of somebody else")
    words += ["--ckpt_save_interval", "1", "--ckpt_max_keep", "2", "--output_path", tmp_path]
    assert outcome(main, *words, "--max_steps", "3")[0] == 0
    assert outcome(main, *words, "--resume", "True")[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "sd-2000.ckpt", "sd-2000_full.ckpt", "sd-3.ckpt", "sd-3.safetensors", "sd-4.ckpt", "sd-4.safetensors",
        "train_resume.ckpt"]
    other = tmp_path / "other" / "ckpt"  # of another run, with files of the same names
    other.mkdir(parents=True)
    foreign = [other / "sd-3.ckpt", other / "sd-4.ckpt"]
    for path in foreign:
        path.write_bytes(b"of somebody else")
    words += ["--resume", folder / "train_resume.ckpt", "--output_path", tmp_path / "other", "--ckpt_max_keep", "1"]
    assert outcome(main, *words, "--max_steps", "5")[0] == 0
    assert sorted(path.name for path in other.iterdir()) == [
        "sd-3.ckpt", "sd-4.ckpt", "sd-5.ckpt", "sd-5.safetensors", "train_resume.ckpt"]
    assert all(path.read_bytes() == b"of somebody else" for path in foreign)


def test_float16_keeps_float32_weights_and_scales_the_loss(words, tmp_path, outcome):
    status, said = outcome(main, *words, "--dtype", "float16", "--max_steps", "1", "--output_path", tmp_path)
    assert status == 0, said
    state = parameters(tmp_path)
    assert {value.dtype for name, value in state.items() if name.startswith("parameter.")} == {np.dtype(np.float32)}
    assert float(log_of(tmp_path)[0]["loss_scale"]) in (65536.0, 32768.0)


def test_validation_pictures_are_those_of_the_weights(words, tmp_path, outcome):
    """At their steps, the same with features kept, and as image_variation_sd.py makes them from the adapter saved,
    which holds averages. The training is the same as without them, bit for bit."""
    words += ["--ema_decay", "0.9", "--start_learning_rate", "0.01"]
    assert outcome(main, *words, "--output_path", tmp_path / "blind")[0] == 0
    words += ["--validation_interval", "2", "--validation_count", "2", "--validation_steps", "3"]
    for name, flags in (("plain", []), ("cached", ["--cache_dir", tmp_path / "cache"])):
        status, said = outcome(main, *words, *flags, "--output_path", tmp_path / name)
        assert status == 0, said
        assert "making the validation images of step 2" in said and "loading the model" in said
    assert_equal(parameters(tmp_path / "blind"), parameters(tmp_path / "plain"))
    names = ["step-2-00000.png", "step-4-00000.png"]
    assert sorted(path.name for path in (tmp_path / "plain" / "validation").iterdir()) == names
    sheets = [np.asarray(Image.open(tmp_path / "plain" / "validation" / name)) for name in names]
    assert sheets[0].shape == (2 * 64, 3 * 64, 3) and not np.array_equal(sheets[0], sheets[1])
    np.testing.assert_array_equal(sheets[0][:, :64], sheets[1][:, :64])  # the pictures themselves
    cached = np.asarray(Image.open(tmp_path / "cached" / "validation" / names[0]))
    assert psnr(sheets[0], cached) > 40
    picture = words[1] / "0.png"
    status, said = outcome(
        image_variation_sd.main, "--version", "demo", "--img", picture, "--ckpt_path", words[3], "--ip_adapter",
        tmp_path / "plain" / "ckpt" / "sd-4.ckpt", "--prompt", "", "--negative_prompt", "", "--H", "64", "--W", "64",
        "--sampling_steps", "3", "--n_samples", "1", "--output_path", tmp_path / "made")
    assert status == 0, said
    np.testing.assert_allclose(pictures(tmp_path / "made")[0], sheets[1][:64, 64:128], atol=1)


def test_a_validation_shows_any_image_prompt_and_leaves_out_images_too_narrow(words, tmp_path, outcome):
    data = tmp_path / "data"
    data.mkdir()
    for name, size, grey in (("a.png", (64, 64), 90), ("thin.png", (1, 5000), 150), ("wide.png", (65000, 1), 200)):
        Image.new("RGB", size, (grey,) * 3).save(data / name)
    (data / "img_txt.csv").write_text("dir,text,image_prompt\nwide.png,x,\na.png,y,thin.png\n")
    status, said = outcome(main, *words, "--max_steps", "1", "--validation_interval", "1", "--validation_data", data,
                           "--validation_count", "1", "--validation_steps", "2", "--output_path", tmp_path / "out")
    assert status == 0 and "wide.png: 65000 x 1 pixels are too narrow" in said, said
    sheet = np.asarray(Image.open(tmp_path / "out" / "validation" / "step-1-00000.png"))
    assert sheet.shape == (64, 3 * 64, 3) and (sheet[:, :64] == 150).all()


@pytest.mark.slow
def test_it_learns_in_graph_mode(words, tmp_path, outcome):
    """Twenty steps on two pictures, the whole step compiled."""
    status, said = outcome(main, *words, "--ms_mode", "0", "--max_steps", "20", "--output_path", tmp_path,
                           "--start_learning_rate", "0.003", "--p2_k", "0")
    assert status == 0, said
    losses = [float(row["loss"]) for row in log_of(tmp_path)]
    assert np.mean(losses[-8:]) < np.mean(losses[:4])


def test_killed_at_any_file_of_a_save_it_goes_on(words, tmp_path, outcome, monkeypatch):
    """Before the state is there, nothing is in the way of a new start; after it, --resume writes what is missing."""
    words += ["--ckpt_save_interval", "1", "--ckpt_max_keep", "1", "--max_steps", "2"]
    assert outcome(main, *words, "--output_path", tmp_path / "calm")[0] == 0
    rename, names = os.replace, sorted(path.name for path in (tmp_path / "calm" / "ckpt").iterdir())
    assert names == ["sd-2.ckpt", "sd-2.safetensors", "train_resume.ckpt"]
    for last in range(2 * len(names)):
        folder, written = tmp_path / f"{last}", []

        def killed_after(source, target):
            if "ckpt" in Path(target).parts:
                if len(written) == last:
                    raise SystemExit(137)
                written.append(target)
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed_after)
            assert outcome(main, *words, "--output_path", folder)[0] == 137
        resume = ["--resume", "True"] if (folder / "ckpt" / "train_resume.ckpt").exists() else []
        status, said = outcome(main, *words, "--output_path", folder, *resume)
        assert status == 0, said
        assert sorted(path.name for path in (folder / "ckpt").iterdir()) == names
        for name in names:
            assert_equal(*(arrays(path / "ckpt" / name) for path in (tmp_path / "calm", folder)))


@pytest.mark.slow
def test_killed_ten_times_it_ends_as_if_nothing_had_happened(words, tmp_path, outcome):
    steps = ["--max_steps", "12", "--ckpt_save_interval", "1"]
    outcome(main, *words, *steps, "--output_path", tmp_path / "calm")
    command = [sys.executable, ROOT / "train_sd.py", *words, *steps, "--output_path", tmp_path / "killed"]
    rng, state, kills = random.Random(5), tmp_path / "killed" / "ckpt" / "train_resume.ckpt", 0
    for _ in range(10):
        resume = ["--resume", "True"] if state.exists() else []
        process = subprocess.Popen([str(word) for word in command + resume], stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(1.0, 9.0))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    result = subprocess.run([str(word) for word in command + (["--resume", "True"] if state.exists() else [])],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert kills > 0
    assert_equal(parameters(tmp_path / "calm"), parameters(tmp_path / "killed"))


@pytest.mark.slow
@pytest.mark.parametrize("number, status, word", [(signal.SIGINT, 130, "interrupted"),
                                                  (signal.SIGTERM, 143, "terminated")])
def test_ctrl_c_saves_and_says_so(words, tmp_path, number, status, word):
    words = [str(word) for word in [sys.executable, ROOT / "train_sd.py", *words, "--max_steps", "1000",
                                    "--ckpt_save_interval", "1000", "--output_path", tmp_path]]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not (tmp_path / "log.csv").exists():
        time.sleep(0.2)
    while time.time() < deadline and len(log_of(tmp_path)) < 2:
        time.sleep(0.2)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status and word in said and "Traceback" not in said, said
    assert "go on by --resume True" in said
    step = int(parameters(tmp_path)["run.step"])
    assert step >= 2 and len(log_of(tmp_path)) == step


def test_every_setting_is_a_flag():
    version, config = config_from([], TRAINING[SD15.name], TrainingConfig)
    args = training_parser("", version, config, TRAINING[SD15.name]).parse_args(
        ["--data_path", "x", "--per_batch_size", "3", "--random_crop", "True", "--start_learning_rate", "1e-5"])
    assert (args.train_batch_size, args.random_crop, args.start_learning_rate) == (3, True, 1e-5)
    assert set(vars(config)) - {"name", "model"} <= set(vars(args))
    assert (args.max_steps, args.output_path) == (2000, "runs")


def test_every_mistake_is_one_line_and_leaves_nothing(words, merged, standins, tmp_path, outcome):
    folder = tmp_path / "files"
    (folder / "run" / "ckpt").mkdir(parents=True)
    (folder / "run" / "ckpt" / "train_resume.ckpt").write_bytes(b"")
    (folder / "empty").mkdir()
    (folder / "files" / "ckpt").mkdir(parents=True)
    (folder / "files" / "ckpt" / "sd-4.safetensors").write_bytes(b"")
    (folder / "bad.yaml").write_text("start_learning_rate: fast\n")
    (folder / "value.yaml").write_text("beta1: 1.5\n")
    (folder / "key.yaml").write_text("learning_rate: 1\n")
    assert_mistakes(outcome, main, words, {
        "--data_path": (["--data_path", folder / "absent"], "--data_path .*absent"),
        "no csv": (["--data_path", folder / "empty"], "--data_path .*empty"),
        "--pretrained_model_path": (["--pretrained_model_path", folder / "a.ckpt"], "--pretrained_model_path: no file"),
        "another model": (["--pretrained_model_path", standins["base"]], "original torch checkpoint"),
        "size": (["--image_size", "100"], "--image_size: 100 is not a multiple of 8; the nearest are 96 and 104"),
        "batch": (["--train_batch_size", "0"], "0 is out of range"),
        "rate": (["--start_learning_rate", "nan"], "nan is out of range"),
        "probabilities": (["--drop_text_prob", "0.95"], "add up to more than 1"),
        "scheduler": (["--scheduler", "linear"], "--scheduler: 'linear' is not known, expected constant or cosine"),
        "crop": (["--random_crop", "True", "--cache_dir", folder / "c"], "--random_crop True is of no effect: it"),
        "flag": (["--start_learning", "1"], "unknown flag --start_learning; did you mean --start_learning_rate"),
        "config type": (["--config", folder / "bad.yaml"], "key start_learning_rate"),
        "config key": (["--config", folder / "key.yaml"], "learning_rate"),
        "config value": (["--config", folder / "value.yaml"], r"value\.yaml: beta1 is 1\.5, expected 0 to 0\.9999999"),
        "taken": (["--output_path", folder / "run"], "holds a training already; go on with it by --resume True"),
        "taken by files": (["--output_path", folder / "files"], "holds a training already"),
        "no state": (["--resume", folder / "a.ckpt"], "--resume .*a.ckpt: no such file"),
        "another state": (["--resume", merged], "--resume .*holds no .*expected train_resume.ckpt"),
        "nothing to resume": (["--resume", "True"], "--resume .*train_resume.ckpt: no such file"),
    }, folder)


def test_a_state_of_other_settings_is_refused(words, tmp_path, outcome):
    words += ["--ema_decay", "0"]
    outcome(main, *words, "--max_steps", "1", "--output_path", tmp_path)
    for flags, expected in ((["--seed", "7"], "was trained with --seed 42 .now 7."),
                            (["--ema_decay", "0.9"], "does not fit what is trained now")):
        status, said = outcome(main, *words, *flags, "--output_path", tmp_path, "--resume", "True")
        assert status == 2 and re.search(expected, said), said
