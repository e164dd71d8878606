"""transformers' selective scan, for a plan: what its loop over tokens would allocate, without two million fake operations.

The loop makes, for each token, a state in fp32 and a copy of it in the compute dtype, and the backward pass needs them all.
Going back, each token's part of two gradients is a whole array of zeros but for a slice, added to the sum so far.
"""

import torch
import torch.nn.functional as F


class _Loop(torch.autograd.Function):
    """(A, u: B x E x T x N; C: B x T x N) -> B x E x T."""

    @staticmethod
    def forward(ctx, A, u, C, dtype):
        T, states = A.shape[2], torch.empty_like(A)
        ctx.save_for_backward(A, states, states.to(dtype) if dtype != states.dtype else states, C)
        ctx.of_u = u.dtype
        return torch.empty((*A.shape[:2], T), dtype=dtype, device=A.device)

    @staticmethod
    def backward(ctx, gradient):
        A, states, copies, C = ctx.saved_tensors  # all named: recomputed ones would else be gone
        of_A, of_C = torch.zeros_like(A), torch.zeros_like(C)
        of_u = torch.zeros(A.shape, dtype=ctx.of_u, device=A.device)
        torch.zeros_like(A)  # the next token's part of either
        del states, copies
        return of_A, of_u, of_C, None


def selective_scan(hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, **kwargs):
    """As transformers 5.23's mamba_selective_scan, line by line, but for the loop. Training alone: no last state."""
    dt = dt + delta_bias.to(dt.dtype)[..., None]
    dt = F.softplus(dt)
    B, C = B.transpose(1, 2), C.transpose(1, 2)
    discrete_A = torch.exp(A[None, :, None, :] * dt[:, :, :, None])
    discrete_B = dt[:, :, :, None] * B[:, None, :, :].float()
    deltaB_u = discrete_B * hidden_states[:, :, :, None].float()
    outputs = torch.empty_like(hidden_states)  # a row for each token, in a list that lives as long as this call
    scan_output = _Loop.apply(discrete_A, deltaB_u, C, hidden_states.dtype)
    scan_output = scan_output + hidden_states * D[None, :, None]
    scan_output = scan_output * F.silu(z)
    del outputs
    return scan_output


def route(model: dict) -> None:
    """From now on, MambaMixer's scan is this one."""
    from transformers.models.mamba import modeling_mamba

    modeling_mamba.mamba_selective_scan = selective_scan
