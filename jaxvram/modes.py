"""What launch.py can do with a recipe: one function a mode, `(recipe, workdir, options) -> exit status`."""

import dataclasses
import functools
import json
import pathlib
import sys
import time

import jax

from jaxvram.convert import converter, diffusers_lora, peft
from jaxvram.convert.packaged import locate
from jaxvram.errors import UserError
from jaxvram.finetune.weights import base_parameters, merged, one_by_one
from jaxvram.models import name_of
from jaxvram.tasks import TASK_OF, TASKS
from jaxvram.tasks.chat import chat
from jaxvram.train import metrics, report
from jaxvram.train.average import with_average
from jaxvram.train.checkpoint import Checkpoints, check_workdir, look, made_by
from jaxvram.train.evaluate import Evaluator
from jaxvram.train.loop import Loop
from jaxvram.train.partition import join
from jaxvram.train.program import make_program
from jaxvram.train.sharding import make_mesh


def make_task(recipe, with_data: bool = True):
    """The recipe's task; without data for a plan, which reads shapes alone."""
    if recipe.model.kernels == "auto" and jax.device_count() > 1:  # XLA can't divide a kernel of ours among devices
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, kernels="xla"))
    return TASKS[TASK_OF[name_of(recipe.model)]].of_recipe(recipe, with_data, _say)


def train(recipe, workdir: pathlib.Path, options) -> int:
    check_workdir(workdir, recipe)  # before the data: this error is cheaper
    task = make_task(recipe)
    task.check_samples()
    if jax.process_index() == 0:
        print(f"{recipe.name}:{recipe.variant} in {workdir} on {jax.devices()[0].device_kind}", flush=True)
        print(f"data: {task.source.description}", flush=True)
    resumes = look(workdir).step is not None
    init_params = load_frozen(recipe, task) if resumes else load_base(recipe, task)
    loop = Loop(recipe, task, workdir)
    if loop.writes:
        _plan_for_this_gpu(recipe, task, workdir)
    loop.run(init_params)
    if loop.interrupt.received:
        return 128 + loop.interrupt.received
    samples = task.show(loop.final_params)  # by all processes, of which each holds a part of the weights
    if loop.writes:
        print("\n" + samples.text, flush=True)
        print(f"\nrun folder: {workdir} (open {workdir / 'report.html'})", flush=True)
    return 0


def _plan_for_this_gpu(recipe, task, workdir: pathlib.Path) -> None:
    """Once a run folder, before the first step: the plan for the GPU that trains, for its report; a CPU needs none."""
    from jaxvram.vram import cards
    from jaxvram.vram import plan as planner

    card = cards.local_card()
    if card is None or (workdir / "plan.json").exists() or jax.device_count() > 1:
        return
    made = planner.make_plan(planner.programs(recipe, task), card, _say)
    planner.write(made, workdir)
    print(planner.text(made), flush=True)


