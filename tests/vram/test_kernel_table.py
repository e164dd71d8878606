"""The table of our kernels: what the compiler's dumps say is read right, and each probe's kernels are all there."""

import jax
import jax.numpy as jnp
import pytest

from jaxvram.vram import cards, kernel_table, ptx
from jaxvram.vram.compile import compile_for

THUNKS = """
002: kCustomKernel [prev=001 (1) | next=003 (1)] pallas_one grid: [4, 12, 2] threads: [128, 1, 1]  shared_memory: 49152 bytes
003: kCustomKernel [source       | next=007 (2)] loop_fusion grid: [9, 1, 1] threads: [64, 1, 1]  shared_memory: 0 bytes
"""


def test_launches_are_read_from_xlas_list():
    assert ptx._launches(THUNKS) == {"pallas_one": ((4, 12, 2), 128, 49152)}


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [(32, 0, 128, 12), (255, 0, 256, 1), (128, 0, 128, 4), (129, 0, 128, 3), (32, 49152, 128, 2), (32, 101_376, 128, 1)],
)
def test_blocks_that_fit_a_multiprocessor(registers, shared, threads, blocks):
    kernel = ptx.Kernel("k", registers, 0, shared, (1, 1, 1), threads, 0)
    assert kernel.blocks_per_multiprocessor(cards.find("rtx4070")) == blocks


def test_a_probe(rtx4070):
    probe = kernel_table.attention_probe("tiny", 1, 256, 256, 2, 1, 64)
    rows = kernel_table.rows_of(probe, rtx4070)
    assert [row[0] for row in rows] == [
        "flash_attention_forward",
        "flash_attention_backward_kv",
        "flash_attention_backward_q",
    ]
    assert all(len(row) == len(kernel_table.HEADER) and row[5] == 0 and row[8] > 0 for row in rows)
    pairs = 2 * 256 * 257 // 2
    assert [probe.work[row[0]].flops for row in rows] == [4 * 64 * pairs, 8 * 64 * pairs, 6 * 64 * pairs]
    assert probe.work["flash_attention_forward"].bytes == 2 * (2 * 256 * 2 * 64 + 2 * 256 * 64) + 4 * 256 * 2


def test_kernels_of_other_programs_are_not_ours(rtx4070):
    spec = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    assert compile_for(rtx4070, lambda x: x @ x, (spec,), kernels=True).kernels == ()
