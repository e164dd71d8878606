"""Reads what XLA writes about a compiled program: its HLO, and which buffer lies where, from when to when.

XLA dumps a `HloProto` (xla/service/hlo.proto). No Python package carries that schema, so the few fields used here are read
from the wire format by number; protobuf never renumbers a field, which makes this steadier than parsing the text dumps.
"""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str  # f32, bf16, ...; 'tuple'
    dims: tuple[int, ...]
    parts: tuple["Shape", ...] = ()

    def at(self, index: tuple[int, ...]) -> "Shape":
        return self.parts[index[0]].at(index[1:]) if index and self.parts else self

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    id: int
    name: str
    opcode: str
    shape: Shape
    op_name: str  # where in the traced program it comes from: 'jit(f)/jvp(Model)/h/mlp/dot_general'
    frame: int  # into Module.frames; 0: unknown
    operands: tuple[int, ...]
    calls: tuple[int, ...]  # computations
    computation: int
    parameter: int  # its number, of an opcode 'parameter'
    element: int  # which one, of an opcode 'get-tuple-element'


@dataclasses.dataclass(frozen=True)
class Frame:
    """A line of Python that was on the stack when the operation was traced."""

    file: str
    function: str
    line: int
    parent: int


@dataclasses.dataclass(frozen=True)
class Value:
    """An array (or the pointers of a tuple) that one instruction makes: output `index` of it."""

    id: int
    bytes: int
    instruction: int
    index: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Allocation:
    index: int
    bytes: int
    parameter: int | None  # its number, if it is an argument of the program
    is_output: bool
    is_constant: bool
    is_thread_local: bool  # registers, in effect: not part of the device's bill
    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Module:
    instructions: dict[int, Instruction]
    roots: dict[int, int]  # computation -> its root instruction
    entry: int  # computation
    frames: dict[int, Frame]
    values: dict[int, Value]
    positions: dict[int, list[tuple[int, tuple[int, ...]]]]  # value -> (instruction, index) wherever it shows
    allocations: tuple[Allocation, ...]
    traces: tuple[tuple[tuple[int, int, int], ...], ...]  # of (ALLOC | FREE | SHARE, value, value it shares with)


ALLOC, FREE, SHARE = 0, 1, 2
DTYPES = {
    1: "pred", 2: "s8", 3: "s16", 4: "s32", 5: "s64", 6: "u8", 7: "u16", 8: "u32", 9: "u64", 10: "f16", 11: "f32", 12: "f64",
    13: "tuple", 15: "c64", 16: "bf16", 17: "token", 18: "c128", 19: "f8e5m2", 20: "f8e4m3fn", 21: "s4", 22: "u4", 26: "s2",
    27: "u2",
}  # fmt: skip


def read(proto: bytes) -> Module:
    """The module and buffer assignment in a dumped `HloProto`."""
    top = dict(_fields(proto))
    module, assignment = _group(top[1]), _group(top[3])
    instructions, roots = {}, {}
    for computation in map(_group, module[3]):
        key = computation[5][0]
        roots[key] = computation[6][0]
        for raw in computation.get(2, []):
            instruction = _instruction(_group(raw), key)
            instructions[instruction.id] = instruction
    values = {v.id: v for v in (_value(_group(raw)) for raw in assignment.get(1, []))}
    positions = {v.id: [(v.instruction, v.index)] for v in values.values()}
    for alias in map(_group, assignment.get(2, [])):
        location = _group(alias[2][0])
        where = (location.get(4, [0])[0], tuple(_packed(location.get(3))))
        positions[alias.get(1, [0])[0]].append(where)
    return Module(
        instructions,
        roots,
        module[6][0],
        _frames(module.get(17, [b""])[0]),
        values,
        positions,
        tuple(_allocation(_group(raw)) for raw in assignment.get(3, [])),
        tuple(_trace(_group(raw)) for raw in assignment.get(4, [])),
    )


def _instruction(raw, computation) -> Instruction:
    metadata = _group(raw[7][0]) if 7 in raw else {}
    return Instruction(
        id=raw[35][0],
        name=raw[1][0].decode(),
        opcode=raw[2][0].decode(),
        shape=_shape(raw[3][0]),
        op_name=metadata.get(2, [b""])[0].decode(),
        frame=metadata.get(15, [0])[0],
        operands=tuple(_packed(raw.get(36))),
        calls=tuple(_packed(raw.get(38))),
        computation=computation,
        parameter=raw.get(9, [0])[0],
        element=raw.get(13, [0])[0],
    )


def _shape(proto: bytes) -> Shape:
    raw = _group(proto)
    element = raw.get(2, [0])[0]
    return Shape(DTYPES.get(element, f"type{element}"), tuple(_packed(raw.get(3))), tuple(map(_shape, raw.get(4, []))))


def _value(raw) -> Value:
    location = _group(raw[3][0])
    return Value(raw.get(1, [0])[0], raw.get(2, [0])[0], location.get(4, [0])[0], tuple(_packed(location.get(3))))


def _allocation(raw) -> Allocation:
    return Allocation(
        index=raw.get(1, [0])[0],
        bytes=raw.get(2, [0])[0],
        parameter=raw.get(6, [0])[0] if 5 in raw else None,
        is_output=7 in raw,
        is_constant=12 in raw,
        is_thread_local=3 in raw,
        values=tuple(_group(assigned).get(1, [0])[0] for assigned in raw.get(9, [])),
    )


def _trace(raw):
    events = map(_group, raw.get(1, []))
    return tuple((e.get(1, [0])[0], e.get(2, [0])[0], e.get(5, [0])[0]) for e in events)


def _frames(proto: bytes) -> dict[int, Frame]:
    raw = _group(proto)
    files, functions = ([name.decode() for name in raw.get(field, [])] for field in (1, 2))
    locations = [_group(location) for location in raw.get(3, [])]
    frames = {}
    for number, frame in enumerate(map(_group, raw.get(4, [])), start=1):
        at = locations[frame.get(1, [1])[0] - 1]
        file, function = files[at.get(1, [1])[0] - 1], functions[at.get(2, [1])[0] - 1]
        frames[number] = Frame(file, function, at.get(3, [0])[0], frame.get(2, [0])[0])
    return frames


def _group(proto: bytes) -> dict[int, list]:
    grouped = {}
    for number, value in _fields(proto):
        grouped.setdefault(number, []).append(value)
    return grouped


def _fields(proto: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, integer or bytes) of one message, after protobuf's encoding guide."""
    at = 0
    while at < len(proto):
        tag, at = _varint(proto, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(proto, at)
        else:
            size, at = _varint(proto, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = proto[at : at + size], at + size
        yield tag >> 3, value


def _varint(proto: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = proto[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _packed(values: list | None) -> Iterator[int]:
    """The integers of a repeated field, packed or not."""
    for value in values or ():
        if isinstance(value, int):
            yield value
        else:
            at = 0
            while at < len(value):
                number, at = _varint(value, at)
                yield number
