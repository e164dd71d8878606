"""--mode=plan without a recipe: what encoding a data set once needs on a card, each encoder alone on it."""

import pathlib

from jaxvram.convert import text_encoder
from jaxvram.data import autoencoders, text_encoders
from jaxvram.errors import UserError
from jaxvram.vram import plan as planner
from jaxvram.vram.plan import Program

RUN = "runs/encoders"  # where plan.json and plan.png go without --workdir


def plan_encoders(options, say) -> int:
    """Prints the plan of what --autoencoder and --text_encoder name; of a folder, its config.json is enough.

    Raises:
      UserError: a folder is not that of such an encoder, or a size that it cannot encode.
    """
    card, programs = planner.choose_card(options.card), {}
    if options.autoencoder == "random":
        raise UserError("--autoencoder=random runs on the processor and needs no memory of a card: name a folder")
    if options.autoencoder:
        found = autoencoders.programs(options.autoencoder, options.image_size)
        programs |= {name: Program(*parts) for name, parts in found.items()}
    if options.text_encoder:
        encoder = text_encoder.find(options.text_encoder)
        found = text_encoders.programs(encoder, options.context_length)
        programs |= {name: Program(*parts) for name, parts in found.items()}
    made = planner.make_plan(programs, card, say)
    print(planner.text(made))
    if options.text_encoder and "layer" in made:
        layers, states = encoder.cfg.n_layer, text_encoders.CHUNK_BYTES / 2**30
        print(
            f"\nlayer: one of {layers}, and the next that is read meanwhile. Up to {states:.0f} GiB of hidden states wait "
            "in the host's memory; each layer is read once for as many captions as they hold."
        )
    for path in planner.write(made, pathlib.Path(options.workdir or RUN)):
        print(path)
    return 0
