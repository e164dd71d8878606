"""Dense Llamas become one mixture: gates as told, experts in their places, and what cannot be merged is named."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
import quick
import tiny_llama

from jaxvram import upcycle
from jaxvram.convert import llama, moe
from jaxvram.errors import UserError
from jaxvram.models.llama import Llama
from jaxvram.models.moe import MoEConfig

CFG = tiny_llama.CFG
FIELDS = {field.name: getattr(CFG, field.name) for field in dataclasses.fields(CFG)}
encode = lambda text: [1, *(ord(letter) % CFG.vocab_size for letter in text)]
PROMPTS = (("abc", "def g"), ("xyz",))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two Llamas of equal shapes, and a wider one."""
    made, root = [], tmp_path_factory.mktemp("dense")
    for name, seed, cfg in (("a", 0, CFG), ("b", 1, CFG), ("wide", 2, dataclasses.replace(CFG, n_inner=80))):
        llama.save(tiny_llama.random_params(cfg, seed=seed), cfg, root / name)
        made.append(root / name)
    return made


def write(path, base, sources, prompts=PROMPTS, negative=(), **fields):
    lines = [f'base = "{base}"', *(f"{name} = {value!r}" for name, value in fields.items())]
    for source, positive in zip(sources, prompts, strict=True):
        lines += ["[[experts]]", f'source = "{source}"', f"positive_prompts = {list(positive)}"]
        lines += [f"negative_prompts = {list(negative)}"] if negative else []
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("gates", upcycle.GATES)
def test_the_mixture_has_its_parts_where_they_belong(gates, folders, tmp_path):
    a, b, _ = folders
    said = list(upcycle.build_mixture(write(tmp_path / "plan.toml", a, (b, a), gates=gates), tmp_path / "out", encode))
    assert said[0] == f"2 experts of 3 layers, 2 a token, gates: {gates}"
    params = moe.load_params(tmp_path / "out", MoEConfig(**FIELDS, n_expert=2))
    of_a, of_b = (llama.load_params(folder, CFG) for folder in (a, b))
    np.testing.assert_array_equal(params["layers"]["attn"]["q_proj"]["kernel"], of_a["layers"]["attn"]["q_proj"]["kernel"])
    for name in ("gate_proj", "up_proj", "down_proj"):
        kernel = params["layers"]["moe"]["experts"][name]["kernel"]
        np.testing.assert_array_equal(kernel[:, 0], of_b["layers"]["mlp"][name]["kernel"])
        np.testing.assert_array_equal(kernel[:, 1], of_a["layers"]["mlp"][name]["kernel"])
    router_LxDxE = params["layers"]["moe"]["router"]["kernel"]
    assert router_LxDxE.shape == (3, 32, 2)
    if not gates.endswith("random"):
        np.testing.assert_allclose(np.linalg.norm(router_LxDxE, axis=1), 1, rtol=1e-5)


def hidden_states_by_hand(params, prompt):
    """The stream before layer i at the last token: what comes to the last norm of a model of the first i layers."""
    streams, seen = [params["embed_tokens"]["embedding"][encode(prompt)[-1]]], []

    def watch(next_fun, args, kwargs, at):
        seen.extend(args[:1] if at.module.name == "norm" else ())
        return next_fun(*args, **kwargs)

    for i in range(1, CFG.n_layer):
        cut = params | {"layers": jax.tree.map(lambda x: x[:i], params["layers"])}  # noqa: B023
        with nn.intercept_methods(watch):
            Llama(dataclasses.replace(CFG, n_layer=i)).apply({"params": cut}, np.array([encode(prompt)]))
        streams.append(np.asarray(seen[-1])[0, -1])
    return np.stack(streams)


def test_hidden_gates_are_the_streams_of_prompts(folders):
    """Of prompts of different lengths, together; the mean of the positive ones less that of the negative."""
    params = llama.load_params(folders[0], CFG)
    by_hand = {prompt: hidden_states_by_hand(params, prompt) for prompt in ("abc", "def g", "no")}
    experts = (upcycle.Expert("", PROMPTS[0], ("no",)), upcycle.Expert("", PROMPTS[1]))
    plan = upcycle.Plan(str(folders[0]), experts)
    gates_LxExD = upcycle.make_gates(plan, CFG, encode)
    want = (by_hand["abc"] + by_hand["def g"]) / 2 - by_hand["no"]
    assert quick.relative_error(gates_LxExD[:, 0], want / np.linalg.norm(want, axis=-1, keepdims=True)) < 1e-5


def test_cheap_embeddings(folders):
    table = llama.load_params(folders[0], CFG)["embed_tokens"]["embedding"]
    experts = (upcycle.Expert("", ("ab", "c"), ("no",)), upcycle.Expert("", ("d",)))
    gates_LxExD = upcycle.make_gates(upcycle.Plan(str(folders[0]), experts, "cheap_embed"), CFG, encode)
    direction = lambda ids: table[ids].sum(0) / np.linalg.norm(table[ids].sum(0))
    want = direction(encode("ab") + encode("c")) - direction(encode("no"))
    for gate_D in gates_LxExD[:, 0]:
        np.testing.assert_allclose(gate_D, want, rtol=1e-4, atol=1e-6)


def test_models_of_different_shapes_are_not_merged(folders, tmp_path):
    a, _, wide = folders
    plan = write(tmp_path / "plan.toml", a, (a, wide), gates="random")
    message = r"wide cannot be an expert beside .*mlp\.gate_proj\.weight \(80, 32\), not \(64, 32\); .* and 6 more"
    with pytest.raises(UserError, match=message):
        list(upcycle.build_mixture(plan, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_gates_that_are_alike_are_told(folders, tmp_path):
    a, b, _ = folders
    plan = write(tmp_path / "plan.toml", a, (a, b), (("abcabcabcabc",), ("abcabcabcabcabc",)), gates="cheap_embed")
    said = list(upcycle.build_mixture(plan, tmp_path / "out", encode))
    assert len(said) == 2 and "are alike (condition number" in said[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = 'x'", r"needs base='FOLDER' and at least one \[\[experts\]\]"),
        ("base = 'x'\ngate = 'hidden'\n[[experts]]\nsource='x'\n", "gate is unknown; did you mean 'gates'"),
        ("base = 'x'\n[[experts]]\nsorce='x'\n", "expert 0 needs source='FOLDER'"),
        ("base = 'x'\n[[experts]]\nsource='x'\n", "experts_per_token=2 must be at least 1 and at most 1"),
        ("base = 'x'\nexperts_per_token=1\n[[experts]]\nsource='x'\n", "expert 0 has no positive_prompts"),
        ("base = 'x'\n" + "[[experts]]\nsource='x'\npositive_prompts=['a']\n" * 2, "experts 0 and 1 have the same positive"),
        ("base = 'x'\ngates='rnadom'\n" + "[[experts]]\nsource='x'\n" * 2, "'rnadom' is unknown; did you mean 'random'"),
        ("base = ", "is no TOML file"),
    ],
)
def test_a_plan_that_makes_no_sense(text, message, tmp_path):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        upcycle.read(tmp_path / "plan.toml")
