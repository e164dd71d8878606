"""The reader of XLA's dumps: the wire format by hand, and against what the compiler itself reports."""

from jaxvram.vram import hlo
from jaxvram.vram.compile import compile_for
from tests.vram import toy


def test_the_wire_format():
    # field 1 = 150 (the example of protobuf's encoding guide), field 2 = "hi", field 3 = packed 3, 270, field 4 fixed32
    message = b"\x08\x96\x01" + b"\x12\x02hi" + b"\x1a\x03\x03\x8e\x02" + b"\x25\x01\x02\x03\x04"
    fields = list(hlo._fields(message))
    assert fields == [(1, 150), (2, b"hi"), (3, b"\x03\x8e\x02"), (4, b"\x01\x02\x03\x04")]
    assert list(hlo._packed([fields[2][1], 7])) == [3, 270, 7]


def test_shapes():
    leaf = hlo.Shape("bf16", (2, 3))
    shape = hlo.Shape("tuple", (), (hlo.Shape("f32", ()), hlo.Shape("tuple", (), (leaf,))))
    assert str(leaf) == "bf16[2,3]"
    assert shape.at((1, 0)) is leaf and leaf.at(()) is leaf


def test_a_dump_agrees_with_the_compilers_sums(rtx4070):
    program = toy.train_program()
    compiled = compile_for(rtx4070, program.fn, program.args, program.donate_argnums)
    module = compiled.module
    kept = [a for a in module.allocations if not a.is_thread_local]
    assert sum(a.bytes for a in kept if a.parameter is not None) == compiled.argument_bytes
    heap = [a for a in kept if a.parameter is None and not a.is_output]
    assert sum(a.bytes for a in heap) == compiled.temporary_bytes
    entry = [i for i in module.instructions.values() if i.computation == module.entry and i.opcode == "parameter"]
    assert {i.op_name for i in entry} >= {"state['params']['wte']['embedding']", "batch['tokens']"}
    assert all(i.shape.dims is not None and i.shape.dtype for i in module.instructions.values())
    assert any(frame.file.endswith("toy.py") for frame in module.frames.values())
    assert all(frame.parent in module.frames or frame.parent == 0 for frame in module.frames.values())
