"""Peak memory of a train step of which nothing is executed: fake tensors, and PyTorch's own tracker."""

import importlib

import attention
import torch
import training
from requested import OF_IMAGES
from torch._subclasses.fake_tensor import FakeTensorMode
from tracker import Tracker

# What cannot be followed, by what it allocates: kind -> module
STOOD_IN = {"mamba": "scans", "rwkv4": "wkv", "rwkv7": "recurrences", "moe": "mixtures"}


def mend() -> None:
    """What stands in the way of libraries that meet fake tensors."""

    def apply(module, fn, recurse=True):
        """Module.to and its like, which would swap the insides of a parameter, and those of a fake one cannot be."""
        done = {}  # by identity: what is tied stays tied
        for part in module.modules() if recurse else [module]:
            for name, old in [*part._parameters.items(), *part._buffers.items()]:
                if old is None or (new := done.setdefault(id(old), fn(old))) is old:
                    continue
                if name in part._parameters and not isinstance(new, torch.nn.Parameter):
                    new = done[id(old)] = torch.nn.Parameter(new.detach(), requires_grad=old.requires_grad)
                (part._parameters if name in part._parameters else part._buffers)[name] = new
        return module

    torch.nn.Module._apply = apply


def unpacked() -> None:
    """transformers looks whether several texts share a row, in numbers that are not there, and then masks for both cases.

    On true tensors it finds one text a row, and leaves masking to the kernel.
    """
    from transformers import masking_utils

    if hasattr(masking_utils, "find_packed_sequence_indices"):
        masking_utils.find_packed_sequence_indices = lambda position_ids: None


def plan(request, variant) -> tuple[dict, dict]:
    """(what the answer says of a variant, its parameters), for the second step: the first makes the optimizer's state."""
    if request.device == "cuda":
        attention.route()
    kind = request.model["kind"]
    if kind not in (*OF_IMAGES, "retnet"):  # of transformers
        unpacked()
    if kind in STOOD_IN:
        importlib.import_module(STOOD_IN[kind]).route(request.model)
    mend()
    # Libraries hold small true tensors of their own; they weigh nothing.
    with FakeTensorMode(allow_non_fake_inputs=True):
        job = training.prepare(request, variant, fake=True)
        tracker = Tracker(request.device, job.rows * job.twin.tokens, job.twin.vocab_size)
        follow(job, tracker)
        return {"peak_bytes": tracker.peak_bytes, "owners": tracker.owners()}, job.twin.counts()


def follow(job: training.Job, tracker: Tracker) -> None:
    """Track one step. All that the step before would leave behind is the state of the optimizer."""
    for parameter in job.twin.trained:
        parameter.grad = torch.zeros_like(parameter)
    job.update()
    training.track(job, tracker)

    def enter(phase: str) -> None:
        tracker.phase = phase

    with tracker:
        tracker.follow_gradients(job.twin.trained)
        tracker.restart()
        job.step(enter, at_most=2)  # from the second on, gradients of those before are there: then all are alike
