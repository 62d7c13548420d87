"""Samplers over noise levels: the numbers of diffusers, a Gaussian whose path is known, what is kept."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from gm.choices import guidance
from gm.denoiser import Denoiser, timesteps_of
from gm.discretizer import DISCRETIZATIONS, discretize
from gm.sampler import SAMPLERS, sample_dpmpp_2m, sample_euler, sample_euler_ancestral, sample_heun
from ldm.errors import UserError
from ldm.sampling.ddim import KeptRegion
from ldm.sampling.schedule import NoiseSchedule
from tests.support.arrays import DATA
from tests.support.samplers import formula

SIGMAS = NoiseSchedule().sigmas()


@pytest.mark.parametrize("name, sampler", [("euler", sample_euler), ("euler_karras", sample_euler),
                                           ("euler_ancestral", sample_euler_ancestral), ("heun", sample_heun),
                                           ("dpmpp_2m", sample_dpmpp_2m), ("euler_v", sample_euler)])
def test_the_numbers_of_diffusers(name, sampler):
    with np.load(DATA / "sampler_reference.npz") as recorded:
        reference = dict(recorded)
    sigmas = discretize("DiffusersDDPMDiscretization", 9)
    np.testing.assert_allclose(sigmas, reference["euler_sigmas"], rtol=5e-6)
    if name == "euler_karras":  # whose range ends at the last of these levels, not at the schedule's
        sigmas = reference["euler_karras_sigmas"].astype(np.float64)
    fresh, schedule = iter(reference["fresh"]), NoiseSchedule(prediction="v" if name.endswith("_v") else "eps")
    start = Tensor(reference["start"]) * float(np.sqrt(sigmas[0] ** 2 + 1))
    denoise = Denoiser(lambda x, t: schedule.noise_in(x, formula(x, t), t))
    *_, x = sampler(denoise, start, sigmas, lambda: Tensor(next(fresh)))
    np.testing.assert_allclose(x.asnumpy(), reference[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_gaussian_is_recovered(name):
    """Pictures of mean 3 and deviation 0.5: the best denoiser is linear, and what is made has that mean and spread."""
    mean, deviation, rng = 3.0, 0.5, np.random.default_rng(1)
    sigmas = discretize("EDMDiscretization", 60)

    def denoise(x, sigma):
        share = deviation**2 / (deviation**2 + sigma**2)
        return x * float(share) + float(mean * (1 - share))

    start = rng.standard_normal((4000, 1, 1, 1), np.float32)
    x = Tensor(start * np.float32(sigmas[0]))
    steps = list(SAMPLERS[name](denoise, x, sigmas, lambda: Tensor(rng.standard_normal(start.shape, np.float32))))
    made = steps[-1].asnumpy()
    assert len(steps) == 60
    assert abs(made.mean() - mean) < 0.15 and abs(made.std() - deviation) < 0.06


@pytest.mark.parametrize("name", DISCRETIZATIONS)
def test_levels_fall_to_0(name):
    for steps in (1, 2, 7, 30, 999, 1000):
        sigmas = discretize(name, steps)
        assert len(sigmas) == steps + 1 and sigmas[-1] == 0 and sigmas[0] <= SIGMAS[-1] * 1.000001
        assert sigmas[-2] > 0 and np.all(np.diff(sigmas) <= 0)
    np.testing.assert_array_equal(discretize(name, 30, 0.5), discretize(name, 30)[15:])
    with pytest.raises(UserError, match="--strength"):
        discretize(name, 30, 0.01)


def test_levels_of_the_original_code():
    # sgm: generate_roughly_equally_spaced_steps(4, 1000) is [249, 499, 749, 999]
    np.testing.assert_array_equal(discretize("LegacyDDPMDiscretization", 4)[:-1], SIGMAS[[999, 749, 499, 249]])
    edm = discretize("EDMDiscretization", 5)
    np.testing.assert_allclose(edm[[0, 4]], SIGMAS[[-1, 0]])
    np.testing.assert_allclose(np.diff(edm[:-1] ** (1 / 7)), np.diff(edm[:2] ** (1 / 7))[0])


def test_timesteps_of_levels():
    np.testing.assert_array_equal(timesteps_of(SIGMAS), np.arange(1000))
    between = timesteps_of(np.sqrt(SIGMAS[10] * SIGMAS[11]))
    assert between == pytest.approx(10.5)


def test_the_denoiser_gives_the_network_unit_variance():
    seen = {}

    def predict(x, t):
        seen.update(x=x.asnumpy(), t=t)
        return x * 0 + 2.0

    x = Tensor(np.full((1, 4, 2, 2), 3.0, np.float32))
    clean = Denoiser(predict)(x, SIGMAS[700])
    assert seen["t"] == 700
    np.testing.assert_allclose(seen["x"], 3 / np.sqrt(SIGMAS[700] ** 2 + 1), rtol=1e-6)
    np.testing.assert_allclose(clean.asnumpy(), 3 - 2 * SIGMAS[700], rtol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_kept_ends_clean(name):
    rng = np.random.default_rng(2)
    clean, noise = rng.standard_normal((2, 1, 4, 2, 2)).astype(np.float32)
    mask = np.array([[[[1, 1], [0, 0]]]], np.float32)
    sigmas = discretize("DiffusersDDPMDiscretization", 6)
    keep = KeptRegion(Tensor(clean), Tensor(noise), mask, lambda x, n, sigma: x + n * float(sigma))
    steps = [x.asnumpy() for x in SAMPLERS[name](Denoiser(formula), Tensor(noise * np.float32(sigmas[0])), sigmas,
                                                 lambda: Tensor(noise), keep)]
    np.testing.assert_array_equal(steps[-1][:, :, 1], clean[:, :, 1])
    np.testing.assert_allclose(steps[2][:, :, 1], (clean + noise * sigmas[3])[:, :, 1], rtol=1e-5)
    assert np.abs(steps[-1][:, :, 0] - clean[:, :, 0]).min() > 1e-3


def test_guiders():
    assert guidance("VanillaCFG", 5.0) == 5.0 and guidance("IdentityGuider", 5.0) == 1.0
