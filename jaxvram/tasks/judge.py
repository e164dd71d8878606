"""A small classifier, trained on the data that a denoiser learns from, which then judges the denoiser's samples.

Class agreement: the share of samples that it takes for the class they were asked to be. Frechet distance: between normal
distributions fitted to its features of held-out images and of samples. That is *not* FID, whose features are Inception's:
figures compare runs on one data set, and nothing else.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

FEATURES = 64
TRAIN, HELD_OUT = 8192, 2048  # images, at the most
BATCH, STEPS = 128, 600


class Classifier(nn.Module):
    """Three convolutions, a pool, a layer of FEATURES; (logits, features)."""

    num_classes: int

    @nn.compact
    def __call__(self, x_BxHxWxC):
        for width in (32, 64, 64):
            stride = 2 if x_BxHxWxC.shape[1] > 8 else 1
            x_BxHxWxC = jax.nn.relu(nn.Conv(width, (3, 3), strides=stride)(x_BxHxWxC))
        B, H = x_BxHxWxC.shape[:2]
        pooled = nn.avg_pool(x_BxHxWxC, (max(1, H // 4),) * 2, strides=(max(1, H // 4),) * 2)
        features_BxF = jax.nn.relu(nn.Dense(FEATURES)(pooled.reshape(B, -1)))
        return nn.Dense(self.num_classes)(features_BxF), features_BxF


@dataclasses.dataclass
class Judge:
    """A trained classifier, how far it is to be trusted, and what held-out images look like to it."""

    classify: object  # jitted: images -> (logits, features)
    accuracy: float  # on held-out images
    mean_F: np.ndarray
    covariance_FxF: np.ndarray

    @classmethod
    def trained_on(cls, source) -> "Judge":
        """From the same seed every time: STEPS batches of Adam, a few seconds for small images."""
        images, labels = source.train_images(TRAIN)
        held_out, held_out_labels = source.val_images(HELD_OUT)
        model = Classifier(source.num_classes)
        tx = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))

        @jax.jit
        def step(params, opt_state, x, y):
            loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": p}, x)[0], y).mean()
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
            return optax.apply_updates(params, updates), opt_state

        params = model.init(jax.random.key(0), jnp.asarray(images[:1]))["params"]
        opt_state, rng = tx.init(params), np.random.default_rng(0)
        for _ in range(STEPS):
            rows = rng.integers(len(images), size=BATCH)
            params, opt_state = step(params, opt_state, images[rows], labels[rows])
        classify = jax.jit(functools.partial(model.apply, {"params": params}))
        logits, features_NxF = map(np.asarray, classify(held_out))
        return cls(classify, float((logits.argmax(-1) == held_out_labels).mean()), *normal(features_NxF))

    def scores(self, images, labels_N) -> dict[str, float]:
        logits, features_NxF = map(np.asarray, self.classify(images))
        return {
            "class_agreement": float((logits.argmax(-1) == labels_N).mean()),
            "judge_accuracy": self.accuracy,
            "frechet_classifier": frechet(self.mean_F, self.covariance_FxF, *normal(features_NxF)),
        }


def normal(features_NxF) -> tuple[np.ndarray, np.ndarray]:
    features_NxF = np.asarray(features_NxF, np.float64)
    return features_NxF.mean(0), np.cov(features_NxF, rowvar=False)


def frechet(mean_1, covariance_1, mean_2, covariance_2) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), the distance of two normal distributions, squared."""
    values, vectors = np.linalg.eigh(covariance_1)
    root_1 = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root_1 @ covariance_2 @ root_1), 0)).sum()
    return float(np.square(mean_1 - mean_2).sum() + np.trace(covariance_1) + np.trace(covariance_2) - 2 * cross)
