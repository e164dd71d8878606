"""Who owns the memory at the peak of a compiled program.

Arguments and results lie in memory for the whole run. Everything else shares one heap, and XLA writes down when each of
its buffers is taken and given back: replaying that list finds the moment with the most bytes alive, which made the heap as
large as it is. Every buffer alive then is traced to the operation that filled it, and so to a line of Python. What the
heap is larger than those buffers is shown as gaps: the compiler could not pack better.

A buffer that is handed on (a loop's carry, an update in place) keeps its memory while many operations write to it; its
name and line are those of the last one that put something new into it, not of the zeros it started from.
"""

import collections
import dataclasses
import pathlib
import re

import jaxvram
from jaxvram.vram import hlo
from jaxvram.vram.compile import Compiled

OWNERS = {  # in the order of the picture, with the rule that decides
    "parameters": "arguments or results under params/",
    "frozen parameters": "arguments or results under frozen/: those that are not trained",
    "weight average": "arguments or results under ema/",
    "optimizer state": "arguments or results under opt_state/",
    "gradients": "made by the program with the shape and dtype of a parameter, or of one layer of it",
    "parameter copies": "a parameter cast to another dtype for its matrix products",
    "saved activations": "made by the forward pass, alive at the peak",
    "logits and loss": "made inside the cross-entropy",
    "cache": "carried by the loops of a program without gradients: what a model remembers while it writes",
    "workspace": "whatever else is computed: the backward pass, recomputation, updates",
    "batch": "what goes in: tokens, targets, prompts",
    "other": "metrics, counters, random keys, constants, the text that comes out",
    "gaps": "room between buffers that the compiler could not use",
}
TOPS = {
    "params": "parameters",
    "frozen": "frozen parameters",
    "ema": "weight average",
    "opt_state": "optimizer state",
    "batch": "batch",
    "prompt": "batch",
}
PACKAGE = pathlib.Path(jaxvram.__file__).parent
# Operations by which a loop takes slices and puts them back: what they move was made elsewhere.
PLUMBING = re.compile(r"dynamic_(update_)?index_in_dim|/(closed_call|eval_jaxpr|body)$")


@dataclasses.dataclass(frozen=True)
class Buffer:
    name: str  # a path in the arguments or results, or the operation: 'h/mlp/c_fc/dot_general (backward)'
    bytes: int
    shape: str  # 'f32[12,768,3072]'
    source: str  # 'jaxvram/layers/mlp.py:31', or 'argument'
    owner: str  # one of OWNERS


@dataclasses.dataclass(frozen=True)
class Bill:
    compiled: Compiled
    buffers: tuple[Buffer, ...]  # alive at the peak, largest first

    @property
    def owners(self) -> dict[str, int]:
        """Bytes at the peak of each owner that has some; they add up to `compiled.peak_bytes`."""
        sums = collections.Counter()
        for buffer in self.buffers:
            sums[buffer.owner] += buffer.bytes
        sums["gaps"] = self.compiled.peak_bytes - sum(sums.values())
        return {owner: sums[owner] for owner in OWNERS if sums[owner]}

    def largest(self, count: int = 12) -> list[dict]:
        return [dataclasses.asdict(buffer) for buffer in self.buffers[:count]]


def make_bill(compiled: Compiled) -> Bill:
    module = compiled.module
    reader = _Reader(module)
    buffers = [*reader.arguments(), *reader.results(compiled.output_paths)]
    buffers += [reader.temporary(values) for values in alive_at_peak(module)]
    constants = sum(a.bytes for a in module.allocations if a.is_constant)
    buffers.append(Buffer("constants", constants, "", "", "other"))
    return Bill(compiled, tuple(sorted((b for b in buffers if b.bytes), key=lambda b: (-b.bytes, b.name))))


def alive_at_peak(module: hlo.Module) -> list[list[hlo.Value]]:
    """The buffers of the heap when it is fullest, each as the values that lie in it, in order of their making."""
    in_heap = {
        value
        for a in module.allocations
        if a.parameter is None and not (a.is_output or a.is_constant or a.is_thread_local)
        for value in a.values
    }
    fullest = []
    for events in module.traces:
        home, members, alive, used, most, at_most = {}, {}, {}, 0, 0, ()
        for kind, value, other in events:
            if value not in in_heap:
                continue
            if kind == hlo.FREE:
                buffer = home[value]
                alive[buffer] -= 1
                used -= module.values[buffer].bytes if alive[buffer] == 0 else 0
                continue
            home[value] = buffer = value if kind == hlo.ALLOC else home[other]
            members.setdefault(buffer, []).append(module.values[value])
            used += module.values[buffer].bytes if not alive.get(buffer) else 0
            alive[buffer] = alive.get(buffer, 0) + 1
            if used > most:
                most, at_most = used, tuple(b for b, count in alive.items() if count)
        fullest += [members[buffer] for buffer in at_most]
    return fullest


