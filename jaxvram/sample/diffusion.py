"""From noise to images: ancestral DDPM, DDIM and its inverse, DPM-Solver++(2M); for flows Euler and Heun.

A sampler is a table of steps, made in float64 before anything runs, and a `lax.scan` over it. Each step asks
`denoise(x, t) -> (what the network says, variance's place between its bounds or None)` once (Heun: twice).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.errors import UserError, nearest
from jaxvram.sample.noise import Noise, Posterior

SAMPLERS = ("ddpm", "ddim", "dpm++", "euler", "heun")
FOR_FLOWS = ("euler", "heun")
CHANNELS = ("all", "first3")


@dataclasses.dataclass(frozen=True)
class DiffusionSampleConfig:
    sampler: str = "ddpm"  # ddpm | ddim | dpm++ (2M); for flows: euler | heun
    steps: int = 250  # network evaluations an image (heun: about twice as many)
    guidance: float = 1.0  # w in uncond + w (cond - uncond); 1: none (Ho & Salimans 2022, arXiv:2207.12598)
    guidance_channels: str = "all"  # all | first3: guide only the first three, as DiT's published samples do
    eta: float = 0.0  # of ddim: 0 deterministic, 1 as noisy as ddpm
    fixed_variance: str = "small"  # small | large: of ddpm where the model has not learned it (Ho et al. 2020, 3.2)
    clip: bool = False  # the image foreseen at each step into [-1, 1]: for pixels, not for latents
    classes: str = ""  # numbers or names, separated by commas; empty: all in turn
    prompt: str = ""  # of models that read text; several are separated by |; empty: captions of held-out images
    negative_prompt: str = ""  # what guidance leads away from; empty: the empty text
    init_image: str = ""  # a picture to start from instead of noise (SDEdit: Meng et al. 2021, arXiv:2108.01073)
    aspect: float = 1.0  # height / width, of models that take any; the nearest shape as large as the model's square
    strength: float = 0.75  # of the noise laid over it, as a share of the steps: 1 leaves nothing of it
    num_samples: int = 16
    batch_size: int = 64  # images at a time
    seed: int = 0

    def __post_init__(self):
        for field, valid in (
            ("sampler", SAMPLERS), ("guidance_channels", CHANNELS), ("fixed_variance", ("small", "large"))
        ):  # fmt: skip
            if (value := getattr(self, field)) not in valid:
                raise UserError(f"sample.{field}={value!r} is unknown{nearest(value, valid)}")
        if min(self.steps, self.num_samples, self.batch_size) < 1 or min(self.guidance, self.eta) < 0:
            raise UserError("sample: steps, num_samples and batch_size must be at least 1, guidance and eta not negative")
        if not 0.25 <= self.aspect <= 4:
            raise UserError(f"sample.aspect={self.aspect} must lie between 0.25 and 4 (height / width)")
        if not 0 < self.strength <= 1:
            raise UserError(f"sample.strength={self.strength} must lie above 0 and be at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"sample.seed={self.seed} is not in [0, 2^32)")


def sample(denoise, noise: Noise, x_BxHxWxC, key, cfg: DiffusionSampleConfig, init_BxHxWxC=None):
    """Images from pure noise, or from an image and noise. Jit it; the scan inside compiles `denoise` once.

    Args:
      denoise: (x, t_B) -> (prediction, fraction or None), both like x, fp32; t on the schedule's own scale.
      noise: what the prediction means.
      x_BxHxWxC: standard normal.
      key: of the noise that ddpm, and ddim with eta, add on the way.
      init_BxHxWxC: (None) images to start from: of the steps only the last `strength` are gone, from as much noise as there
        is at the first of them.
    Raises:
      UserError: a sampler that does not go with the schedule, or more steps than there are timesteps.
    """
    check(noise, cfg)
    ask = functools.partial(_ask, denoise, noise, cfg.clip)
    table = step_table(noise, cfg.sampler, cfg.steps)
    step = {
        "ddpm": functools.partial(_ddpm, ask, large=cfg.fixed_variance == "large"),
        "ddim": functools.partial(_ddim, ask, eta=cfg.eta),
        "dpm++": functools.partial(_dpm, ask),
        "euler": functools.partial(_euler, denoise),
        "heun": functools.partial(_heun, denoise),
    }[cfg.sampler]
    keys = jax.random.split(key, cfg.steps)
    if init_BxHxWxC is not None:
        first = cfg.steps - max(1, round(cfg.strength * cfg.steps))
        table, keys = _from_step(table, first), keys[first:]
        x_BxHxWxC = table["alpha"][0] * init_BxHxWxC + table["sigma"][0] * x_BxHxWxC
    carry = (x_BxHxWxC, jnp.zeros_like(x_BxHxWxC))  # the image, and the x_0 foreseen one step before
    (x_BxHxWxC, _), _ = jax.lax.scan(lambda carry, at: (step(carry, *at), None), carry, (table, keys))
    return x_BxHxWxC


def _from_step(table: dict, first: int) -> dict:
    """The rest of a table of steps; its first has no x_0 foreseen before it."""
    table = {name: values[first:] for name, values in table.items()}
    return table | {"change": table["change"].at[0].set(0)} if "change" in table else table


def invert(denoise, noise: Noise, x_BxHxWxC, steps: int):
    """DDIM backwards: the noise from which DDIM, deterministic and in as many steps, makes these images (nearly)."""
    check(noise, DiffusionSampleConfig(sampler="ddim", steps=steps))
    ask = functools.partial(_ask, denoise, noise, False)

    def step(x, s):
        x0, eps, _ = ask(x, s)
        return s["alpha_next"] * x0 + s["sigma_next"] * eps, None

    return jax.lax.scan(step, x_BxHxWxC, inverse_table(noise, steps))[0]


def check(noise: Noise, cfg: DiffusionSampleConfig) -> None:
    if noise.is_flow != (cfg.sampler in FOR_FLOWS):
        valid = FOR_FLOWS if noise.is_flow else [s for s in SAMPLERS if s not in FOR_FLOWS]
        raise UserError(
            f"sample.sampler={cfg.sampler} is not for task.schedule={noise.schedule}; valid: {', '.join(valid)}"
        )
    most = noise.T - (cfg.sampler == "dpm++")
    if not noise.is_flow and cfg.steps > most:
        raise UserError(
            f"sample.steps={cfg.steps} is too many: {cfg.sampler} takes at most {most} with the {noise.T} timesteps that "
            "the model was trained on"
        )


def timesteps(T: int, steps: int) -> np.ndarray:
    """`steps` whole timesteps from T - 1 down to 0, evenly spread; a single one is the last."""
    if steps == 1:
        return np.array([T - 1])
    return np.linspace(0, T - 1, steps).round().astype(np.int64)[::-1]  # upwards, where halves round as diffusers' do


def step_table(noise: Noise, sampler: str, steps: int) -> dict:
    """For each step, fp32: t, t_next, alpha, sigma, alpha_next, sigma_next; with whole timesteps also the posterior."""
    if noise.is_flow:
        sigma_N = np.linspace(1, 0, steps + 1)
        alpha_N = 1 - sigma_N
        table = {"t": noise.T * sigma_N[:-1], "t_next": noise.T * sigma_N[1:]}
    else:
        # dpm++ works on logarithms of alpha / sigma: it stops before timestep 0, at one more, and goes to the image itself
        t_N = timesteps(noise.T, steps + 1)[:-1] if sampler == "dpm++" else timesteps(noise.T, steps)
        alpha_bar_N = np.append(noise.alpha_bar_T[t_N], 1.0)
        alpha_N, sigma_N = np.sqrt(alpha_bar_N), np.sqrt(1 - alpha_bar_N)
        table = {"t": t_N, "t_next": np.append(t_N[1:], 0)}
        posterior = Posterior.between(alpha_bar_N[:-1], alpha_bar_N[1:])
        low_N, high_N = posterior.log_bounds
        table |= {"of_x0": posterior.of_x0, "of_x": posterior.of_x, "log_small": low_N, "log_large": high_N}
    table |= {"alpha": alpha_N[:-1], "sigma": sigma_N[:-1], "alpha_next": alpha_N[1:], "sigma_next": sigma_N[1:]}
    if sampler == "dpm++":
        table |= _second_order(alpha_N, sigma_N)
    last = np.arange(steps) == steps - 1
    return {name: jnp.asarray(values, jnp.float32) for name, values in (table | {"last": last}).items()}


def inverse_table(noise: Noise, steps: int) -> dict:
    """DDIM's steps the other way. At each the network is told the timestep that it goes to, as on the way down.

    From x_0 alone nobody can tell the noise of an image without any: then the image is taken for that of timestep 0.
    """
    t_N = timesteps(noise.T, steps)[::-1]
    alpha_bar_N = noise.alpha_bar_T[np.append(0, t_N)]
    if noise.prediction != "x0":
        alpha_bar_N[0] = 1
    table = {"t": t_N, "alpha": alpha_bar_N[:-1] ** 0.5, "sigma": (1 - alpha_bar_N[:-1]) ** 0.5}
    table |= {"alpha_next": alpha_bar_N[1:] ** 0.5, "sigma_next": (1 - alpha_bar_N[1:]) ** 0.5}
    return {name: jnp.asarray(values, jnp.float32) for name, values in table.items()}


def _second_order(alpha_N, sigma_N) -> dict:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095): weights of x, of x_0, and of its change since the last step.

    With lambda = log(alpha / sigma) and h its step: x' = (sigma' / sigma) x + alpha' (1 - e^-h) (x_0 + (x_0 - before) h /
    (2 h_before)); first order in the first step and in the last, where h is infinite.
    """
    with np.errstate(divide="ignore"):
        lambda_N = np.log(alpha_N) - np.log(sigma_N)
    h_N = np.diff(lambda_N)
    change_N = np.zeros_like(h_N)
    change_N[1:-1] = h_N[1:-1] / (2 * h_N[:-2])
    return {"keep": sigma_N[1:] / sigma_N[:-1], "to_x0": -alpha_N[1:] * np.expm1(-h_N), "change": change_N}


