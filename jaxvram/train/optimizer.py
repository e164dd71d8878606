"""Optimizers and schedules by name; weight decay, learning-rate multipliers and freezing by regex over parameter paths."""

import dataclasses
import re
from collections.abc import Mapping

import jax
import optax

from jaxvram.errors import UserError, nearest
from jaxvram.train.adam8bit import scale_by_adam_8bit


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    params: str  # regex that must match a whole path, e.g. '.*/(kernel|embedding)'
    weight_decay: float = 0.0  # decoupled, times the learning rate
    lr_multiplier: float = 1.0  # 0 freezes: no update and no optimizer state
    sign_rate: float = 0.0  # > 0: p -= this * sign(gradient), whatever optimizer and schedule the others have, not clipped


MATRICES_DECAY = {  # nanoGPT, llm.c: everything with two axes or more, tables included
    "decayed": ParamGroup(r".*(kernel|embedding)", weight_decay=0.1),
    "plain": ParamGroup(r".*(bias|scale|/A_log|/D)"),  # the last two: Mamba's
}
LINEAR_DECAY = {  # minGPT: the weights of linear layers alone
    "linear": ParamGroup(r".*kernel", weight_decay=0.1),
    "plain": ParamGroup(r".*(embedding|bias|scale)"),
}


SCHEDULES = ("cosine", "linear", "constant", "wsd", "two_stage")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"  # adamw | adamw_8bit | lion | adafactor (factored second moments) | adafactor_momentum (and a first)
    learning_rate: float = 6e-4  # peak
    schedule: str = "cosine"  # cosine | linear | constant | wsd (constant, then 1 - sqrt over the last part) | two_stage
    warmup_steps: int = 0  # from learning_rate / (warmup_steps + 1), linearly
    decay_steps: int = 0  # step at which the final rate is reached; 0: the last step
    final_lr_fraction: float = 0.1  # of the peak
    wsd_decay_fraction: float = 0.2  # of decay_steps, for wsd only
    second_peak_fraction: float = 2 / 3  # two_stage: the peak, of the first, of the line that it goes on from halfway
    weight_decay_until: float = 1.0  # part of decay_steps after which no weight decays
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # of the global gradient norm; 0: none
    mu_dtype: str = "float32"  # of the first moment: float32 | bfloat16; adamw_8bit has its own
    stochastic_rounding: bool = False  # of weights in bf16, which else stay where they are at small updates
    groups: Mapping[str, ParamGroup] = dataclasses.field(default_factory=lambda: dict(MATRICES_DECAY))

    def __post_init__(self):
        for field, valid in (
            ("name", ("adamw", "adamw_8bit", "lion", "adafactor", "adafactor_momentum")),
            ("schedule", SCHEDULES),
            ("mu_dtype", ("float32", "bfloat16")),
        ):
            if (value := getattr(self, field)) not in valid:
                raise UserError(f"optimizer.{field}={value!r} is unknown{nearest(value, valid)}")
        if min(self.learning_rate, self.warmup_steps, self.decay_steps, self.clip_norm, self.eps) < 0:
            raise UserError(
                "optimizer: learning_rate, warmup_steps, decay_steps, clip_norm and eps must not be negative"
            )
        if reserved := {"trained", "frozen"} & {name for name, group in self.groups.items() if group.sign_rate}:
            raise UserError(f"optimizer.groups.{reserved.pop()} has a sign_rate: give it another name")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise UserError("optimizer: b1 and b2 must be in [0, 1)")
        for field in ("final_lr_fraction", "wsd_decay_fraction", "second_peak_fraction", "weight_decay_until"):
            if not 0 <= (value := getattr(self, field)) <= 1:
                raise UserError(f"optimizer.{field}={value} is not in [0, 1]")


