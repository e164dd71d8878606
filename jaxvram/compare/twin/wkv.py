"""RWKV-4's recurrence on a GPU, for a plan: transformers calls a kernel of the Hub's, and here one that does nothing.

All that the kernel's work takes is allocated by RwkvLinearAttention, transformers' own. Without the package `kernels` a loop
over tokens runs instead, which needs more.
"""


class _Kernel:
    def __init__(self, context_length: int):
        self.max_seq_length = context_length
        self.forward = self.forward_bf16 = self.backward = self.backward_bf16 = lambda *tensors: None


def route(model: dict) -> None:
    """From now on, RwkvSelfAttention has loaded this kernel."""
    from transformers.models.rwkv import modeling_rwkv

    modeling_rwkv.rwkv_cuda_kernel = _Kernel(model["block_size"])
