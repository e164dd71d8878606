"""What makes latents of images and images of latents: by name, or from a folder.

An autoencoder has `identity` (a dict fit for JSON: `name`, and a `fingerprint` of its numbers), `downsample`, `channels`,
`scale` (latents times this have about unit variance), `encode(images_BxHxWx3 in [-1, 1]) -> (mean, std)`, each
(B, H / downsample, W / downsample, channels), and `decode(latents) -> images_BxHxWx3`. Latents are without the scale.
"""

import hashlib

import numpy as np

from jaxvram.errors import UserError, nearest


class RandomAutoencoder:
    """Not learnt, for tests and trials: each patch of 8 x 8 pixels becomes 4 numbers by one fixed orthonormal map.

    Three of them are the means of red, green and blue, times 8, so what it decodes is the picture in coarse blocks.
    """

    downsample, channels = 8, 4
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


AUTOENCODERS = {"random": RandomAutoencoder}


def load_autoencoder(name_or_folder: str):
    """The autoencoder of that name.

    Raises:
      UserError: there is no such autoencoder.
    """
    if name_or_folder not in AUTOENCODERS:
        raise UserError(f"the autoencoder {name_or_folder!r} is unknown{nearest(name_or_folder, AUTOENCODERS)}")
    return AUTOENCODERS[name_or_folder]()
