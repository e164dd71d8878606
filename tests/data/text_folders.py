"""Folders of small text encoders with their tokenizers, as Hugging Face's libraries and ours write them."""

import json

import jax
import numpy as np
import safetensors.numpy
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from jaxvram.convert import text_encoder as convert
from jaxvram.data.caption_tokenizers import CLIP_SPLIT
from jaxvram.models.text_encoder import SmallTextConfig

CAPTIONS = ["A small Red   circle!!", "isn't it 2024?", "naïve Café\n日本語 🤗 ", "", "a<b & c <|endoftext|></s>"]
CORPUS = ["a red circle above a blue square", "a green triangle isn't beside the photo of a cat, 2024!", "naïve café 日本語"]
CLIP_VOCABULARY, T5_VOCABULARY = 600, 40
CLIP = {
    "model_type": "clip_text_model", "vocab_size": CLIP_VOCABULARY, "hidden_size": 12, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 50, "hidden_act": "quick_gelu",
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": T5_VOCABULARY + 100, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 3,
    "num_heads": 3, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def clip_tokenizer(folder):
    """vocab.json and merges.txt."""
    trained = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    split = pre_tokenizers.Split(tokenizers.Regex(CLIP_SPLIT), behavior="removed", invert=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    trained.train_from_iterator(CORPUS * 20, trainer)
    model = json.loads(trained.to_str())["model"]
    ends = [f"{byte}</w>" for byte in sorted(pre_tokenizers.ByteLevel.alphabet())]
    model["vocab"] |= {end: len(model["vocab"]) + i for i, end in enumerate(e for e in ends if e not in model["vocab"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    return folder


def t5_tokenizer(folder):
    """spiece.model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=T5_VOCABULARY, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    return folder


def random_weights(cfg, seed=0):
    """The tree inside of "params", none of it what it begins with."""
    tokens, random = np.zeros((1, 2), np.int32), np.random.RandomState(seed)
    shapes = jax.eval_shape(lambda: convert.MODULE_OF[type(cfg)](cfg).init(jax.random.key(0), tokens)["params"])
    return jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def model(folder, config, names, shards=1):
    """config.json and random weights of these `names` -> shapes, in one file or in several with their index."""
    random, folder_of = np.random.RandomState(0), {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in names.items()}
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        safetensors.numpy.save_file(part, folder / file)
        folder_of |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": folder_of}))
    return folder


def clip(folder, **options):
    E, F, V, S = (CLIP[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"))
    names = {"embeddings.token_embedding": (V, E), "embeddings.position_embedding": (S, E)}
    vectors = {"final_layer_norm": E}
    for i in range(CLIP["num_hidden_layers"]):
        layer = f"encoder.layers.{i}."
        projections = {f"{layer}self_attn.{name}": (E, E) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        mlp = {f"{layer}mlp.fc1": (F, E), f"{layer}mlp.fc2": (E, F)}
        names |= projections | mlp
        vectors |= {name: shape[0] for name, shape in (projections | mlp).items()}
        vectors |= {f"{layer}layer_norm1": E, f"{layer}layer_norm2": E}
    norms = [name for name in vectors if "norm" in name]
    shapes = {f"text_model.{name}.weight": shape for name, shape in (names | dict.fromkeys(norms, (E,))).items()}
    return model(folder, CLIP, shapes | {f"text_model.{name}.bias": (n,) for name, n in vectors.items()}, **options)


def t5(folder, **options):
    E, F, H, K = (T5[name] for name in ("d_model", "d_ff", "num_heads", "d_kv"))
    shapes = {"shared.weight": (T5["vocab_size"], E), "encoder.final_layer_norm.weight": (E,)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, H)
    for i in range(T5["num_layers"]):
        attention, mlp = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        shapes |= {f"{attention}SelfAttention.{name}.weight": (H * K, E) for name in "qkv"}
        shapes |= {f"{attention}SelfAttention.o.weight": (E, H * K), f"{mlp}DenseReluDense.wo.weight": (E, F)}
        shapes |= {f"{mlp}DenseReluDense.{name}.weight": (F, E) for name in ("wi_0", "wi_1")}
        shapes |= {f"{attention}layer_norm.weight": (E,), f"{mlp}layer_norm.weight": (E,)}
    return model(folder, T5, shapes, **options)


def small(folder, **fields):
    cfg = SmallTextConfig(**{"length": 50, "n_layer": 2, "n_head": 2, "n_embd": 8, "dtype": "float32"} | fields)
    convert.save(random_weights(cfg), cfg, folder)
    return folder
