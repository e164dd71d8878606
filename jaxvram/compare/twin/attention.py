"""The attention that a GPU would choose, chosen by hand: on fake tensors nobody asks the card what it can do."""

import torch
import torch.nn.functional as F

_composite = F.scaled_dot_product_attention


def route() -> None:
    """From now on, scaled_dot_product_attention on CUDA tensors is the kernel that PyTorch would pick on an Ada card."""
    F.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention = _routed


def _routed(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if query.device.type != "cuda":
        return _composite(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):  # it casts the composite operation, which is passed over here
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    aten, width = torch.ops.aten, query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if attn_mask is None and query.dtype != torch.float32:
        # The kernel reads shared keys and values where they are, and wants widths in multiples of 8.
        query, key, value = (F.pad(x, (0, -width % 8)) if width % 8 else x for x in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out[..., :width]
    if enable_gqa and query.shape[1] != key.shape[1]:  # no other kernel shares heads: copies of them
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if width % 4 == 0:
        arguments = (query, key, value, attn_mask, True, dropout_p, is_causal)
        return aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]
    return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