def make_schedule(cfg: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates made so far (nanoGPT's get_lr, llm.c's wsd).

    two_stage is BitNet b1.58's: up to half of decay_steps the line from the peak to the final rate at the last step, then
    that from a lower peak, so that the rate falls by a step halfway.
    """
    peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_lr_fraction
    end = cfg.decay_steps or total_steps
    span = max(end - cfg.warmup_steps, 1)
    if cfg.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, span, alpha=cfg.final_lr_fraction)
    elif cfg.schedule == "linear":
        main = optax.linear_schedule(peak, final, span)
    elif cfg.schedule == "two_stage":
        lines = [optax.linear_schedule(top, final, span) for top in (peak, cfg.second_peak_fraction * peak)]
        halfway = end // 2 - cfg.warmup_steps
        main = lambda step: jax.numpy.where(step < halfway, *(line(step) for line in lines))
    elif cfg.schedule == "constant":
        main = optax.constant_schedule(peak)
    else:  # wsd
        decay = max(round(end * cfg.wsd_decay_fraction), 1)
        start = max(span - decay, 0)

        def main(step):
            progress = jax.numpy.clip((step - start) / decay, 0, 1)
            return final + (peak - final) * (1 - jax.numpy.sqrt(progress))

    if cfg.warmup_steps == 0:
        return main
    warmup = optax.linear_schedule(peak / (cfg.warmup_steps + 1), peak, cfg.warmup_steps)
    return optax.join_schedules([warmup, main], [cfg.warmup_steps])


def make_optimizer(cfg: OptimizerConfig, params, total_steps: int):
    """(optax transformation, schedule) for a tree of parameters or of their shapes."""
    if cfg.stochastic_rounding and all(p.dtype != jax.numpy.bfloat16 for p in jax.tree.leaves(params)):
        raise UserError(
            "optimizer.stochastic_rounding is for weights in bfloat16, and here are none; set model.param_dtype=bfloat16"
        )
    schedule = make_schedule(cfg, total_steps)
    label_of = group_labels(cfg.groups, params)
    groups = cfg.groups

    def decay_and_multiply(updates, params, decays=1):
        def of_leaf(g, u, p):
            # Not `0 * p`: XLA merges that zero with those in which gradients begin, and then holds them to the end.
            u = u + decays * groups[g].weight_decay * p if groups[g].weight_decay else u
            return u if groups[g].lr_multiplier == 1 else groups[g].lr_multiplier * u

        return jax.tree.map(of_leaf, label_of, updates, params)

    decay = optax.stateless(decay_and_multiply)
    if cfg.weight_decay_until < 1:
        decay = _of_step(decay_and_multiply, round(cfg.weight_decay_until * (cfg.decay_steps or total_steps)))
    clip = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm > 0 else []
    tx = optax.chain(*clip, _direction(cfg), decay, optax.scale_by_learning_rate(schedule))
    fates = {name: _fate(name, group) for name, group in groups.items()}
    if set(fates.values()) != {"trained"}:
        fate = jax.tree.map(fates.get, label_of)
        # Outside of `partition`, so that the other leaves are masked from the decay above as well.
        label_of = jax.tree.map(lambda g, f: g if f == "trained" else optax.MaskedNode(), label_of, fate)
        by_sign = {name: _by_sign(group.sign_rate) for name, group in groups.items() if group.sign_rate}
        tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()} | by_sign, fate)
    return tx, schedule


def _fate(name: str, group: ParamGroup) -> str:
    """The part of the optimizer that a group belongs to; with a rule of its own, its name."""
    return name if group.sign_rate else "trained" if group.lr_multiplier else "frozen"


def _by_sign(rate: float) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: jax.tree.map(lambda g: -rate * jax.numpy.sign(g), updates))


def _of_step(decay_and_multiply, last: int) -> optax.GradientTransformation:
    """What decays up to the update of that number, and counts them."""

    def update(updates, count, params):
        decays = (count.count < last).astype(jax.numpy.float32)
        return decay_and_multiply(updates, params, decays), optax.ScaleByScheduleState(count.count + 1)

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jax.numpy.zeros((), "int32")), update)


def _direction(cfg: OptimizerConfig) -> optax.GradientTransformation:
    if cfg.name == "adamw":
        return _in_fp32(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=cfg.mu_dtype))
    if cfg.name == "adamw_8bit":
        return scale_by_adam_8bit(cfg.b1, cfg.b2, cfg.eps)
    if cfg.name == "lion":
        return optax.scale_by_lion(cfg.b1, cfg.b2, mu_dtype=cfg.mu_dtype)
    # Shazeer & Stern 2018, arXiv:1804.04235, with an explicit rate; with a first moment as in Zhai et al. 2021, 2106.04560
    adafactor = [_in_fp32(optax.scale_by_factored_rms()), optax.clip_by_block_rms(1.0)]
    if cfg.name == "adafactor_momentum":
        adafactor.append(optax.ema(cfg.b1, accumulator_dtype=cfg.mu_dtype))
    return optax.chain(*adafactor)


def _in_fp32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Optax keeps second moments in the dtype of weights: in bf16 a thousandth of a new square is lost, and they stay."""
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jax.numpy.float32), tree)
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jax.numpy.float32), tree)
    update = lambda updates, state, params: tx.update(wide(updates), state, shapes(params))  # no weight is read
    return optax.GradientTransformation(lambda params: tx.init(wide(params)), update)


def group_labels(groups: Mapping[str, ParamGroup], params):
    """The name of its group for every leaf.

    Raises:
      UserError: a path matches no group or several, a group matches no path, or a regex does not compile.
    """
    matched = set()

    def label(path, _):
        name = path_name(path)
        found = [g for g, regex in regexes.items() if regex.fullmatch(name)]
        if len(found) != 1:
            which = "no optimizer group" if not found else f"the optimizer groups {' and '.join(found)}"
            raise UserError(f"parameter {name} is in {which}; each must be in exactly one (optimizer.groups.*.params)")
        matched.add(found[0])
        return found[0]

    regexes = {g: _compile(g, group.params) for g, group in groups.items()}
    labels = jax.tree_util.tree_map_with_path(label, params)
    if idle := sorted(groups.keys() - matched):
        raise UserError(f"no parameter is in the optimizer group(s) {', '.join(idle)}; correct optimizer.groups.*.params")
    return labels


def _compile(group: str, regex: str) -> re.Pattern:
    try:
        return re.compile(regex)
    except re.error as error:
        raise UserError(f"optimizer.groups.{group}.params={regex!r} is no regular expression: {error}") from error


def path_name(path) -> str:
    """A tree path as 'h/attn/c_attn/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
