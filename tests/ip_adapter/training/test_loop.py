"""A training run around a tiny network: what it logs, saves, refuses to go on from, and how it stops."""
from __future__ import annotations

import itertools
import logging
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor

import ip_adapter.training.loop as training_run
from ip_adapter.cli.script import _collecting, execute
from ip_adapter.training.log import LOG_COLUMNS, Progress, counted, read_log
from ip_adapter.training.loop import own_folder
from ip_adapter.training.resume import CHECKSUM, STATE, checksum
from ip_adapter.training.step import OptimizerConfig, TrainStep
from ldm.checkpoints.file import save_arrays
from ldm.errors import UserError
from ldm.files import locked
from ldm.parallel import Group
from tests.support.arrays import DATA, arrays, assert_equal
from tests.support.scripts import log_of
from tests.support.training import flags, run_of, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(run_of(folder))
    return folder


def changed_state(trained, folder, keep_sum: bool = False, **changed) -> None:
    """Copy a run's state with other arrays, and a fitting checksum or none."""
    found = {**arrays(trained / "ckpt" / STATE), **{name: np.asarray(value) for name, value in changed.items()}}
    del found[CHECKSUM]
    if keep_sum:
        found[CHECKSUM] = checksum(found)
    save_arrays(folder / "ckpt" / STATE, found)


def test_what_a_run_leaves(trained):
    assert sorted(path.name for path in trained.iterdir()) == ["ckpt", "log.csv", "loss.png"]
    assert [int(row["step"]) for row in log_of(trained)] == [1, 2, 3, 4]
    assert tuple(log_of(trained)[0]) == LOG_COLUMNS
    state = arrays(trained / "ckpt" / STATE)
    assert state[CHECKSUM].dtype == np.uint8 and state["run.published"].tolist() == [2, 4]
    np.testing.assert_array_equal(state[CHECKSUM], checksum(dict(reversed(state.items()))))


def test_the_checksum_sees_every_change():
    start = {"a": np.zeros(3, np.float32), "b": np.zeros((), np.int64)}
    others = [{**start, "a": np.array([0, 0, -0.0], np.float32)}, {**start, "a": np.zeros((3, 1), np.float32)},
              {**start, "a": np.zeros(3, np.int32)}, {"c": start["a"], "b": start["b"]}, {"a": start["a"]}]
    sums = {checksum(one).tobytes() for one in [start, *others]}
    assert len(sums) == 6


def test_two_runs_do_not_share_a_folder(tmp_path):
    args = flags(tmp_path / "run")
    with own_folder(args, Group()):
        with pytest.raises(UserError, match="--output_path .*another process is writing into this folder"):
            with own_folder(args, Group()):
                pass
        with own_folder(args, Group(1, 2)):  # the second process of a run is let in
            pass
    with own_folder(args, Group()), pytest.raises(UserError), locked(tmp_path / "run", "--output_path"):
        pass


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    args = flags(tmp_path / "new" / "run")
    with pytest.raises(UserError, match="expected a finite number"), own_folder(args, Group()):
        train(run_of(tmp_path / "new" / "run"), (np.nan,))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_path .*file: is not a folder"):
        with own_folder(flags(tmp_path / "file"), Group()):
            pass


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(trained, tmp_path):
    with pytest.raises(UserError, match=r"loss of step 4 is inf, .*train_resume.ckpt stays .*--start_learning_rate"):
        train(run_of(tmp_path), (1.0, 2.0, 1.0, np.inf))
    assert [int(row["step"]) for row in log_of(tmp_path)] == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["line-2.safetensors", STATE]
    again = run_of(tmp_path, resume=True)
    assert again.step == 2
    train(again)
    assert_equal(arrays(tmp_path / "ckpt" / STATE), arrays(trained / "ckpt" / STATE))