def evaluate(recipe, workdir: pathlib.Path, options) -> int:
    """Loss of a checkpoint on the fixed batches, and its scores; a line for each, and one in metrics.jsonl's form."""
    task, params, step = load_checkpoint(recipe, workdir, options.checkpoint)
    cfg = recipe.train
    evaluator = Evaluator(task, recipe.eval, cfg.batch_size // cfg.microbatches, make_mesh(recipe.mesh))
    for split in ("train", "val") if recipe.eval.train_split else ("val",):
        scores = task.scores(params) if split == "val" else {}
        print(json.dumps({"step": step, "split": split, **evaluator(params, split), **scores}), flush=True)
    return 0


def sample(recipe, workdir: pathlib.Path, options) -> int:
    """What the recipe's sample section asks for, on the terminal and in samples/."""
    task, params, step = load_checkpoint(recipe, workdir, options.checkpoint, check=lambda task: task.check_samples())
    if getattr(recipe.sample, "chat", False):
        chat(task, params, sys.stdin, lambda text: print(text, end="", flush=True))
        return 0
    samples = task.show_on_request(params)
    print(samples.text)
    stem = f"asked_{step:06d}_{time.strftime('%Y%m%d-%H%M%S')}"
    for path in metrics.write_samples(workdir, stem, samples.files):
        if path.suffix != ".txt":  # a text has just been printed
            print(path)
    return 0


def export(recipe, workdir: pathlib.Path, options) -> int:
    """The checkpoint's weights as a folder that transformers or diffusers loads; of RWKV, a .pth of the authors' too."""
    if not options.out:
        raise UserError("--mode=export needs --out=DIR")
    source, is_official = converter(recipe.model), pathlib.Path(options.out).suffix == ".pth"
    if is_official and (options.adapter or not hasattr(source, "save_official")):
        what = "an adapter is" if options.adapter else f"{name_of(recipe.model)}'s weights are"
        raise UserError(f"--out={options.out}: {what} exported to a folder, --out=DIR; .pth is RWKV's own format")
    measures = hasattr(TASKS[TASK_OF[name_of(recipe.model)]], "measured")  # an autoencoder's scale is told by its data
    task, params, step = load_checkpoint(recipe, workdir, options.checkpoint, with_data=measures)
    if options.adapter:
        if hasattr(source, "lora_module"):
            diffusers_lora.save(params, recipe.model, recipe.finetune, options.out, recipe.train.init_from)
        else:
            peft.save(params, recipe.finetune, options.out, recipe.train.init_from)
        library = "diffusers" if hasattr(source, "lora_module") else "peft"
        print(f"what step {step} of {workdir} added, as a folder of {library}'s: {options.out}")
        return 0
    if recipe.finetune.adds:
        params = merged(task.model, params, task.example())
    if is_official:
        source.save_official(params, task.model.cfg, options.out)
        print(f"step {step} of {workdir} as an official checkpoint: {options.out}")
        return 0
    how = _storage(recipe, options, step) | (task.measured(params) if measures else {})
    source.save(params, task.model.cfg, options.out, **how)
    if pathlib.Path(options.out).is_file():
        print(f"step {step} of {workdir} as a GGUF file: {options.out}")
        return 0
    _add_companions(recipe.train.init_from, options.out)
    print(f"step {step} of {workdir} as a Hugging Face folder: {options.out}")
    return 0


def _storage(recipe, options, step: int) -> dict:
    """What --storage asks a converter for.

    Raises:
      UserError: the model has no ternary matrices, or has not come to have them yet.
    """
    kind = name_of(recipe.model)
    if kind != "bitnet":
        if options.storage or pathlib.Path(options.out).suffix == ".gguf":
            raise UserError(f"--storage and .gguf are for a bitnet's ternary matrices; this recipe's model is {kind!r}")
        return {}
    if options.storage != "latent" and step < recipe.model.anneal_steps:
        raise UserError(
            f"step {step} of model.anneal_steps={recipe.model.anneal_steps}: these weights are not trained as ternary ones "
            "yet; train on, or export them --storage=latent"
        )
    return {"storage": options.storage}


def _add_companions(weights: str, folder: str) -> None:
    """Tokenizer and special ids of the weights that a run began from; an export is one without them too."""
    from jaxvram.convert import companions  # reads GGUF, for which its package is loaded

    if not weights:
        return
    if not pathlib.Path(weights := locate(weights)).expanduser().exists():
        _say(f"train.init_from={weights} is not there any more: the export has neither its tokenizer nor its special ids")
        return
    companions.add(folder, weights)


def prepare(options) -> int:
    """Texts to token files; with --autoencoder, images to latents."""
    if not options.input or not options.out:
        raise UserError("--mode=prepare needs --input=FILE_OR_FOLDER and --out=DIR")
    if options.autoencoder:
        return _prepare_latents(options)
    from jaxvram.data.prepare import prepare as write_shards

    files = write_shards(
        options.input, options.out, options.tokenizer, options.shard_tokens, options.workers,
        vocab_path=options.vocab_path, layout=options.format,
    )  # fmt: skip
    print(f"{len(files)} file(s) in {options.out}; train on them with --config.data.path={options.out}")
    return 0


def _prepare_latents(options) -> int:
    from jaxvram.data.autoencoders import load_autoencoder
    from jaxvram.data.features import prepare_features
    from jaxvram.data.prepare_images import prepare_latents
    from jaxvram.data.text_encoders import load_text_encoder

    encoder = None  # loaded first: its errors are cheaper than the first pass
    if options.text_encoder:
        encoder = load_text_encoder(options.text_encoder, options.context_length)
    names = ("count", "held_out_pairs", "held_out_captions", "aspects")
    of = {name: getattr(options, name) or 0 for name in names} | {"font": options.font or ""}
    autoencoder = load_autoencoder(options.autoencoder)
    done = prepare_latents(options.input, options.out, autoencoder, options.image_size, **of)
    for line in done.skipped:
        _say(f"skipped {line}")
    for (height, width), images in done.shapes.items():
        _say(f"{images} images of {height}x{width} (height x width)")
    if encoder:
        where = str(pathlib.Path(options.text_encoder).expanduser().resolve())
        prepare_features(options.out, encoder, where, options.context_length)
    path = f"--config.data.name=latents --config.data.path={options.out}"
    print(f"{done.images} images in {done.shards} shard(s), {len(done.skipped)} skipped; train on them with {path}")
    return 0


def build(options) -> int:
    """Dense models as the experts of one, by a file that says which (jaxvram/upcycle.py)."""
    from jaxvram.upcycle import build_mixture

    if not options.input or not options.out:
        raise UserError("--mode=build needs --input=EXPERTS.toml and --out=DIR")
    for line in build_mixture(options.input, options.out):
        print(line)
    train = f"--config=configs/mixtral_upcycle.py --config.train.init_from={options.out}"
    print(f"a mixture in {options.out}; train its routers with {train}")
    return 0


def kernels(options) -> int:
    """The table of our kernels on a card."""
    from jaxvram.vram import kernel_table
    from jaxvram.vram import plan as planner

    print(kernel_table.text(planner.choose_card(options.card), _say))
    return 0


def load_checkpoint(recipe, workdir: pathlib.Path, kind: str, with_data: bool = True, check=lambda task: None):
    """(task, evaluated weights, step) of a run folder, or of `train.init_from` where there is no run yet.

    `check(task)` is called before any weights are on the card.
    """
    check_workdir(workdir, recipe)
    kinds = [kind for kind in (kind, "latest", "best") if look(workdir, kind).step is not None]
    if not kinds and not recipe.train.init_from:
        raise UserError(f"there is no checkpoint in {workdir}; train first, or set --workdir")
    if not with_data and getattr(recipe.model, "vocab_size", None) == 0 and (before := made_by(workdir)):
        vocab_size = before.get("data_identity", {}).get("vocab_size", 0)
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=vocab_size))
    task = make_task(recipe, with_data)
    if with_data:
        check_workdir(workdir, recipe, task.data_identity)
    check(task)
    mesh = make_mesh(recipe.mesh)
    if not kinds:
        return task, join(*make_program(recipe, task, mesh).parameters(load_base(recipe, task))), 0
    checkpoints = Checkpoints(workdir)
    program = make_program(recipe, task, mesh)
    target = program.target.replace(frozen=program.frozen(load_frozen(recipe, task)))
    weights, meta = checkpoints.restore_weights(kinds[0], with_average(recipe.train, target))
    checkpoints.close()
    return task, join(weights.get("ema", weights["params"]), target.frozen), meta["step"]


