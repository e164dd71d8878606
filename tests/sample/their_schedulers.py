"""diffusers' schedulers, by our names."""

import functools

import pytest

BETAS = {  # for 1000 timesteps; for T, 1000 / T times as large
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def scheduler(kind, noise, in_fp64=True, **options):
    """diffusers.<kind>Scheduler of a `Noise`.

    `in_fp64`: its table of abar is made again, by its own arithmetic, in fp64. In fp32, 1 - abar of the first timesteps
    and abar of the last are right to two to five digits.
    """
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    scaled = lambda name, x: x * 1000 / noise.T if name in ("beta_start", "beta_end") else x
    named = {name: scaled(name, x) for name, x in BETAS[noise.schedule].items()}
    named |= {"prediction_type": PREDICTIONS[noise.prediction], "num_train_timesteps": noise.T}
    make = functools.partial(getattr(diffusers, f"{kind}Scheduler"), **named, **options)
    theirs = make(rescale_betas_zero_snr=noise.zero_terminal_snr)
    if in_fp64:
        betas = make().betas.double().clamp(max=0.999)  # fp32's 0.999 is more
        betas = rescale_zero_terminal_snr(betas) if noise.zero_terminal_snr else betas
        theirs.alphas_cumprod = torch.cumprod(1 - betas, 0)
    return theirs
