"""`python real_step.py < request.json`: a step on the CPU, planned, and as PyTorch's allocator really gives it.

Prints {variant: [bytes that torch.profiler saw given, bytes planned]} as JSON, with the parameters. No tracker and no fake
tensor is there when the profiler looks.
"""

import json
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "jaxvram" / "compare" / "twin"))

import planned
import requested
import training


def peak_of_a_step(job) -> int:
    """What lies there already, and the most that a step adds to it."""
    job.step()  # makes the optimizer's state
    lying = training.tracked(job)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job.step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return sum(lying.values()) + peak


request = requested.parse(json.load(sys.stdin) | {"device": "cpu"})
variants = {name: requested.VARIANTS[name] for name in request.variants}
real = {name: peak_of_a_step(training.prepare(request, variant, fake=False)) for name, variant in variants.items()}
plans = {name: planned.plan(request, variant) for name, variant in variants.items()}  # after: it changes torch for good
peaks = {name: [real[name], plans[name][0]["peak_bytes"]] for name in variants}
print(json.dumps({"peaks": peaks, "parameters": plans[request.variants[0]][1]}))
