"""PyTorch's memory tracker, asked one thing more: who owns the bytes at the peak.

The tracker sees each storage come and go and adds up bytes, rounded to 512 on CUDA. This one writes the comings and goings
down and, when the work is over, replays them up to the peak. It does not see what a kernel takes and gives back within
itself, cuBLAS' workspaces, nor the gaps of the allocator: on a card PyTorch needs more than is said here, never less.
"""

import math

import torch
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType, _UpdateType

OWNERS = (
    "parameters", "frozen parameters", "gradients", "optimizer state", "weight average", "saved activations",
    "logits and loss", "workspace", "batch",
)  # fmt: skip


class Tracker(MemTracker):
    """As a context round train steps; `peak_bytes` and `owners()` are those since the last `restart`."""

    def __init__(self, device: str, rows: int = 0, vocab_size: int = 0):
        """Args:
        rows: of the logits, tokens of a microbatch; 0: a model without logits.
        vocab_size: their columns.
        """
        super().__init__()
        self._mod_tracker = _Backward()
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.rows, self.vocab_size = rows, vocab_size
        self.phase = "forward"  # forward | update: set by the train step; backward is seen
        self._owned = {}  # what a storage is, however it was made
        self._made = "workspace"  # owner of what the operation at hand makes
        self._log = []  # (storage's record, bytes from now on, owner)
        self._peak_at = 0  # entries of the log up to the peak
        self._hooks = []

    def own(self, owner: str, tensors) -> None:
        """These are `owner`'s, from now on and whenever the peak is."""
        for tensor in tensors:
            for record in self._update_and_maybe_create_winfos(tensor, _MemRefType.OTH):
                self._owned[record] = owner

    def follow_gradients(self, parameters) -> None:
        """A gradient is one from the moment it is whole, also before it is added to what earlier microbatches gave."""

        def mark(gradient) -> None:
            self._update_and_maybe_create_winfos(gradient, _MemRefType.GRAD)

        for parameter in parameters:
            self._hooks.append(parameter.register_hook(mark))
            self._hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: mark(p.grad)))

    def restart(self) -> None:
        """Forget the peak so far."""
        self._peak_at, self._peak_mem = len(self._log), {self.device: self._total()}

    @property
    def peak_bytes(self) -> int:
        """What the tracker itself added up, live storages on `device` at their most."""
        return self._peak_mem[self.device]

    def owners(self) -> dict[str, int]:
        """Bytes of each owner at the peak."""
        alive = {}
        for record, size, made in self._log[: self._peak_at]:
            alive[record] = (size, made)
        sums = dict.fromkeys(OWNERS, 0)
        for record, (size, made) in alive.items():
            sums[self._owned.get(record, made)] += size
        if sum(sums.values()) != self.peak_bytes:
            raise RuntimeError(f"{sum(sums.values())} bytes are owned at the peak, {self.peak_bytes} were counted")
        return sums

    def _total(self) -> int:
        return self._curr_mem_snap.get(self.device, {}).get("Total", 0)

    def _track(self, reftype, tensor) -> None:
        backward = self._mod_tracker.is_bw  # recomputed activations are made then too: they live for one block
        self._made = "saved activations" if self.phase == "forward" and not backward else "workspace"
        if self.vocab_size and tuple(tensor.shape[-1:]) == (self.vocab_size,):
            # Of whatever dtype. The loss may leave out the last token of each row.
            ratio = math.prod(tensor.shape[:-1]) / self.rows
            self._made = "logits and loss" if 0.5 <= ratio <= 1 and tensor.dim() > 1 else self._made
        super()._track(reftype, tensor)

    def _update_snap(self, u_type, winfo, old_mem_consumed=None, old_reftype=None) -> None:
        super()._update_snap(u_type, winfo, old_mem_consumed, old_reftype)
        if u_type == _UpdateType.ADD:
            winfo.made = self._made
        if winfo.device == self.device:
            size = 0 if u_type == _UpdateType.DEL else winfo.mem_consumed
            self._log.append((winfo, size, "gradients" if winfo.reftype == _MemRefType.GRAD else winfo.made))

    def _update_peak_stats(self, peak_state) -> None:
        if self._total() > self._peak_mem.get(self.device, 0):
            self._peak_mem[self.device], self._peak_at = self._total(), len(self._log)

    def __exit__(self, *args) -> None:
        super().__exit__(*args)
        for hook in self._hooks if self._depth == 0 else ():
            hook.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "bitsandbytes::gemm_4bit":
            # One kernel to fake tensors. On a card, over 1536 rows, it writes the matrix out in the compute dtype first.
            from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

            with self:
                return _gemm_4bit_default_impl(*args, **kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Backward:
    """In place of the tracker's hooks on every module, which count per module and take most of its time."""

    @property
    def is_bw(self) -> bool:
        return torch._C._current_graph_task_id() != -1

    def register_user_hooks(self, *hooks) -> None:
        pass

    def clear_user_hooks(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args) -> None:
        pass
