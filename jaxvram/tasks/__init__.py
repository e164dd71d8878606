"""What is learnt. A recipe's task says which sections of configuration it reads and makes itself from them.

A task has `unit` and `units_per_example` (for rates), `data_identity`, `batch_spec(batch_size)`, `init(key)`, `example()`
(what its model is called with), `loss(params, batch, key) -> (sum, weight, sums of metrics)`, `evaluation(params, batch,
key) -> {name: (sum, weight)}` with "loss" among them, `check_samples()`, `show(params)` and `show_on_request(params) ->
Samples`, `scores(params) -> {name: float}`, `sampling(params) -> (function, arguments)` for a plan; `SECTIONS`, the
dataclasses of its sections of a recipe; and `of_recipe`. One whose loss changes with time has `reads_step`: batches of
training then have a "step", as often as they have rows; those of an evaluation have none.
"""

from jaxvram.tasks.autoencoder import AutoencodingTask
from jaxvram.tasks.diffusion import DiffusionTask
from jaxvram.tasks.language import LanguageTask

TASKS = {"language": LanguageTask, "diffusion": DiffusionTask, "autoencoding": AutoencodingTask}
LANGUAGE_MODELS = ("gpt2", "llama", "bitnet", "mamba", "mamba2", "moe", "retnet", "rwkv4", "rwkv5", "rwkv6", "rwkv7")
TASK_OF = dict.fromkeys(LANGUAGE_MODELS, "language") | dict.fromkeys(("dit", "unet", "pixart"), "diffusion")  # by model
TASK_OF["autoencoder"] = "autoencoding"
