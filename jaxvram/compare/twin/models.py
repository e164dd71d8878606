"""The twins: models that nobody here wrote, with the recipe's own numbers.

A twin is a model in training mode on the device, its loss, and what a batch of it looks like. Where it cannot have the
same parameters as ours, `difference` says so, and `extra` how many more it has.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import mixtures
import recurrent
import ternary
import torch
from requested import NO_FLASH, OF_IMAGES


@dataclasses.dataclass
class Twin:
    model: torch.nn.Module
    loss: Callable  # batch -> scalar
    batch: Callable  # rows -> {name: tensor on the device}, to be divided among microbatches
    tokens: int = 0  # of a row, whose logits the loss needs; 0: a model without logits
    vocab_size: int = 0
    difference: str = ""  # why theirs and ours do not have equally many parameters
    extra: int = 0  # theirs less ours
    held: list = dataclasses.field(default_factory=list)  # tensors that no parameter or buffer leads to
    packed: int = 0  # parameters less elements of the arrays that hold them

    @property
    def trained(self) -> list:
        return [p for p in self.model.parameters() if p.requires_grad]

    def counts(self) -> dict:
        every = sum(p.numel() for p in self.model.parameters()) + self.packed
        trained = sum(p.numel() for p in self.trained)
        return {"all": every, "trained": trained, "difference": self.difference, "extra": self.extra}


def build(model: dict, finetune: dict | None, variant, device: str, fake: bool) -> Twin:
    """The twin of a request's model for one variant.

    Args:
      fake: under FakeTensorMode, where nothing has a value.
    """
    kind = model["kind"]
    if kind in OF_IMAGES:
        import autoencoders
        import images

        twin = getattr(autoencoders if kind == "autoencoder" else images, kind)(model, variant, device)
    elif kind == "retnet":
        twin = _retnet(model, device)
    else:
        twin = _language_model(model, finetune, variant, device)
        if finetune and finetune["method"] == "router":
            mixtures.routers_alone(twin.model)
        elif finetune:
            from finetuning import fine_tuned

            twin = fine_tuned(twin, finetune, model, device, fake)
    twin.model.train()
    if variant.checkpoint:
        _checkpoint(kind, twin.model)
    return twin


def _checkpoint(kind: str, model) -> None:
    if kind in OF_IMAGES:
        model.enable_gradient_checkpointing()  # diffusers' does not re-enter
    elif kind == "retnet":
        recurrent.checkpoint_layers(model)
    else:
        name = "activation_checkpointing_enable"  # since transformers 5.20 or so; before, as below
        getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": False})


@contextlib.contextmanager
def made_in(dtype: str, device: str):
    """What is built inside has its parameters in that dtype, on that device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _language_model(fields: dict, finetune: dict | None, variant, device: str) -> Twin:
    import transformers

    describe = {
        "gpt2": _gpt2, "llama": _llama, "bitnet": _bitnet, "moe": _mixtral, "mamba": _mamba, "mamba2": _mamba2,
        "rwkv4": _rwkv4, "rwkv7": _rwkv7,
    }[fields["kind"]]  # fmt: skip
    config, of, difference, extra = describe(transformers, fields)
    config.use_cache = False  # else attention copies its keys and values for a sampler that never comes
    config._attn_implementation = "sdpa" if variant.flash and fields["kind"] not in NO_FLASH else "eager"
    with made_in(fields["param_dtype"], device):
        model = of(config)
    loss = lambda ids: model(input_ids=ids, labels=ids).loss  # no name keeps the logits alive
    if fields["kind"] == "rwkv7":
        loss = lambda ids: recurrent.rwkv7_loss(model, ids)
    return _of_tokens(model, loss, fields, device, difference, extra)


def _retnet(fields: dict, device: str) -> Twin:
    return _of_tokens(*recurrent.retnet(fields, device), fields, device)


def _of_tokens(model, loss, fields: dict, device: str, difference: str = "", extra: int = 0) -> Twin:
    """The twin of a language model, whose loss is of token ids (rows, T), inputs and targets in one."""
    extra_rows, why = _padding(fields)
    sentences = [s for s in (difference, why) if s]
    T, V = fields["block_size"], fields["vocab_size"]

    def batch(rows: int) -> dict:
        return {"input_ids": torch.randint(0, V, (rows, T), device=device)}

    return Twin(model, lambda b: loss(b["input_ids"]), batch, T, V, "; ".join(sentences), extra + extra_rows)