def test_an_overflow_is_normal_while_the_scale_can_fall(tmp_path):
    """From 4 to 2 to 1; the third loss that is not finite finds nothing left to lower."""
    config = OptimizerConfig(loss_scale=4.0, scale_window=100)
    train(run_of(tmp_path / "good", config), (np.inf, np.inf, 1.0, 2.0))
    assert [float(row["loss_scale"]) for row in log_of(tmp_path / "good")] == [2, 1, 1, 1]
    with pytest.raises(UserError, match="loss of step 3 is inf"):
        train(run_of(tmp_path / "bad", config), (np.inf, np.inf, np.inf, 1.0))


def test_a_loss_of_another_process_stops_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "average", lambda values: values + np.array([np.nan, 0, 0], np.float32))
    with pytest.raises(UserError, match="loss of step 1 is nan"):
        train(run_of(tmp_path))


@pytest.mark.parametrize("number, status, word", [(signal.SIGINT, 130, "interrupted"),
                                                  (signal.SIGTERM, 143, "terminated")])
def test_a_signal_after_the_first_step_saves(tmp_path, capfd, number, status, word):
    """Before it nothing is collected: the process would be stopped at once."""
    run, seen = run_of(tmp_path, max_steps=9), []

    def inputs_arrive():
        for step in itertools.count():
            seen.append(len(_collecting))
            if step == 2:
                _collecting[-1].append(number)
            yield SimpleNamespace(step=step)

    def main():
        ones = Tensor(np.ones((3, 2), np.float32))
        run.train(TrainStep(run.network, run.optimizer), inputs_arrive(), lambda batch: (ones,))

    with pytest.raises(SystemExit) as stop:
        execute(main)
    assert stop.value.code == status and word in capfd.readouterr().err
    assert seen == [0, 1, 1] and not _collecting
    assert int(arrays(tmp_path / "ckpt" / STATE)["run.step"]) == 3 == len(log_of(tmp_path))


@pytest.mark.parametrize("changed, expected", [
    ({"parameter.a": np.array([np.nan, 1], np.float32)}, "`parameter.a` has values that are not finite"),
    ({"mean.a": np.array([1, -np.inf], np.float32)}, "`mean.a` has values that are not finite"),
    ({"square.a": np.array([1, -1], np.float32)}, "`square.a` has values below 0"),
    ({"run.step": np.int64(-1)}, "4 updates in -1 steps"),
    ({"run.step": np.int64(2**60)}, "4 updates in 1152921504606846976 steps"),
    ({"run.step": np.array([4, 4])}, "expected one integer"),
    ({"run.step": np.float32(4)}, "expected one integer"),
    ({"run.published": np.array([2, 400])}, "`run.published`"),
    ({"run.published": np.float32(2)}, "`run.published`"),
])
def test_a_state_of_absurd_values_is_refused(trained, tmp_path, changed, expected):
    for keep_sum in (True, False):
        changed_state(trained, tmp_path, keep_sum, **changed)
        with pytest.raises(UserError, match=f"--resume .*is damaged, .*{expected}.*start anew in another folder"):
            run_of(tmp_path, resume=True)


def test_a_state_is_compared_with_its_checksum(trained, tmp_path):
    found = arrays(trained / "ckpt" / STATE)
    save_arrays(tmp_path / "ckpt" / STATE, {**found, "parameter.a": found["parameter.a"] + np.float32(1e-6)})
    with pytest.raises(UserError, match="does not fit its checksum; go on from a copy"):
        run_of(tmp_path, resume=True)
    changed_state(trained, tmp_path)  # older ones have none
    assert run_of(tmp_path, resume=True).step == 4


def test_a_state_of_another_data_set_or_type_is_refused(trained, tmp_path):
    changed_state(trained, tmp_path)
    with pytest.raises(UserError, match=r"was trained with a data set of 10 rows \(now 11\); give"):
        run_of(tmp_path, length=11, resume=True)
    with pytest.raises(UserError, match=r"with --buckets False \(now True\)"):
        run_of(tmp_path, buckets=True, resume=True)
    changed_state(trained, tmp_path, **{"mean.a": np.zeros(2, np.float64)})
    with pytest.raises(UserError, match="`mean.a` is float64, expected float32"):
        run_of(tmp_path, resume=True)