class _Reader:
    """Names, lines and owners of the buffers of one module."""

    def __init__(self, module: hlo.Module):
        self.module = module
        entry = (i for i in module.instructions.values() if i.computation == module.entry and i.opcode == "parameter")
        self.argument_of = {i.parameter: (path_of(i.op_name or i.name), i.shape) for i in entry}
        self.differentiates = any("transpose(" in i.op_name for i in module.instructions.values())

    def arguments(self) -> list[Buffer]:
        buffers = []
        for allocation in self.module.allocations:
            if allocation.parameter in self.argument_of:
                path, shape = self.argument_of[allocation.parameter]
                buffers.append(Buffer(path, allocation.bytes, str(shape), "argument", _owner_of(path)))
        return buffers

    def results(self, paths: tuple[str, ...]) -> list[Buffer]:
        """Results that take no argument's place."""
        module, root = self.module, self.module.instructions[self.module.roots[self.module.entry]]
        value_at = {(v.instruction, v.index): v.id for v in module.values.values()}
        number_of = {}  # value -> which result it is
        for number, operand in enumerate(root.operands if root.opcode == "tuple" else [root.id]):
            number_of[value_at.get(self._through(module.instructions[operand]))] = number
        buffers = []
        for allocation in module.allocations:
            if allocation.parameter is not None or not allocation.is_output:
                continue
            values = [module.values[v] for v in allocation.values if v in number_of]  # not what lay there before
            number = number_of[values[0].id] if values else None
            if number is None or number >= len(paths):  # the table of pointers to the others
                buffers.append(Buffer("table of results", allocation.bytes, "", "", "other"))
                continue
            path = path_of(paths[number]) or "result"
            origin, source = self._best(values)
            if origin.opcode in ("broadcast", "constant"):  # XLA makes equal zeros once, under the name of any of them
                source = ""
            buffers.append(Buffer(path, allocation.bytes, str(root.shape.at((number,))), source, _owner_of(path)))
        return buffers

    def temporary(self, values: list[hlo.Value]) -> Buffer:
        origin, source = self._best(values)
        last = values[-1]
        shape = self.module.instructions[last.instruction].shape.at(last.index)
        owner = self._owner(values, origin, shape)
        name, phase = path_of_operation(origin.op_name) or origin.name, phase_of(origin.op_name)
        if owner == "gradients" and (weight := self._weight(shape, name)):
            name, phase = f"gradient of {weight}", ""
        if owner == "parameter copies" and (weight := self._weight(origin.shape, name, same_dtype=False)):
            name = f"copy of {weight}"
        return Buffer(f"{name} ({phase})" if phase else name, values[0].bytes, str(shape), source, owner)

    def _owner(self, values, origin, shape) -> str:
        weight, phase = self._weight(shape), phase_of(origin.op_name)
        if weight and self.differentiates and phase not in ("forward", "recomputed"):
            return "gradients"
        # By the shape of what was cast: the copy itself may be padded or transposed for a matrix product.
        if self._weight(origin.shape, same_dtype=False) and "convert" in origin.op_name + origin.opcode:
            return "parameter copies"
        carried = any(self.module.instructions[v.instruction].opcode == "while" for v in values)
        if carried and not self.differentiates:
            return "cache"
        frame = self._frame(origin)
        if frame and (frame.function.endswith(".loss") or "cross_entropy" in frame.file):
            return "logits and loss"
        return "saved activations" if phase == "forward" else "workspace"

    def _weight(self, shape: hlo.Shape, hint: str = "", same_dtype: bool = True) -> str:
        """The parameter that has that shape, or a layer of which has.

        Of several: whose path shares most with `hint`, the path of an operation; then whose axes have that very order.
        """
        dims = _any_order(shape.dims)  # a gradient may be computed transposed
        if len(dims) < 2:  # too many vectors have the shape of a bias
            return ""
        shared = lambda path: len({*path.split("/")} & {*hint.split("/")})
        paths = [
            (shared(path), shape.dims in (weight.dims, weight.dims[1:]), path)
            for path, weight in self.argument_of.values()
            if path.startswith("params/")
            and dims in (_any_order(weight.dims), _any_order(weight.dims[1:]))
            and (shape.dtype == weight.dtype) == same_dtype
        ]
        return max(paths)[-1] if paths else ""

    def _best(self, values) -> tuple[hlo.Instruction, str]:
        """The instruction that best says what lies in a buffer, and its line."""
        origins = [self._origin(v) for v in values]
        tells = lambda i: (bool(i.op_name), i.opcode not in ("while", "broadcast", "parameter", "tuple", "constant"))
        best = max(reversed(origins), key=tells)
        frames = (self._frame(i) for i in [best, *reversed(origins)])
        return best, next((_line(frame) for frame in frames if frame), "")

    def _through(self, instruction, index=()) -> tuple[int, tuple[int, ...]]:
        """Where a value that is only handed on was made."""
        while instruction.opcode in ("get-tuple-element", "bitcast") or (instruction.opcode == "tuple" and index):
            operand = 0
            if instruction.opcode == "get-tuple-element":
                index = (instruction.element, *index)
            elif instruction.opcode == "tuple":
                operand, index = index[0], index[1:]
            instruction = self.module.instructions[instruction.operands[operand]]
        return instruction.id, index

    def _origin(self, value: hlo.Value) -> hlo.Instruction:
        """The operation that made the numbers in `value`: through fusions, copies and updates in place to what is new."""
        instruction, index, callers = self.module.instructions[value.instruction], value.index, []
        first = instruction  # with a name of its own, if nothing better comes
        for _ in range(100):
            if not first.op_name or first.shape.parts:  # the name of a fusion with several results is that of one
                first = instruction
            if instruction.opcode == "fusion":
                callers.append(instruction)
                instruction = self.module.instructions[self.module.roots[instruction.calls[0]]]
                continue
            operand = 0
            if instruction.opcode == "parameter" and callers:
                operand, instruction = instruction.parameter, callers.pop()
            elif instruction.opcode == "tuple" and index:
                operand, index = index[0], index[1:]
            elif instruction.opcode == "get-tuple-element":
                index = (instruction.element, *index)
            elif instruction.opcode == "dynamic-update-slice":
                operand = 1
            elif instruction.op_name and not PLUMBING.search(instruction.op_name):
                return instruction
            if operand >= len(instruction.operands) or instruction.opcode in ("while", "call", "conditional"):
                return first
            instruction = self.module.instructions[instruction.operands[operand]]
        return first

    def _stack(self, instruction) -> list[hlo.Frame]:
        """Lines of Python that led to an operation, innermost first."""
        frames, at = [], instruction.frame
        while at in self.module.frames:
            frames.append(self.module.frames[at])
            at = frames[-1].parent
        return frames

    def _frame(self, instruction) -> hlo.Frame | None:
        """The innermost line of ours, else of whoever is no installed library, else of anyone."""
        frames = [f for f in self._stack(instruction) if not f.file.startswith(f"{PACKAGE}/vram/")]
        ours = (f for f in frames if f.file.startswith(f"{PACKAGE}/"))
        users = (f for f in frames if "-packages/" not in f.file)
        return next(ours, None) or next(users, None) or next(iter(frames), None)