def load_base(recipe, task):
    """The parameters of `train.init_from`, on the host, and of `finetune.adapter_from`; None where there is none."""
    if not recipe.train.init_from:
        if recipe.finetune.adapter_from:
            raise UserError("finetune.adapter_from needs the weights that it was trained on: set train.init_from")
        return None
    base = _read_base(recipe, task)
    if recipe.finetune.adapter_from:
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        where, cfg = recipe.finetune.adapter_from, task.model.cfg
        is_denoiser = hasattr(converter(cfg), "lora_module")
        load = functools.partial(diffusers_lora.load, cfg=cfg) if is_denoiser else peft.load
        base = join(base, load(where, shapes, finetune=recipe.finetune))
    return base


def load_frozen(recipe, task):
    """What a checkpoint does not hold, on the host: the base of what is fine-tuned; None where there is none."""
    return _read_base(recipe, task) if recipe.train.init_from and recipe.finetune.method != "none" else None


def _read_base(recipe, task):
    source, cfg, path = converter(recipe.model), task.model.cfg, locate(recipe.train.init_from)
    if not recipe.finetune.adds:
        return source.load_params(path, cfg)
    if hasattr(source, "tensors"):
        return base_parameters(task.model, source.tensors(path, cfg), task.example())
    return base_parameters(task.model, one_by_one(source.load_params(path, cfg)), task.example())


