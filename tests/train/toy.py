"""A task that compiles in no time, on data that can be poisoned: what the loop and the guard are tested with."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.tasks.samples import Samples

VOCABULARY, LENGTH = 5, 3


class ToySource:
    """Batch n: random pairs of tokens, and a factor of the loss which is `poison[n]` where that is given."""

    vocab_size, example_size, description = VOCABULARY, LENGTH, "toy"

    def __init__(self, poison=None, seed=0):
        self.poison, self.seed, self.asked = poison or {}, seed, []

    def batch(self, split, n, batch_size, rows=slice(None)):
        if split == "train":
            self.asked.append(n)
        tokens = np.random.default_rng([self.seed, split == "train", n]).integers(VOCABULARY, size=(batch_size, LENGTH))
        factor = self.poison.get(n, 1.0) if split == "train" else 1.0
        batch = {"tokens": tokens, "targets": (tokens * 2 + 1) % VOCABULARY}
        batch = {name: array.astype(np.int32)[rows] for name, array in batch.items()}
        return batch | {"factor": np.full(batch_size, factor, np.float32)[rows]}


class ToyTask:
    """A table from each token to the next: cross-entropy, times the factor."""

    unit, units_per_example = "tokens", LENGTH

    def __init__(self, source=None):
        self.source = source or ToySource()

    @property
    def data_identity(self):
        return {"vocabulary": "toy"}

    def init(self, key):
        return {
            "wte": {"embedding": jax.random.normal(key, (VOCABULARY, VOCABULARY))},
            "ln_f": {"bias": jnp.zeros(VOCABULARY)},
        }

    def loss(self, params, batch, key=None):
        logits = params["wte"]["embedding"][batch["tokens"]] + params["ln_f"]["bias"]
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
        return (loss * batch["factor"][:, None]).sum(), jnp.float32(loss.size), {}

    def evaluation(self, params, batch, key):
        return {"loss": self.loss(params, batch)[:2]}

    def show(self, params):
        return Samples.of_texts(["a sample"])

    def scores(self, params):
        return {}
