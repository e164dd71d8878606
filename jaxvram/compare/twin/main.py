"""The same train step in PyTorch: `python main.py < request.json > answer.json`, in any Python that has torch.

Request:
  way         planned (fake tensors and PyTorch's memory tracker; no GPU is needed) | measured (on a GPU)
  model       kind (of requested.py's KINDS) and the fields of its config in jaxvram/models
  finetune    null, or the fields of jaxvram/finetune/config.py's FinetuneConfig
  step        batch_size, microbatch_size (0: the whole), optimizer {name, learning_rate, b1, b2, eps, clip_norm}, ema
  variants    names of requested.py's VARIANTS
  device      cuda, unless it is given as cpu: a plan without the shim, a measurement whose peak is what was tracked
  warm_up, timed   measured: steps before, and steps of which the median time is told; 3 and 10 unless they are given
Answer:
  versions, device
  parameters  all, trained, difference (why ours are not as many; else empty), extra (theirs less ours)
  variants    name -> peak_bytes, owners (bytes at the peak; they add up to it), seconds_per_step when measured;
              or refused: one line why
Progress and warnings go to stderr. Status 2 and one line there: the request cannot be answered.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # `python -I` leaves it out

import requested
from problems import Refused, TwinError

LIBRARIES = (
    "torch", "transformers", "peft", "bitsandbytes", "diffusers", "accelerate", "mamba-ssm", "causal-conv1d", "torchscale",
    "rwkv7-hf",
)  # fmt: skip
OF_KIND = dict.fromkeys(requested.OF_IMAGES, ("diffusers",))
OF_KIND |= {"retnet": ("torchscale",), "rwkv7": ("transformers", "rwkv7-hf")}


def main() -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints, the answer alone is on stdout
    try:
        answer = answer_to(sys.stdin.read())
    except TwinError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with out:
        json.dump(answer, out, indent=1)
        out.write("\n")
    return 0


def answer_to(text: str) -> dict:
    try:
        request = requested.parse(json.loads(text))
    except json.JSONDecodeError as error:
        raise TwinError(f"the request is no JSON: {error}") from error
    for library in needed(request):
        if not version(library):
            raise TwinError(f"{sys.executable} has no {library}: {sys.executable} -m pip install {library}")
    work = _worker(request)
    answers, parameters = {}, None
    for name in request.variants:
        print(f"{request.way} {request.model['kind']} {name}", file=sys.stderr)
        try:
            answers[name], parameters = work(name)
        except Refused as refusal:
            answers[name] = {"refused": str(refusal)}
        except Exception as error:  # of a library, for this variant: the others may go on
            traceback.print_exc()
            answers[name] = {"refused": f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}"}
    versions = {"python": platform.python_version()} | {n: v for n in LIBRARIES if (v := version(n))}
    return {"versions": versions, "device": _device(request), "parameters": parameters, "variants": answers}


def needed(request) -> list[str]:
    """Libraries without which nothing can be answered."""
    names = ["torch", *OF_KIND.get(request.model["kind"], ("transformers",))]
    if request.finetune and request.finetune["method"] != "router":
        names.append("peft")
        names += ["bitsandbytes"] if request.finetune["base"] == "nf4" else []
    return names


def version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _worker(request):
    """name of a variant -> its part of the answer, and the parameters."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from numbers: nothing is fetched
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    if request.way == "planned":
        if request.device == "cuda":
            import fake_cuda

            fake_cuda.load()
        from planned import plan as run
    else:
        import measured

        measured.check(request.device)
        run = measured.measure

    def work(name: str):
        requested.check_variant(request, name)
        return run(request, requested.VARIANTS[name])

    return work


def _device(request) -> str:
    import torch

    if request.way == "planned":
        return f"none: fake tensors on {request.device}"
    return torch.cuda.get_device_name() if request.device == "cuda" else platform.processor() or "CPU"


if __name__ == "__main__":
    sys.exit(main())
