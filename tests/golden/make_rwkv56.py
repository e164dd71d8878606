"""Makes rwkv56_tiny.npz: logits, states, loss and every gradient of RWKV-5.0, 5.1, 5.2 and 6 as the `rwkv` package has them.

  python tests/golden/make_rwkv56.py     (needs torch and rwkv; the tests that read the file do not)

The package runs models and does not train: its layers are called here one by one, with weights that want gradients. That
this gives the logits and states of its own `forward`, from a .pth with the weights, is asserted. Weights come from NumPy's
RandomState, whose stream is frozen, so the file holds results alone.
"""

import functools
import pathlib
import tempfile

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("rwkv56_tiny.npz")
V, T, L, D, N, F, B = 37, 21, 2, 16, 8, 24, 2
H, MIX, DECAY = D // N, 3, 5
VARIANTS = ("5.0", "5.1", "5.2", "6")
batch = functools.partial(golden_file.batch, V, B, T)


def weights(variant: str) -> dict[str, np.ndarray]:
    """Official name -> fp32 array; far larger than a fresh model's, so that every path matters."""
    draw = golden_file.drawing(VARIANTS.index(variant))
    named = {"emb.weight": draw(0.7, V, D), "head.weight": draw(0.7 * D**-0.5, V, D)}

    def norm(name):
        named[f"{name}.weight"], named[f"{name}.bias"] = 1 + draw(0.2, D), draw(0.2, D)

    norm("ln_out")
    for i in range(L):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        for name in ("ln1", "ln2", "att.ln_x", *(["ln0"] if i == 0 else [])):
            norm(f"blocks.{i}.{name}")
        kind = "time_maa" if variant == "6" else "time_mix"
        for name in {"5.0": "kvr", "6": "xwkvrg"}.get(variant, "kvrg"):
            named[f"{att}{kind}_{name}"] = 0.5 + draw(0.3, 1, 1, D)
        for name in "kr":
            named[f"{ffn}{kind}_{name}"] = 0.5 + draw(0.3, 1, 1, D)
        of_heads = {"5.0": (H,), "5.1": (H,)}.get(variant, (H, N))
        named[att + "time_decay"] = draw(1, *((1, 1, D) if variant == "6" else of_heads)) - 1
        named[att + ("time_first" if variant == "5.0" else "time_faaaa")] = draw(0.7, *of_heads)
        if variant == "6":
            named |= {att + "time_maa_w1": draw(D**-0.5, D, 5 * MIX), att + "time_maa_w2": draw(0.2, 5, MIX, D)}
            named |= {att + "time_decay_w1": draw(D**-0.5, D, DECAY), att + "time_decay_w2": draw(0.2, DECAY, D)}
        for name in ("receptance", "key", "value", "output", *(["gate"] if variant != "5.0" else [])):
            named[f"{att}{name}.weight"] = draw(D**-0.5, D, D)
        named |= {ffn + "key.weight": draw(D**-0.5, F, D), ffn + "value.weight": draw(F**-0.5, D, F)}
        named[ffn + "receptance.weight"] = draw(D**-0.5, D, D)
    return named


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "logits", "loss" (mean over the targets), "state/I.J" after each row, and "grad/NAME" for every parameter."""
    cls = golden_file.rwkv_package()
    import torch

    w = {name: torch.tensor(x, requires_grad=True) for name, x in weights(variant).items()}
    tokens, targets = (torch.tensor(x).long() for x in batch().values())
    logits, states = zip(*(_forward(cls, variant, w, row) for row in tokens), strict=True)
    logits = torch.stack(logits)
    _assert_as_the_package_has_it(w, tokens[0], logits[0], states[0])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    found = {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    stacked = [torch.stack(rows).detach().numpy() for rows in zip(*states, strict=True)]
    found |= {f"state/{i}": x for i, x in enumerate(stacked)}
    return found | {f"grad/{name}": x.grad.numpy() for name, x in w.items()}


def _forward(cls, variant, w, tokens_T):
    """Logits, and the package's state: of each layer the last token of att, S (keys x values), the last token of ffn."""
    import torch

    norm = lambda name, x: torch.nn.functional.layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"])
    x, state, none = norm("blocks.0.ln0", w["emb.weight"][tokens_T]), [], torch.zeros(())
    att = {"5.0": cls.att_seq_v5, "5.1": cls.att_seq_v5_1, "5.2": cls.att_seq_v5_2, "6": cls.att_seq_v6_0}[variant]
    ffn = cls.ffn_seq_v6 if variant == "6" else cls.ffn_seq
    matrices = ["key", "value", "receptance", *(["gate"] if variant != "5.0" else []), "output"]
    vectors = [f"time_mix_{name}" for name in ("kvr" if variant == "5.0" else "kvrg")]
    if variant == "6":
        vectors = [f"time_maa_{name}" for name in (*"xwkvrg", "w1", "w2")] + ["time_decay_w1", "time_decay_w2"]
    for i in range(L):
        get = lambda name, i=i: w[f"blocks.{i}.{name}"]
        decay = get("att.time_decay").reshape(H, -1, 1)
        decay = decay if variant == "6" else torch.exp(-torch.exp(decay))
        bonus = get("att.time_first").exp() if variant == "5.0" else get("att.time_faaaa")
        arguments = [get(f"{name}.{end}") for name in ("ln1", "att.ln_x") for end in ("weight", "bias")]
        arguments += [get(f"att.{name}").squeeze() for name in vectors] + [decay, bonus.reshape(H, -1, 1)]
        arguments += [get(f"att.{name}.weight").t() for name in matrices] + [none] * 4 * len(matrices)
        x, att_D, s_HxNxN = att(None, x, torch.zeros(D), torch.zeros(H, N, N), *arguments)
        kind = "time_maa" if variant == "6" else "time_mix"
        arguments = [get("ln2.weight"), get("ln2.bias")] + [get(f"ffn.{kind}_{name}").squeeze() for name in "kr"]
        arguments += [get(f"ffn.{name}.weight").t() for name in ("key", "value", "receptance")] + [none] * 12
        x, ffn_D = ffn(None, x, torch.zeros(D), *arguments)
        state += [att_D, s_HxNxN, ffn_D]
    return norm("ln_out", x) @ w["head.weight"].t(), state


def _assert_as_the_package_has_it(w, tokens_T, logits_TxV, state):
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.save({name: x.detach().clone() for name, x in w.items()}, f"{folder}/tiny.pth")
        theirs, their_state = golden_file.rwkv_forward(f"{folder}/tiny.pth", tokens_T)
    for mine, other in zip([logits_TxV, *state], [theirs, *their_state], strict=True):
        torch.testing.assert_close(mine.detach(), other, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