HEADER, ROW = ",".join(LOG_COLUMNS), "1,1.13,0.0001,1.0,0,0.3"


@pytest.mark.parametrize("content, rows, odd", [
    ((DATA / "faults" / "log_saved_by_spreadsheet.csv").read_bytes(), {1: 1.13}, 0),
    (b"\xef\xbb\xbf" + (DATA / "faults" / "log_saved_by_spreadsheet.csv").read_bytes(), {1: 1.13}, 0),
    (f"{HEADER}\n{ROW}\n".replace(",", ";").replace(".", ",").encode(), {1: 1.13}, 0),
    (f"{HEADER}\n{ROW}\n".replace(",", "\t").encode(), {1: 1.13}, 0),
    (f'"loss","step",{HEADER[10:]}\n7.5,1,{ROW[7:]}\n'.encode(), {1: 7.5}, 0),
    (f"{HEADER}\n{ROW}\n".encode() + bytes(50), {1: 1.13}, 1),
    (f"{HEADER}\n{ROW}\n2,nan{ROW[6:]}\n9{ROW[1:]}\n".encode(), {1: 1.13, 2: np.nan}, 0),
    (f"{HEADER}\n{ROW}\n2,1\nx{ROW[1:]}\n-1{ROW[1:]}\n{ROW},7\n2{ROW[1:]}\n".encode(), {1: 1.13, 2: 1.13}, 4),
    (f"st\xe9p{HEADER[4:]}\r\n{ROW}\r\n".encode("latin-1"), {1: 1.13}, 0),
    (b"", {}, 0), (bytes(9), {}, 0),
])
def test_rows_of_a_log_that_can_be_read_are_kept(tmp_path, caplog, content, rows, odd):
    (tmp_path / "log.csv").write_bytes(content)
    found = read_log(tmp_path / "log.csv", 4)
    assert all(tuple(row) == LOG_COLUMNS for row in found)
    np.testing.assert_array_equal([float(row["loss"]) for row in found], list(rows.values()))
    assert [int(row["step"]) for row in found] == list(rows)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == bool(odd) and all(f"{counted(odd, 'row')} cannot be read" in line for line in said)


def test_a_log_that_is_not_there_has_no_rows(tmp_path):
    assert read_log(tmp_path / "log.csv", 4) == []


def test_without_a_terminal_lines_are_said(tmp_path, caplog, monkeypatch):
    """At the first and last step and every half minute; the last line names the file, and what to do with it."""
    caplog.set_level(logging.INFO)
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr("ip_adapter.training.log.time", SimpleNamespace(monotonic=lambda: next(clock)))
    progress = Progress(0, 9, True)
    for step in range(1, 10):
        progress.report(step, 1.0, 0.1, 2.0)
        progress.done()
    steps = [int(re.match(r"step (\d+) of 9: loss 1.0000", record.getMessage())[1]) for record in caplog.records]
    assert steps[0] == 1 and steps[-1] == 9 and 3 <= len(steps) <= 5
    caplog.clear()
    run = run_of(tmp_path, max_steps=1, validation_interval=1)
    run.validate, run.advice = (lambda step: None), (lambda path: f"use {path.name}")
    train(run)
    said = [record.getMessage() for record in caplog.records]
    assert said[1] == "making the validation images of step 1"
    assert said[-2:] == [f"1 step in {tmp_path}; saved {tmp_path}/ckpt/line-1.safetensors", "use line-1.safetensors"]


def test_the_bar_is_full_after_the_validation_only(tmp_path, monkeypatch):
    run, seen = run_of(tmp_path, max_steps=2, validation_interval=1), []
    monkeypatch.setattr(Progress, "done", lambda self: seen.append("done"))
    run.validate = seen.append
    train(run)
    assert seen == [1, "done", 2, "done"]
