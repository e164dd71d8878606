"""`python real_step.py < request.json`: the bytes that PyTorch's allocator really gives in a step on the CPU, per variant.

No tracker is there: torch.profiler writes each allocation down. Prints {variant: bytes at the peak} as JSON.
"""

import json
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "jaxvram" / "compare" / "twin"))

import requested  # noqa: E402
import training  # noqa: E402
from tracker import Tracker  # noqa: E402


def peak_of_a_step(job) -> int:
    job.step()  # makes the optimizer's state
    lying = Tracker(job.device)
    training.track(job, lying)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return lying._total() + peak


request = requested.parse(json.load(sys.stdin) | {"device": "cpu"})
peaks = {}
for name in request.variants:
    peaks[name] = peak_of_a_step(training.prepare(request, requested.VARIANTS[name], fake=False))
print(json.dumps(peaks))
