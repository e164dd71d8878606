"""What a run compiles, in one place: a loop runs these functions, a plan lowers the very same for a card elsewhere."""

import dataclasses
from collections.abc import Callable

import jax

from jaxvram.train.optimizer import make_optimizer
from jaxvram.train.sharding import shardings
from jaxvram.train.step import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Functions:
    """Not jitted, and of no mesh yet."""

    init: Callable  # () or (params,) -> TrainState
    step: Callable  # (state, batch) -> (state, metrics); the caller donates the state
    state: object  # TrainState of shapes


@dataclasses.dataclass
class Program:
    """The compiled parts of a run, and where its arrays live."""

    mesh: jax.sharding.Mesh
    target: object  # TrainState of shapes with shardings
    init: Callable  # jitted: () or (params,) -> TrainState
    step: Callable  # jitted: (state, batch) -> (state, metrics), the state donated


def make_functions(recipe, task) -> Functions:
    """The init and the train step of a recipe. Nothing runs and nothing is allocated here.

    Args:
      recipe: a Recipe; its optimizer and train sections are read.
      task: what is learnt (tasks/).
    """
    abstract_params = jax.eval_shape(task.init, jax.random.key(0))
    tx, schedule = make_optimizer(recipe.optimizer, abstract_params, recipe.train.steps)

    def init(params=None):
        return init_state(task, tx, recipe.train, params)

    step = make_train_step(task, tx, schedule, recipe.train, recipe.optimizer.stochastic_rounding)
    return Functions(init, step, jax.eval_shape(init))


def make_program(recipe, task, mesh) -> Program:
    """The same on a mesh: every array of the state has its home, by the rules of train/sharding.py."""
    functions = make_functions(recipe, task)
    homes = shardings(functions.state, mesh)
    target = jax.tree.map(lambda s, home: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=home), functions.state, homes)
    return Program(
        mesh=mesh,
        target=target,
        init=jax.jit(functions.init, out_shardings=homes),
        step=jax.jit(functions.step, donate_argnums=0, out_shardings=(homes, None)),
    )
