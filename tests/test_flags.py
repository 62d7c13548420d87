"""Every flag of every script and tool, from the parsers themselves, with values that it must refuse in one line."""
from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ip_adapter.cli import parser as cli
from tests.support.arrays import DATA
from tests.support.scripts import ROOT

# Words without which a parser is not made or asks for something else first.
SCRIPTS = {**{f"{name}.py": [] for name in ("image_variation_sd", "image_variation_sdxl", "image_to_image_sd",
                                            "image_inpainting_sd", "controlnet_sd", "controlnet_sdxl", "train_sd",
                                            "train_sdxl")},
           **{f"tools/{path.name}": [] for path in (ROOT / "tools").glob("*.py")}}
LONG = "x" * 300 + ".png"


class Captured(BaseException):
    """Carries the parser out of a script."""


def parser_of(script: str, monkeypatch) -> tuple:
    """The `main` of a script and the parser it makes."""
    main = runpy.run_path(str(ROOT / script))["main"]

    def capture(self, *_):
        raise Captured(self)

    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse_args", capture)
        with pytest.raises(Captured) as caught:
            main([])
    return main, caught.value.args[0]


def bad_values(action: argparse.Action, folder: Path) -> list:
    """What a flag of this type must refuse."""
    if action.choices:
        return ["none of them", ""]
    if action.type in (cli.existing_file, cli.checkpoint_file):
        return [folder / "absent", folder, folder / "pipe", "/dev/null", "", folder / LONG, folder / "file" / "below",
                os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")]
    if action.type in (cli.output_file, cli.output_checkpoint):
        kind = [folder / "weights.bin"] if action.type is cli.output_checkpoint else []
        return [folder, folder / "pipe", folder / LONG, folder / "file" / "below", folder / "file" / "be" / "low",
                "/dev/null", "/proc/no/file", "", *kind]
    if action.type is cli.output_folder:
        return [folder / "file", folder / "file" / "below", folder / LONG, "/dev/null", "/proc/no/folder", ""]
    if action.type is cli.boolean:
        return ["maybe", "1", ""]
    if getattr(action.type, "__qualname__", "").startswith("in_range."):
        return ["x", "nan", "-1e30", "1e30", "inf", "", "0x10"]
    return ["-8", "x", "0", "12"] if action.type is cli.multiple_of_8 else []


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_value_that_cannot_be_is_one_line(script, folder, outcome, monkeypatch):
    main, parser = parser_of(script, monkeypatch)
    required = {action.dest: DATA / "input.png" for action in parser._actions if action.required}
    before, failed, cases, begun = sorted(folder.iterdir()), [], 0, time.time()
    for action in parser._actions:
        for value in bad_values(action, folder):
            words = [word for dest, good in required.items() if dest != action.dest for word in (f"--{dest}", good)]
            words += [f"{action.option_strings[0]}={value}"] if action.nargs != 2 else [
                action.option_strings[0], value or "x", value or "x"]
            status, said = outcome(main, *words)
            if status != 2 or len(said.strip().splitlines()) != 1 or "Traceback" in said:
                failed.append(f"{action.option_strings[0]}={value}: status {status}, said {said!r}")
            cases += 1
    assert not failed, "\n".join(failed)
    assert sorted(folder.iterdir()) == before
    assert cases == 0 or (time.time() - begun) / cases < 1, "flags are checked before anything large is imported"


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_unknown_flags_and_arguments(script, outcome, monkeypatch):
    main, _ = parser_of(script, monkeypatch)
    for word in ("--no_such_flag", "stray"):
        status, said = outcome(main, word)
        assert status == 2 and len(said.strip().splitlines()) == 1, said


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help_imports_nothing_heavy(script):
    """What takes long is MindSpore; also NumPy takes longer than all that the flags need."""
    program = (f"import sys, runpy; sys.argv = [{script!r}, '-h']\n"
               f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
               "except SystemExit as end: assert not end.code, end.code\n"
               "print([name for name in ('mindspore', 'pandas', 'torch', 'scipy') if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]" and "None" not in result.stdout


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_deleted_folder_is_one_line(script, tmp_path):
    (tmp_path / "gone").mkdir()
    program = "import os, sys; os.rmdir('../gone'); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    result = subprocess.run([sys.executable, "-c", program, ROOT / script], capture_output=True, text=True,
                            cwd=tmp_path / "gone")
    assert result.returncode == 2 and result.stderr.splitlines() == [
        f"{Path(script).name}: error: the current folder cannot be used (No such file or directory): it was deleted or "
        "moved; change into another one and start again"]


@pytest.mark.parametrize("typed, meant", [
    ("--steps", "--sampling_steps"), ("--num_inference_steps", "--sampling_steps"), ("--height", "--H"),
    ("--width", "--W"), ("--cfg_scale", "--scale"), ("--guidance-scale", "--guidance_scale"),
    ("--ip_adapter_scale", "--ip_scale"), ("--batch_size", "--n_samples"), ("--num-images-per-prompt", "--n_samples"),
    ("--outdir", "--output_path"), ("--output-dir", "--output_path"), ("--model", "--ckpt_path"),
    ("--checkpoint", "--ckpt_path"), ("--precision", "--dtype"), ("--ip_adapter_image", "--img"),
    ("--image", "--ref_img"), ("--init_image", "--ref_img"), ("--mask", "--ref_mask"), ("--mask-image", "--ref_mask")])
def test_names_of_other_tools_are_taken(typed, meant, monkeypatch):
    _, parser = parser_of("image_inpainting_sd.py", monkeypatch)
    assert parser.own_names([f"{typed}=1"]) == [f"{meant}=1"]


@pytest.mark.parametrize("typed, meant", [
    ("--hight", "--H"), ("--denoise", "--strength"), ("--cfg", "--scale"), ("--weights", "--ckpt_path"),
    ("--samping_steps", "--sampling_steps"), ("--lora", None), ("--zzz", None)])
def test_unknown_flags_are_answered_by_their_meaning(typed, meant, monkeypatch):
    _, parser = parser_of("image_to_image_sd.py", monkeypatch)
    assert parser.meant(typed) == (f"; did you mean {meant}?" if meant else "")


def test_an_image_flag_counts_once(outcome, monkeypatch):
    main, _ = parser_of("image_variation_sd.py", monkeypatch)
    status, said = outcome(main, "--img", DATA / "input.png", "--img", DATA / "hint.png")
    assert status == 2 and "--img is given 2 times" in said


def test_guidance_that_never_acts(outcome, monkeypatch):
    main, _ = parser_of("image_variation_sd.py", monkeypatch)
    status, said = outcome(main, "--img", DATA / "input.png", "--guidance_start", "0.8", "--guidance_end", "0.2")
    assert status == 2 and "--guidance_start 0.8 is not before --guidance_end 0.2" in said


def test_a_checkpoint_is_found_where_the_tools_write_it(tmp_path, monkeypatch, capsys):
    written = tmp_path / "checkpoints" / "sdxl_models" / "merged" / "sd_xl_train.ckpt"
    written.parent.mkdir(parents=True)
    written.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert cli.checkpoint_file("checkpoints/sd_xl_train.ckpt") == written
    assert f"checkpoints/sd_xl_train.ckpt does not exist; using {written}" in capsys.readouterr().err


def test_prompts_are_utf_8_whatever_the_locale():
    assert cli.prompt("ein Hund 犬") == "ein Hund 犬"
    with pytest.raises(argparse.ArgumentTypeError, match="is not UTF-8 text"):
        cli.prompt("caf\udce9")
