"""Damaged files of a training: it goes on exactly as it would have, or is refused by a line; never anything else."""
from __future__ import annotations

import numpy as np
import pytest

from ip_adapter.training.log import LOG_COLUMNS, read_log
from ip_adapter.training.resume import CHECKSUM, STATE
from ldm.checkpoints.file import save_arrays
from ldm.errors import UserError
from tests.support.arrays import arrays, assert_equal
from tests.support.mutations import mutations
from tests.support.training import run_of, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(run_of(folder))
    return folder


@pytest.mark.parametrize("summed", [True, False], ids=["with its checksum", "of before there were checksums"])
def test_a_damaged_state_is_refused_or_works(trained, tmp_path, summed):
    """What carries a checksum and is taken up is what was saved; what carries none is at least of finite numbers."""
    good, path = arrays(trained / "ckpt" / STATE), tmp_path / "ckpt" / STATE
    if not summed:
        del good[CHECKSUM]
    save_arrays(path, good)
    expected, refused = run_of(tmp_path, resume=True).optimizer.state(), 0
    for content in mutations(path.read_bytes(), 1, 600):
        path.write_bytes(content)
        try:
            run = run_of(tmp_path, resume=True)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
            continue
        assert 0 <= run.step <= 10**9 and all(0 <= step <= run.step for step in run.published)
        state = run.optimizer.state()
        assert all(np.isfinite(value).all() for value in state.values())
        if summed and CHECKSUM in arrays(path):
            assert run.step == 4
            assert_equal(state, expected)
    assert refused > 300


def test_a_damaged_log_never_stops_a_run(trained, tmp_path):
    """Rows that can be read are kept, in order, none twice; the run writes a log that is whole again."""
    save_arrays(tmp_path / "ckpt" / STATE, arrays(trained / "ckpt" / STATE))
    content = (trained / "log.csv").read_bytes()
    for n, bad in enumerate(mutations(content, 2, 2000)):
        (tmp_path / "log.csv").write_bytes(bad)
        rows = read_log(tmp_path / "log.csv", 4)
        steps = [int(row["step"]) for row in rows]
        assert steps == sorted(set(steps)) and all(1 <= step <= 4 for step in steps)
        assert all(tuple(row) == LOG_COLUMNS and float(row["loss"]) is not None for row in rows)
        if n % 100 == 0:
            run = run_of(tmp_path, resume=True, max_steps=5)
            train(run)
            again = read_log(tmp_path / "log.csv", 9)
            assert [int(row["step"]) for row in again] == [*steps, 5]
            save_arrays(tmp_path / "ckpt" / STATE, arrays(trained / "ckpt" / STATE))
            (tmp_path / "ckpt" / "line-5.safetensors").unlink()
