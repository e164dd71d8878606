"""rwkv7_hf's recurrence, for a plan: what its loops over rows and tokens would allocate, without millions of operations.

For each token the loop makes a state in fp32 and, for three products, copies in the compute dtype of the state before, of
the removal a b^T and of the state after; the backward pass needs them all. Going back, each token's part of a gradient is a
whole array of zeros but for a slice, added to the sum so far.
"""

import torch


def _product_dtype(device: str):
    """What autocast makes of an operand of a matrix product; None: what it is."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _Loop(torch.autograd.Function):
    """(r, decay, k, a, b: B x T x H x K; v: B x T x H x N; the first state, mask) -> (y as v, the last state)."""

    @staticmethod
    def forward(ctx, r, decay, k, v, a, b, state, mask):
        (B, T, H, K), N = r.shape, v.shape[-1]
        of_product = _product_dtype(r.device.type)
        cast = lambda x: x if of_product in (None, x.dtype) else torch.empty_like(x, dtype=of_product)
        matrices = lambda tokens, dtype: torch.empty((B, tokens, H, N, K), dtype=dtype, device=r.device)
        # The first state learns nothing, so the first token keeps no removal; behind the last no state is kept.
        states, removals = matrices(T - 1, state.dtype), matrices(T - 1, of_product or a.dtype)
        before = matrices(T, of_product) if of_product not in (None, state.dtype) else states
        after = matrices(T, of_product or r.dtype)
        operands = [cast(x) for x in (r, k, v, a, b)]
        ctx.save_for_backward(decay, mask, states, removals, before, after, *operands)
        ctx.set_materialize_grads(False)
        ctx.like = [(x.shape, x.dtype) for x in (r, decay, k, v, a, b)]
        return torch.empty_like(v), torch.empty((B, H, K, N), dtype=state.dtype, device=r.device)

    @staticmethod
    def backward(ctx, gradient, of_last):
        saved = ctx.saved_tensors  # all: recomputed ones would else be gone
        sums = [torch.zeros(shape, dtype=dtype, device=gradient.device) for shape, dtype in ctx.like]
        torch.zeros_like(max(sums, key=lambda x: x.nbytes))  # the next token's part of either
        del saved
        return *sums, None, None


def recurrence(receptance, decay, key, value, a, b, initial_state, attention_mask=None):
    """As rwkv7_hf 0.9.0's rwkv7_recurrent, but for the loops."""
    rows = torch.empty_like(value)  # outputs of tokens, in lists that live until they are joined
    output, state = _Loop.apply(receptance, decay, key, value, a, b, initial_state, attention_mask)
    del rows
    return output, state


def shift(hidden_states, previous, attention_mask):
    """As rwkv7_hf's _masked_token_shift where nothing is masked; it looks for that in numbers that are not there."""
    return torch.cat((previous.unsqueeze(1), hidden_states[:, :-1]), dim=1), hidden_states[:, -1]


def route(model: dict) -> None:
    """From now on, RWKV7TimeMix's recurrence and token shift are these."""
    from rwkv7_hf import modeling_rwkv7

    modeling_rwkv7.rwkv7_recurrent = recurrence
    modeling_rwkv7._masked_token_shift = shift
