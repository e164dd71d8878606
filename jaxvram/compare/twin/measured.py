"""Peak memory and time of train steps that run."""

import gc
import statistics
import sys
import time

import torch
import training
from planned import follow
from problems import Refused, TwinError
from tracker import Tracker


def check(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise TwinError(
            f"measuring needs a GPU and a PyTorch built for it; this is torch {torch.__version__}, which sees none "
            "(way=planned needs neither)"
        )


def measure(request, variant) -> tuple[dict, dict]:
    """(what the answer says of a variant, its parameters)."""
    _empty(request.device)
    try:
        job = training.prepare(request, variant, fake=False)
        if variant.compiled:
            job.twin.model.compile()
        return _run(job, request, variant), job.twin.counts()
    except torch.OutOfMemoryError as error:
        raise Refused(f"out of memory: {str(error).splitlines()[0]}") from error
    finally:
        job = None
        _empty(request.device)


def _run(job: training.Job, request, variant) -> dict:
    with _kernels(variant):
        for _ in range(request.warm_up):
            job.step()
        _wait(job.device)
        if job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(request.timed):
            start = time.perf_counter()
            job.step()
            _wait(job.device)
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if job.device == "cuda" else 0
        # No tracker looks into a compiled program: of that, what lies there between steps.
        owners = training.tracked(job) if variant.compiled else _owners(job)
    # A CPU's allocator counts nothing: there the peak is what the tracker saw of true tensors.
    peak = peak or sum(owners.values())
    owners["workspace"] += peak - sum(owners.values())  # and with it what the tracker does not see
    return {"peak_bytes": peak, "owners": owners, "seconds_per_step": statistics.median(seconds)}


def _owners(job: training.Job) -> dict:
    """Of one more step, under the tracker."""
    tracker = Tracker(job.device, job.rows * job.twin.tokens, job.twin.vocab_size)
    follow(job, tracker)
    return tracker.owners()


def _kernels(variant):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    flash = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]  # fp32 has the latter alone
    return sdpa_kernel(flash if variant.flash and torch.cuda.is_available() else [*flash, SDPBackend.MATH])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _empty(device: str) -> None:
    """Leave the card as it was, but for a few MiB; say so where that fails."""
    gc.collect()
    if device == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated()
        if left > 1 << 20:
            print(f"{left >> 20} MiB are still allocated between variants", file=sys.stderr)