def plan(recipe, workdir: pathlib.Path, options) -> int:
    """What init, train step and sampling need on a card, and whether they fit; plan.json and plan.png."""
    from jaxvram.vram import plan as planner

    card = planner.choose_card(options.card)
    made = planner.make_plan(planner.programs(recipe, make_task(recipe, with_data=False)), card, _say)
    command = f"python launch.py --config=configs/{recipe.name}.py:{recipe.variant} --mode=fit --card={card.name}"
    print(planner.text(made, command))
    for path in planner.write(made, workdir):
        print(path)
    if metrics.read(workdir):
        report.write_report(workdir)  # its page shows the plan
    return 0


def plan_encoders(options) -> int:
    """What encoding images and captions once needs on a card."""
    from jaxvram import plan_encoders as encoders

    return encoders.plan_encoders(options, _say)


def compare(recipe, workdir: pathlib.Path, options) -> int:
    """A train step beside PyTorch's: its memory planned, or both measured; or what fits at the most. compare*.json, .png."""
    from jaxvram.compare import measured, measured_table, picture, search, sides, table
    from jaxvram.vram import plan as planner

    make = lambda recipe: make_task(recipe, with_data=False)
    python = options.torch_python
    if options.measure:
        record = measured.compare(recipe, make(recipe), python, _say)
        said, stem = measured_table.text(record), "compare_measured"
        draw = picture.png if "usable_bytes" in record else None  # of a CPU there are no peaks to draw
    elif options.search:
        record = search.search(recipe, make, options.search, planner.choose_card(options.card), python, _say)
        said, draw, stem = search.text(record), picture.curve, f"compare_{options.search}"
    else:
        record = sides.compare(recipe, make(recipe), planner.choose_card(options.card), python, _say)
        said, draw, stem = table.text(record), picture.png, "compare"
    print(said)
    contents = {f"{stem}.json": json.dumps(record, indent=2).encode()}
    contents |= {f"{stem}.png": draw(record)} if draw else {}
    for path in planner.write_files(workdir, contents):
        print(path)
    return 0


def fit(recipe, workdir: pathlib.Path, options) -> int:
    """The fastest microbatch and remat that fit a card, and the overrides to paste."""
    from jaxvram.vram import fit as fitter
    from jaxvram.vram import plan as planner

    card = planner.choose_card(options.card)
    known = dataclasses.replace(recipe, model=make_task(recipe, with_data=False).model.cfg)  # the vocabulary: looked up once
    found = fitter.fit_recipe(known, lambda recipe: make_task(recipe, with_data=False), card, _say)
    print(fitter.text(found))
    return 0 if found.best else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