def _line(frame: hlo.Frame) -> str:
    ours = frame.file.startswith(f"{PACKAGE}/")
    file = pathlib.Path(frame.file)
    return f"{file.relative_to(PACKAGE.parent) if ours else file.name}:{frame.line}"


def path_of(keystr: str) -> str:
    """A path with slashes of one that JAX writes: "state.params['h']['kernel']" -> params/h/kernel."""
    parts = re.findall(r"[\w-]+", keystr)
    return "/".join(parts[1:] if len(parts) > 1 and parts[0] == "state" else parts)


def path_of_operation(op_name: str) -> str:
    """The names that models gave: 'jit(f)/transpose(jvp(GPT2))/while/body/h/mlp/dot_general' -> h/mlp/dot_general."""
    loops = {"while", "body", "cond", "closed_call", "eval_jaxpr", "checkpoint", "rematted_computation"}
    parts = [part for part in op_name.split("/") if part and "(" not in part and "._" not in part and part not in loops]
    if len(parts) > 1 and parts[-1] == "dynamic_update_slice":  # a loop that keeps what it carries
        parts.pop()
    return "/".join(parts) or op_name.split("/")[-1]


def phase_of(op_name: str) -> str:
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else ""


def _owner_of(path: str) -> str:
    return TOPS.get(path.split("/")[0], "other")


def _any_order(dims) -> tuple[int, ...]:
    return tuple(sorted(d for d in dims if d != 1))
