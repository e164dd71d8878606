"""BitNet's twin: transformers' models whose layers' products are its AutoBitLinear, which rounds as it trains.

By itself transformers' BitNetForCausalLM has plain linear layers. b1.58's norms within every product are AutoBitLinear's
own, in a Llama whose layers have lost theirs. transformers has the rounding compiled; a plan follows it operation by
operation, which needs more for a moment, far from the peak.
"""

from torch import nn

PARTS = {"q_proj": "attention_bias", "k_proj": "attention_bias", "v_proj": "attention_bias", "o_proj": "attention_bias"}
PARTS |= {"gate_proj": "mlp_bias", "up_proj": "mlp_bias", "down_proj": "mlp_bias"}  # -> whether it has a bias


def bitnet(transformers, f: dict, llama):
    """(config, what makes the model of it).

    Args:
      llama: our fields -> (LlamaConfig, LlamaForCausalLM, ...), which say all but the norms.
    """
    config, of, *_ = llama(transformers, f)
    if f["norms"] == "subln":
        config = transformers.BitNetConfig(
            vocab_size=config.vocab_size, max_position_embeddings=config.max_position_embeddings,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads, hidden_size=config.hidden_size, head_dim=config.head_dim,
            intermediate_size=config.intermediate_size, rope_parameters=config.rope_parameters,
            rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=config.tie_word_embeddings,
            attention_bias=config.attention_bias, initializer_range=config.initializer_range, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
        of = transformers.BitNetForCausalLM
    config.hidden_act = f["activation"]
    return config, lambda config: _rounding(of(config), f)


def _rounding(model, f: dict):
    """The model with an AutoBitLinear for every matrix of a layer."""
    from transformers.integrations.bitnet import AutoBitLinear

    inside = f["norms"] == "inside"
    options = {"online_quant": True, "use_rms_norm": inside, "rms_norm_eps": f["norm_eps"]}
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if last in PARTS:
            sizes, bias = (module.in_features, module.out_features), f[PARTS[last]]
            model.set_submodule(name, AutoBitLinear(*sizes, bias=bias, **options))
        elif inside and last.endswith("layernorm"):
            model.set_submodule(name, nn.Identity())
    return model