def _padding(fields: dict) -> tuple[int, str]:
    """Rows of the table (and of a head of its own) that only ours has."""
    V, multiple = fields["vocab_size"], fields["vocab_multiple"]
    rows = -(-V // multiple) * multiple
    if rows == V:
        return 0, ""
    fewer = (rows - V) * fields["n_embd"] * (1 if fields.get("tie_head") else 2)  # RWKV's is never tied
    return -fewer, f"ours pads the vocabulary of {V} to {rows} rows, a multiple of {multiple}"


def _gpt2(transformers, f: dict):
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), f["dropout"])
    config = transformers.GPT2Config(
        vocab_size=f["vocab_size"], n_positions=f["block_size"], n_embd=f["n_embd"], n_layer=f["n_layer"],
        n_head=f["n_head"], activation_function="gelu_new" if f["activation"] == "gelu_tanh" else "gelu",
        tie_word_embeddings=f["tie_head"], bos_token_id=0, eos_token_id=0, **dropouts,
    )  # fmt: skip
    difference, extra = "", 0
    if not f["bias"]:  # 3 D + D + 4 D + D in a layer's matrices, D in each norm
        extra = f["n_embd"] * (11 * f["n_layer"] + 1)
        difference = "transformers' GPT-2 has biases, ours none"
    return config, transformers.GPT2LMHeadModel, difference, extra


def _llama(transformers, f: dict):
    rope, context = {"rope_type": "default", "rope_theta": f["rope_theta"]}, f["block_size"]
    if f["rope_factor"] != 1:
        rope |= {"rope_type": "llama3", "factor": f["rope_factor"], "low_freq_factor": f["rope_low_freq_factor"]}
        rope |= {"high_freq_factor": f["rope_high_freq_factor"]}
        rope |= {"original_max_position_embeddings": f["rope_original_context"]}
        context = int(f["rope_factor"] * f["rope_original_context"])
    config = transformers.LlamaConfig(
        vocab_size=f["vocab_size"], max_position_embeddings=context, num_hidden_layers=f["n_layer"],
        num_attention_heads=f["n_head"], num_key_value_heads=f["n_kv_head"], hidden_size=f["n_embd"],
        head_dim=f["head_dim"] or f["n_embd"] // f["n_head"], intermediate_size=f["n_inner"], rope_parameters=rope,
        rms_norm_eps=f["norm_eps"], tie_word_embeddings=f["tie_head"], attention_bias=f["attention_bias"],
        mlp_bias=f["mlp_bias"], initializer_range=f["init_std"],
    )  # fmt: skip
    return config, transformers.LlamaForCausalLM, "", 0


def _bitnet(transformers, f: dict):
    return *ternary.bitnet(transformers, f, _llama), "", 0


def _mixtral(transformers, f: dict):
    return *mixtures.mixtral(transformers, f, _llama), "", 0


def _state_space(f: dict) -> dict:
    return {
        "vocab_size": f["vocab_size"], "hidden_size": f["n_embd"], "state_size": f["d_state"], "expand": f["expand"],
        "num_hidden_layers": f["n_layer"], "conv_kernel": f["d_conv"], "tie_word_embeddings": f["tie_head"],
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


def _mamba(transformers, f: dict):
    config = transformers.MambaConfig(**_state_space(f), time_step_rank=f["dt_rank"] or "auto")
    return config, transformers.MambaForCausalLM, "", 0


def _mamba2(transformers, f: dict):
    heads = f["expand"] * f["n_embd"] // f["head_dim"]
    config = transformers.Mamba2Config(
        **_state_space(f), head_dim=f["head_dim"], num_heads=heads, n_groups=f["n_groups"]
    )
    return config, transformers.Mamba2ForCausalLM, "", 0


def _rwkv4(transformers, f: dict):
    config = transformers.RwkvConfig(
        vocab_size=f["vocab_size"], context_length=f["block_size"], hidden_size=f["n_embd"], tie_word_embeddings=False,
        num_hidden_layers=f["n_layer"], intermediate_size=f["d_ffn"] or 4 * f["n_embd"], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return config, transformers.RwkvForCausalLM, "", 0


def _rwkv7(_, f: dict):
    return *recurrent.rwkv7(f), "", 0