def _ask(denoise, noise: Noise, clip: bool, x, s):
    """(x_0, eps, fraction) that the network foresees from x at step s."""
    said, fraction = denoise(x, jnp.full(x.shape[0], s["t"]))
    x0, eps = noise.x0_and_eps(x, said, s["alpha"], s["sigma"])
    if clip:
        x0 = jnp.clip(x0, -1, 1)
        eps = noise.eps_of(x, x0, s["alpha"], s["sigma"])
    return x0, eps, fraction


def _ddpm(ask, carry, s, key, large: bool):
    x, _ = carry
    x0, _, fraction = ask(x, s)
    log_variance = s["log_large"] if large else s["log_small"]
    if fraction is not None:
        log_variance = fraction * s["log_large"] + (1 - fraction) * s["log_small"]
    noise = jnp.where(s["last"] > 0, 0, jnp.exp(0.5 * log_variance)) * jax.random.normal(key, x.shape)
    return s["of_x0"] * x0 + s["of_x"] * x + noise, x0


def _ddim(ask, carry, s, key, eta: float):
    """Song et al. 2020, arXiv:2010.02502, equation 12."""
    x, _ = carry
    x0, eps, _ = ask(x, s)
    std = eta * jnp.exp(0.5 * s["log_small"]) * (1 - s["last"])
    # sigma_next^2 - std^2 = sigma_next^2 (1 - eta^2 (1 - share)); in fp32 the difference itself would lose all digits
    share = s["of_x"] * s["alpha"] / s["alpha_next"]
    towards = s["sigma_next"] * jnp.sqrt(jnp.maximum(1 - eta**2 + eta**2 * share, 0))
    noise = std * jax.random.normal(key, x.shape) if eta > 0 else 0
    return s["alpha_next"] * x0 + towards * eps + noise, x0


def _dpm(ask, carry, s, key):
    x, before = carry
    x0, _, _ = ask(x, s)
    return s["keep"] * x + s["to_x0"] * (x0 + s["change"] * (x0 - before)), x0


def _velocity(denoise, x, t):
    return denoise(x, jnp.full(x.shape[0], t))[0]


def _euler(denoise, carry, s, key):
    x, before = carry
    return x + (s["sigma_next"] - s["sigma"]) * _velocity(denoise, x, s["t"]), before


def _heun(denoise, carry, s, key):
    """The mean of the velocities at both ends; the last step, whose end is the image, is Euler's."""
    x, before = carry
    h, u = s["sigma_next"] - s["sigma"], _velocity(denoise, x, s["t"])
    u_next = jax.lax.cond(s["last"] > 0, lambda: u, lambda: _velocity(denoise, x + h * u, s["t_next"]))
    return x + h * (u + u_next) / 2, before
