"""What makes latents of images and images of latents: by name, or from a folder.

An autoencoder has `path` (what `load_autoencoder` takes for it), `identity` (a dict fit for JSON: `name`, and a
`fingerprint` of its numbers), `downsample`, `channels`, `scale` (latents times this have about unit variance),
`encode(images_BxHxWx3 in [-1, 1]) -> (mean, std)`, each (B, H / downsample, W / downsample, channels), and
`decode(latents) -> images_BxHxWx3`. Latents are without the scale.
"""

import functools
import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxvram.convert import autoencoder as convert
from jaxvram.errors import UserError, nearest
from jaxvram.models.autoencoder import AutoencoderConfig, AutoencoderKL

PIXELS = 2**18  # that go through at once: an image of 512, 4 of 256, 256 of 32 pixels a side
COMPUTE = {"remat": "none", "dtype": "float32", "param_dtype": "float32", "kernels": "xla"}


class RandomAutoencoder:
    """Not learnt, for tests and trials: each patch of 8 x 8 pixels becomes 4 numbers by one fixed orthonormal map.

    Three of them are the means of red, green and blue, times 8, so what it decodes is the picture in coarse blocks.
    """

    path, downsample, channels = "random", 8, 4
    scale = 0.25  # the latents of scikit-learn's two photographs have a standard deviation of 4.5
    std = 0.05  # of every latent, before the scale

    def __init__(self, seed: int = 0):
        means_3xP = np.zeros((3, 8, 8, 3))
        for colour in range(3):
            means_3xP[colour, :, :, colour] = 1 / 8
        means_3xP = means_3xP.reshape(3, -1)
        other_P = np.random.Generator(np.random.Philox(seed)).standard_normal(8 * 8 * 3)
        other_P -= means_3xP.T @ (means_3xP @ other_P)
        rows_4xP = np.concatenate([means_3xP, other_P[None] / np.linalg.norm(other_P)])
        self._rows_4xP = rows_4xP.astype(np.float32)
        # of rounded numbers: the last bits of a norm may differ from machine to machine
        numbers = np.rint(rows_4xP * 1e4).astype("<i4").tobytes()
        self.identity = {"name": "random", "fingerprint": hashlib.sha256(numbers).hexdigest()[:12]}

    def encode(self, images_BxHxWx3) -> tuple[np.ndarray, np.ndarray]:
        images = np.asarray(images_BxHxWx3, np.float32)
        B, H, W, _ = images.shape
        patches = images.reshape(B, H // 8, 8, W // 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, H // 8, W // 8, -1)
        mean_BxhxwxC = patches @ self._rows_4xP.T
        return mean_BxhxwxC, np.full_like(mean_BxhxwxC, self.std)

    def decode(self, latents_BxhxwxC) -> np.ndarray:
        latents = np.asarray(latents_BxhxwxC, np.float32)
        B, h, w, _ = latents.shape
        patches = (latents @ self._rows_4xP).reshape(B, h, w, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
        return np.clip(patches.reshape(B, 8 * h, 8 * w, 3), -1, 1)


class TrainedAutoencoder:
    """Of a folder in diffusers' layout, which an export of ours is. Between calls no weight of it is on the device.

    A call lets PIXELS through at a time, however many images it is given, in fp32.
    """

    def __init__(self, folder):
        self.path = str(pathlib.Path(folder).expanduser().resolve())
        self._cfg, self.scale = convert.read_config(self.path, **COMPUTE)
        if self._cfg.channels != 3:
            raise UserError(f"the autoencoder in {folder} is for images of {self._cfg.channels} channels; it must be for 3")
        self.downsample, self.channels = self._cfg.downsample, self._cfg.latent_channels
        self.identity = {"name": convert.CLASS, "fingerprint": self._fingerprint()}

    def encode(self, images_BxHxWx3) -> tuple[np.ndarray, np.ndarray]:
        moments_Bx2xhxwxC = self._by_chunks(_encode, images_BxHxWx3, 1)
        return moments_Bx2xhxwxC[:, 0], moments_Bx2xhxwxC[:, 1]

    def decode(self, latents_BxhxwxC) -> np.ndarray:
        return self._by_chunks(_decode, latents_BxhxwxC, self.downsample**2)

    def _by_chunks(self, of, arrays_BxHxWxC, pixels_a_place: int) -> np.ndarray:
        """What the program of `of` makes of all; the last chunk is filled up, so that one size compiles."""
        arrays = np.asarray(arrays_BxHxWxC, np.float32)
        B, H, W, _ = arrays.shape
        rows = min(B, at_once(H * W * pixels_a_place))
        params, run, out = jax.device_put(self._params), _compiled(of, self._cfg), []
        for start in range(0, B, rows):
            chunk = arrays.take(range(start, start + rows), axis=0, mode="wrap")
            out.append(np.asarray(run(params, chunk))[: B - start])
        return np.concatenate(out)

    @functools.cached_property
    def _params(self):
        """On the host."""
        return convert.load_params(self.path, self._cfg)["autoencoder"]

    def _fingerprint(self) -> str:
        """Of its sizes and of all its numbers."""
        cfg = self._cfg
        sizes = (cfg.channels, cfg.latent_channels, cfg.widths, cfg.res_blocks, cfg.groups)
        digest = hashlib.sha256(repr(sizes).encode())
        for name, x in sorted(flatten_dict(self._params, sep="/").items()):
            digest.update(name.encode() + np.ascontiguousarray(x).tobytes())
        return digest.hexdigest()[:12]


def at_once(pixels: int) -> int:
    """Images of so many pixels that go through together."""
    return max(1, PIXELS // pixels)


def _encode(cfg: AutoencoderConfig, params, images_BxHxWxC):
    """(B, 2, h, w, c): mean and standard deviation."""
    mean, logvar = AutoencoderKL(cfg).apply({"params": params}, images_BxHxWxC, method="encode")
    return jnp.stack([mean, jnp.exp(logvar / 2)], axis=1)


def _decode(cfg: AutoencoderConfig, params, latents_BxhxwxC):
    return jnp.clip(AutoencoderKL(cfg).apply({"params": params}, latents_BxhxwxC, method="decode"), -1, 1)


@functools.cache
def _compiled(of, cfg: AutoencoderConfig):
    return jax.jit(functools.partial(of, cfg))


def programs(folder, image_size: int) -> dict[str, tuple]:
    """What a preparation and a look at samples run: name -> (function, shapes of its arguments, which are donated).

    From config.json alone, for a plan.
    """
    cfg, _ = convert.read_config(folder, **COMPUTE)
    if image_size % cfg.downsample:
        raise UserError(f"image_size={image_size} must be a multiple of the autoencoder's {cfg.downsample} pixels")
    rows, side = at_once(image_size**2), image_size // cfg.downsample
    images = jax.ShapeDtypeStruct((rows, image_size, image_size, cfg.channels), jnp.float32)
    latents = jax.ShapeDtypeStruct((rows, side, side, cfg.latent_channels), jnp.float32)
    params = jax.eval_shape(lambda: AutoencoderKL(cfg).init(jax.random.key(0), jnp.zeros(images.shape))["params"])
    return {
        "encode": (functools.partial(_encode, cfg), (params, images), ()),
        "decode": (functools.partial(_decode, cfg), (params, latents), ()),
    }


AUTOENCODERS = {"random": RandomAutoencoder}


def load_autoencoder(name_or_folder: str):
    """The autoencoder of that name, or in that folder: a model of diffusers' AutoencoderKL, or a whole Stable Diffusion.

    Raises:
      UserError: there is no such autoencoder, or the folder is incomplete, damaged or holds something else.
    """
    if name_or_folder in AUTOENCODERS:
        return AUTOENCODERS[name_or_folder]()
    if not pathlib.Path(name_or_folder).expanduser().is_dir():
        hint = nearest(str(name_or_folder), AUTOENCODERS)
        raise UserError(f"the autoencoder {str(name_or_folder)!r} is unknown, and no folder{hint}")
    return TrainedAutoencoder(name_or_folder)
