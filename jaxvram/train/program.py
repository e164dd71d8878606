"""What a run compiles, in one place: a loop runs these functions, a plan lowers the very same for a card elsewhere."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from flax import traverse_util

from jaxvram.train.optimizer import make_optimizer
from jaxvram.train.partition import divide
from jaxvram.train.sharding import check_experts, shardings
from jaxvram.train.step import init_params, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Functions:
    """Not jitted, and of no mesh yet."""

    params: Callable  # () -> (trained, frozen), from the seed
    start: Callable  # (trained, frozen) -> TrainState
    step: Callable  # (state, batch) -> (state, metrics); the caller donates the state
    divide: Callable  # params -> (trained, frozen)

    def init(self):
        """The state before step 0, from the seed."""
        return self.start(*self.params())

    def load(self, frozen):
        """The same with a frozen part from elsewhere."""
        return self.start(self.params()[0], frozen)


@dataclasses.dataclass
class Program:
    """The compiled parts of a run, and where its arrays live."""

    mesh: jax.sharding.Mesh
    target: object  # TrainState of shapes with shardings
    functions: Functions
    step: Callable  # jitted: (state, batch) -> (state, metrics), the state donated

    def init(self, params=None):
        """The state before step 0. `params`: as `parameters` has them; None: all from the seed."""
        if params is None:
            return self.fresh()
        trained, frozen = self.parameters(params)
        start, homes = functools.partial(self.functions.start, frozen={}), self._homes(self.target.replace(frozen={}))
        return jax.jit(start, out_shardings=homes, donate_argnums=0)(trained).replace(frozen=frozen)

    @functools.cached_property
    def fresh(self):
        """Jitted: () -> the state before step 0, all from the seed."""
        return jax.jit(self.functions.init, out_shardings=self._homes(self.target))

    def parameters(self, params):
        """(trained, frozen) on the devices.

        Args:
          params: arrays of the host; those that are not among them come from the seed.
        """
        return self._part(0, params), self._part(1, params)

    def frozen(self, params=None):
        """The frozen parameters alone, of `params` or from the seed."""
        return self._part(1, params or {})

    def _part(self, which: int, params):
        """What is trained (0) or frozen (1), with what `params` lack from the seed."""
        homes = traverse_util.flatten_dict(self._homes((self.target.params, self.target.frozen)[which]))
        given = traverse_util.flatten_dict(self.functions.divide(params)[which])
        lacking = {path: home for path, home in homes.items() if path not in given}

        def of_seed():
            flat = traverse_util.flatten_dict(self.functions.params()[which])
            return {path: flat[path] for path in lacking}

        fresh = jax.jit(of_seed, out_shardings=lacking)() if lacking else {}
        # Leaf by leaf and not through a compiled program, which would hold them twice.
        put = {path: jax.tree.map(jax.device_put, x, homes[path]) for path, x in given.items()}
        return traverse_util.unflatten_dict(fresh | put)

    @staticmethod
    def _homes(target):
        return jax.tree.map(lambda s: s.sharding, target)


def make_functions(recipe, task) -> Functions:
    """The init and the train step of a recipe. Nothing runs and nothing is allocated here.

    Args:
      recipe: a Recipe; its optimizer, train and finetune sections are read.
      task: what is learnt (tasks/).
    """
    divided = functools.partial(divide, is_trained=recipe.finetune.trains)
    params = lambda: divided(init_params(task, recipe.train))
    trained, _ = jax.eval_shape(params)
    tx, schedule = make_optimizer(recipe.optimizer, trained, recipe.train.steps)
    start = functools.partial(init_state, tx, recipe.train)
    step = make_train_step(task, tx, schedule, recipe.train, recipe.optimizer.stochastic_rounding)
    return Functions(params, start, step, divided)


def make_program(recipe, task, mesh) -> Program:
    """The same on a mesh: every array of the state has its home, by the rules of train/sharding.py."""
    check_experts(recipe.model, mesh)
    functions = make_functions(recipe, task)
    shapes = jax.eval_shape(functions.init)
    homes = shardings(shapes, mesh)
    target = jax.tree.map(lambda s, home: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=home), shapes, homes)
    step = jax.jit(functions.step, donate_argnums=0, out_shardings=(homes, None))
    return Program(mesh, target, functions, step)
