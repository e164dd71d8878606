"""The twin of a mixture of experts: transformers' Mixtral, with the products of experts that it chooses by itself.

That is `grouped_mm`: each token's row once for each of its experts, sorted by them, and one product of torch's. Autocast
does not reach it, so matrices in fp32 are multiplied in fp32. (`eager` looks who was chosen, in numbers that a plan has not;
`batched_mm` copies the matrices of an expert for each token.)
"""

import torch

ACTIVATIONS = {"swish": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}  # ours -> transformers'


def mixtral(transformers, f: dict, llama):
    """(config, class). What Mixtral has not, the asking side has refused.

    Args:
      llama: our fields -> (LlamaConfig, ...), which says all but the experts.
    """
    like = llama(transformers, f)[0]
    config = transformers.MixtralConfig(
        vocab_size=like.vocab_size, max_position_embeddings=like.max_position_embeddings,
        hidden_act=ACTIVATIONS[f["activation"]],
        num_hidden_layers=like.num_hidden_layers, num_attention_heads=like.num_attention_heads,
        num_key_value_heads=like.num_key_value_heads, hidden_size=like.hidden_size, head_dim=like.head_dim,
        intermediate_size=like.intermediate_size, rope_parameters=like.rope_parameters, rms_norm_eps=like.rms_norm_eps,
        tie_word_embeddings=like.tie_word_embeddings, initializer_range=like.initializer_range,
        num_local_experts=f["n_expert"], num_experts_per_tok=f["n_expert_per_token"], router_jitter_noise=f["router_jitter"],
        output_router_logits=f["balance_loss"] > 0, router_aux_loss_coef=f["balance_loss"],
    )  # fmt: skip
    return config, transformers.MixtralForCausalLM


def routers_alone(model) -> None:
    """Only routers are trained, and those in fp32."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("mlp.gate.weight"))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def route(model: dict) -> None:
    """From now on a fake grouped product may be of any dtype, as a true one: its fake was written for bf16 alone."""
    from torch import _meta_registrations as fakes

    def result(a, b, scale_a, scale_b, offs=None, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
        return fakes._create_grouped_mm_output_tensor(a, b, offs, out_dtype)

    fakes._meta_grouped_mm_common = result
    torch.cuda.get_device_capability = lambda device=None: (8, 9)  # transformers asks whether the card has such products
