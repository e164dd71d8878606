"""What each recurrent model remembers: how much of a token is left in what the model says n tokens later.

  python benchmarks/remembers.py [--runs=FOLDER]    # of the models that recurrent_tiny.py trained; those it trains at need

For a held-out text of 512 tokens and a random direction u of the last hidden state h (after the norm): the gradient of u . h
with regard to the embedding of the token n places back, in units of that embedding's own size, has the length g(n); its root
mean square over u is the norm of a Jacobian. Drawn is g(n) / g(0), the geometric mean over TEXTS texts. GPT-2 has positions
for 64 tokens and no more; the others learnt from 64 and read on. Beside each name: the bytes that it carries along.
"""

import argparse
import itertools
import json
import pathlib

import numpy as np
from recurrent_runs import COLOURS, ROOT, built, finish, state_bytes
from recurrent_tiny import MODELS, RUNS, folder_of

TOKENS, TEXTS, DRAWS = 512, 32, 4
NEVER = 1e-9  # of g(0): below it fp32 has nothing to say
RESULT = ROOT / "benchmarks/results/remembers.json"


def texts(task, tokens: int) -> np.ndarray:
    """int32 (TEXTS, tokens): rows of the held-out text; longer ones than a batch has are put together from several."""
    context = task.model.cfg.block_size
    rows = task.source.batch("val", 0, TEXTS * TOKENS // context)["tokens"]
    return rows.reshape(TEXTS, TOKENS)[:, -tokens:]


def left_over(task, params, tokens: int) -> np.ndarray:
    """(tokens,): g(n) / g(0), n = 0 first."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from jaxvram.layers.embeddings import Embed

    model = task.model

    def said(delta_BxTxD, tokens_BxT, u_BxD):
        def shifted(call, args, kwargs, context):
            out, is_table = (
                call(*args, **kwargs),
                isinstance(context.module, Embed) and context.method_name == "__call__",
            )
            if not is_table or args[0].ndim != 2:  # a table of positions is asked for one axis of them
                return out
            return out + delta_BxTxD * jnp.sqrt(jnp.square(out).mean(-1, keepdims=True))

        with nn.intercept_methods(shifted):
            hidden_BxTxD, _ = model.apply({"params": params}, tokens_BxT)
        return (hidden_BxTxD[:, -1].astype(jnp.float32) * u_BxD).sum()

    gradient = jax.jit(jax.grad(said))
    tokens_BxT, D = texts(task, tokens), model.cfg.n_embd
    squares_BxT = 0.0
    for draw in range(DRAWS):
        u_BxD = np.random.default_rng(draw).normal(size=(TEXTS, D)).astype(np.float32)
        g_BxTxD = np.asarray(gradient(np.zeros((*tokens_BxT.shape, D), np.float32), tokens_BxT, u_BxD), np.float64)
        squares_BxT += np.square(g_BxTxD).sum(-1)[:, ::-1] / DRAWS
    left_BxT = np.sqrt(squares_BxT / squares_BxT[:, :1])
    return np.exp(np.log(np.maximum(left_BxT, NEVER)).mean(0))


def row_of(name: str, runs: pathlib.Path) -> dict:
    from jaxvram.modes import load_checkpoint

    finish(*MODELS[name], folder_of(name, runs))
    recipe = built(*MODELS[name])
    task, params, _ = load_checkpoint(recipe, folder_of(name, runs), "latest")
    tokens = min(task.model.context or TOKENS, TOKENS)
    left_T = left_over(task, params, tokens)
    return {"bytes_of_state": state_bytes(recipe.model, 64), "left": [float(f"{x:.4g}") for x in left_T]}


def smoothed(left: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """(n, left) of n >= 1: single tokens at first, then means of logarithms over widths that grow, as a log axis reads."""
    edges = np.unique(np.geomspace(1, len(left), 60).round().astype(int))
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]
    log = np.log(left)
    n = np.array([np.exp(np.log(np.arange(len(left))[piece]).mean()) for piece in pieces])
    return n, np.exp([log[piece].mean() for piece in pieces])


def draw(rows: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.6, 4.8), layout="constrained")
    for name, row in rows.items():
        kib = row["bytes_of_state"] / 1024
        label = f"{name}: {kib:.0f} KiB" if kib >= 10 else f"{name}: {kib:.1f} KiB"
        label += " after 64 tokens, growing" if name == "GPT-2" else ""
        style = {"color": COLOURS[name], "linestyle": "--" if name == "GPT-2" else "-"}
        axes.plot(*smoothed(row["left"]), label=label, linewidth=1.6, **style)
    axes.axvline(64, color="#999999", linewidth=1, linestyle=":")
    axes.annotate("trained on\n64 tokens", (64, 1), xytext=(4, -4), textcoords="offset points", va="top", fontsize=8)
    axes.set(xscale="log", yscale="log", xlim=(1, TOKENS), ylim=(1e-6, 1.5))
    axes.set_xticks([2**i for i in range(10)], [str(2**i) for i in range(10)])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="n, tokens back", ylabel="g(n) / g(0), the hidden state's gradient")
    axes.legend(title="carried along, per sequence", fontsize=9, loc="lower left")
    axes.grid(alpha=0.3, which="major")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=pathlib.Path, default=RUNS)
    parser.add_argument("--picture", type=pathlib.Path, default=ROOT / "docs/remembers.png")
    args = parser.parse_args()
    rows = {name: row_of(name, args.runs) for name in MODELS}
    RESULT.write_text(json.dumps({"tokens": TOKENS, "texts": TEXTS, "directions": DRAWS, "models": rows}) + "\n")
    draw(rows, args.picture)
    for name, row in rows.items():
        left = row["left"]
        places = " ".join(f"{n}: {left[n]:.2g}" for n in (1, 4, 16, 63, 255, 511) if n < len(left))
        print(f"{name}: {row['bytes_of_state']:,} bytes; left after {places}")


if __name__ == "__main__":
    main()
