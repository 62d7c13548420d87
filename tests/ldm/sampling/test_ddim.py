"""The schedule and DDIM: timesteps of every step count, and a Gaussian whose path is known."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from ldm.errors import UserError
from ldm.sampling.ddim import KeptRegion, next_alphas, sample_ddim
from ldm.sampling.schedule import NoiseSchedule, leading_timesteps
from tests.support.arrays import DATA
from tests.support.samplers import formula

ALPHAS = NoiseSchedule().alphas_cumprod()


def test_schedule_ends():
    # huggingface/diffusers 0.42.1, DDIMScheduler("scaled_linear", 0.00085, 0.012): alphas_cumprod[[0, 500, 999]]
    np.testing.assert_allclose(ALPHAS[[0, 500, 999]], [0.99914998, 0.27633247, 0.00466010], atol=2e-7)
    assert ALPHAS.dtype == np.float64 and np.all(np.diff(ALPHAS) < 0)


def test_exactly_the_steps_asked_for():
    for steps in range(1, 1001):
        timesteps = leading_timesteps(steps)
        assert len(timesteps) == steps and timesteps[0] <= 999 and timesteps[-1] == 1
        assert np.all(np.diff(timesteps) <= 0)


def test_timesteps_of_diffusers():
    assert leading_timesteps(7).tolist() == [853, 711, 569, 427, 285, 143, 1]
    assert leading_timesteps(50)[:3].tolist() == [981, 961, 941]
    assert leading_timesteps(1).tolist() == [1]


@pytest.mark.parametrize("steps", [0, 1001])
def test_other_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        leading_timesteps(steps)


def test_the_last_alpha_is_that_of_timestep_0():
    assert next_alphas(ALPHAS, leading_timesteps(20))[-1] == ALPHAS[0]


@pytest.mark.parametrize("steps", [20, 100, 1000])
def test_a_gaussian_is_recovered(steps):
    """For data N(mean, deviation^2) the best noise prediction is known, and so is where every noise ends up."""
    mean, deviation = 0.7, 0.2

    def denoise(x, t):
        a = ALPHAS[t]
        variance = a * deviation**2 + 1 - a
        return Tensor((np.sqrt(1 - a) * (x.asnumpy() - np.sqrt(a) * mean) / variance).astype(np.float32))

    noise = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    states = list(sample_ddim(denoise, Tensor(noise), leading_timesteps(steps)))
    assert len(states) == steps
    result = states[-1].asnumpy()
    first = ALPHAS[leading_timesteps(steps)[0]]  # the noise is taken for a sample at the first timestep
    expected = mean + deviation * (noise - np.sqrt(first) * mean) / np.sqrt(first * deviation**2 + 1 - first)
    tolerance = {20: 0.1, 100: 0.02, 1000: 0.01}[steps]
    assert abs(result.mean() - expected.mean()) < tolerance and np.abs(result - expected).max() < 4 * tolerance


def test_the_numbers_of_diffusers_for_a_velocity():
    schedule = NoiseSchedule(prediction="v")
    with np.load(DATA / "sampler_reference.npz") as reference:
        *_, x = sample_ddim(lambda x, t: schedule.noise_in(x, formula(x, t), t), Tensor(reference["start"]),
                            leading_timesteps(9), schedule)
        np.testing.assert_allclose(x.asnumpy(), reference["ddim_v"], rtol=1e-4, atol=1e-4)


def test_a_velocity_is_picture_and_noise():
    """Salimans and Ho (arXiv 2202.00512), appendix D: v is at a right angle to the noisy picture; both give both."""
    rng, schedule, timesteps = np.random.default_rng(0), NoiseSchedule(prediction="v"), np.array([0, 500, 999])
    latents, noise = rng.standard_normal((2, 3, 4, 2, 2))
    noisy, v = schedule.add_noise(latents, noise, timesteps), schedule.target(latents, noise, timesteps)
    np.testing.assert_allclose(noisy**2 + v**2, latents**2 + noise**2)
    for i, t in enumerate(timesteps):
        np.testing.assert_allclose(schedule.noise_in(noisy[i], v[i], t), noise[i])
    between = schedule.noise_in(0.0, 1.0, 500.5)
    assert schedule.noise_in(0.0, 1.0, 501) < between < schedule.noise_in(0.0, 1.0, 500)
    eps = NoiseSchedule()
    assert eps.target(latents, noise, timesteps) is noise and eps.noise_in(noisy, noise, 5) is noise


def test_an_unknown_prediction_is_refused():
    with pytest.raises(UserError, match="`prediction` is x0, expected eps or v"):
        NoiseSchedule(prediction="x0")


def test_noise_level_of_every_strength():
    """A denoiser that knows the picture ends at it only if the noise added is that of the first timestep run."""
    x0, noise = np.array([0.8, -0.3]), np.array([-1.1, 0.6])
    end = np.sqrt(ALPHAS[0]) * x0 + np.sqrt(1 - ALPHAS[0]) * noise
    schedule = NoiseSchedule()

    def denoise(x, t):
        return (x - np.sqrt(ALPHAS[t]) * x0) / np.sqrt(1 - ALPHAS[t])

    for steps in range(1, 101):
        whole = leading_timesteps(steps)
        for strength in (n / 100 for n in range(1, 101)):
            if int(steps * strength) == 0:
                with pytest.raises(UserError, match="leaves none of the"):
                    leading_timesteps(steps, strength)
                continue
            timesteps = leading_timesteps(steps, strength)
            np.testing.assert_array_equal(timesteps, whole[-int(steps * strength):])
            x = schedule.add_noise(x0, noise, timesteps[0])
            *_, last = sample_ddim(denoise, x, timesteps, schedule)
            np.testing.assert_allclose(last, end, atol=1e-9)


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_other_strengths_are_refused(strength):
    with pytest.raises(UserError, match="expected 0 to 1"):
        leading_timesteps(50, strength)


def test_the_kept_region_is_as_noisy_as_the_step_and_clean_at_the_end():
    rng, schedule, timesteps = np.random.default_rng(1), NoiseSchedule(), leading_timesteps(6, 0.7)
    clean, noise = rng.standard_normal((1, 4, 3, 5)), rng.standard_normal((2, 4, 3, 5))
    mask = np.zeros((1, 1, 3, 5))
    mask[:, :, 1:, 2:] = 1
    kept = np.broadcast_to(mask == 0, noise.shape)
    clean, noise, mask = (Tensor(array.astype(np.float32)) for array in (clean, noise, mask))
    keep = KeptRegion(clean, noise, mask.asnumpy(), schedule.add_noise)
    x = schedule.add_noise(clean, noise, timesteps[0])
    states = [state.asnumpy() for state in sample_ddim(lambda x, t: x * 0.5, x, timesteps, schedule, keep)]
    free = [state.asnumpy() for state in sample_ddim(lambda x, t: x * 0.5, x, timesteps, schedule)]
    for i, state in enumerate(states):
        last = i == len(states) - 1
        expected = (clean + noise * 0 if last else schedule.add_noise(clean, noise, timesteps[i + 1])).asnumpy()
        np.testing.assert_array_equal(state[kept], expected[kept])
        np.testing.assert_allclose(state[~kept], free[i][~kept])
