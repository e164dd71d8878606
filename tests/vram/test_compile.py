"""Compiling without the card: exact bytes, donation, silence, nothing left behind, clear errors."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvram.errors import UserError
from jaxvram.vram import cards, ptx
from jaxvram.vram import compile as compiler
from jaxvram.vram.compile import compile_for
from tests.vram.toy import spec

MIB = 2**20


def test_bytes_are_exact(rtx4070):
    def through_a_barrier(x, y):
        doubled = jax.lax.optimization_barrier(x * 2)  # a temporary as large as x: it must exist whole
        return doubled.T * doubled + y

    compiled = compile_for(rtx4070, through_a_barrier, (spec(1024, 1024), spec(1024, 1024)))
    assert compiled.argument_bytes == 2 * 4 * MIB
    assert compiled.temporary_bytes == 4 * MIB
    assert compiled.output_bytes == 4 * MIB
    assert compiled.aliased_bytes == 0
    assert compiled.peak_bytes == 16 * MIB


def test_a_donated_state_is_aliased(rtx4070):
    def step(state, batch):
        return {"w": state["w"] - batch.sum(), "n": state["n"] + 1}, batch.max()

    args = ({"w": spec(1024, 1024), "n": spec(dtype=jnp.int32)}, spec(256))
    donated, kept = (compile_for(rtx4070, step, args, donate) for donate in ((0,), ()))
    assert donated.aliased_bytes == 4 * MIB + 4
    assert kept.aliased_bytes == 0
    assert kept.peak_bytes - donated.peak_bytes == 4 * MIB + 4


def test_a_program_without_arguments_is_for_the_card_too(rtx4070):
    compiled = compile_for(rtx4070, lambda: {"ones": jnp.ones((512, 512)), "keys": [jnp.arange(3)]}, ())
    assert compiled.argument_bytes == 0
    assert 0 <= compiled.output_bytes - 4 * (512 * 512 + 3) <= 64  # and a table of pointers
    assert compiled.output_paths == ("['keys'][0]", "['ones']")


def test_constants_of_a_program_count(rtx4070):
    table = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    compiled = compile_for(rtx4070, lambda x: x + table, (spec(1024, 1024),))
    assert compiled.peak_bytes == 3 * 4 * MIB


def test_random_keys_and_half_precision_are_arguments_too(rtx4070):
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = compile_for(
        rtx4070, lambda key, x: x + jax.random.normal(key, x.shape, x.dtype), (key, spec(64, dtype=jnp.bfloat16))
    )
    assert compiled.argument_bytes == 8 + 2 * 64


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")  # JAX 0.12 announces its end
@pytest.mark.parametrize("name", ["rtx3060", "rtx4070", "a100-40g", "h100", "rtx5070"])
def test_pallas_kernels_are_compiled_for_the_card_not_for_this_machine(rtx4070, name):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def double(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    def pallas(x):
        parameters = triton.CompilerParams(num_warps=4, num_stages=1)
        return pl.pallas_call(double, jax.ShapeDtypeStruct(x.shape, x.dtype), compiler_params=parameters)(x)

    either = lambda x: jax.lax.platform_dependent(x, cuda=pallas, default=lambda x: x + x)
    module = compile_for(cards.find(name), either, (spec(256),)).module
    opcodes = {i.opcode for i in module.instructions.values()}
    assert "custom-call" in opcodes and "conditional" not in opcodes


def test_it_is_silent_and_leaves_nothing_behind(rtx4070, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []
    monkeypatch.setattr(
        compiler.hlo, "read", lambda proto, read=compiler.hlo.read: seen.append(len(proto)) or read(proto)
    )
    compile_for(rtx4070, lambda x: jnp.sin(x), (spec(16),))
    assert seen and list(tmp_path.iterdir()) == []
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_a_refused_program_is_one_line_and_leaves_nothing_behind(rtx4070, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    refuse = {"xla_gpu_autotune_level": 0, "xla_dump_hlo_pass_re": "("}  # stands for any error of XLA's

    class Refusing:
        def compile(self, compiler_options):
            assert list(tmp_path.iterdir())  # its dump folder exists by now
            raise jax.errors.JaxRuntimeError("INTERNAL: shared memory size limit exceeded\nand pages more")

    with pytest.raises(UserError, match=r"RTX 4070 refuses this program: INTERNAL: shared memory size limit exceeded$"):
        compiler._compile(Refusing(), refuse, rtx4070)
    assert list(tmp_path.iterdir()) == []


def test_the_dumps_of_killed_plans_are_swept_away(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    folders = {}
    for name, pid, hours in (("old", killed.pid, 2), ("fresh", killed.pid, 0), ("mine", os.getpid(), 2)):
        folders[name] = tmp_path / f"jaxvram-plan-{pid}-{name}"
        (folders[name] / "inside").mkdir(parents=True)
        os.utime(folders[name], (time.time() - 3600 * hours,) * 2)
    (tmp_path / "jaxvram-plan-notes-by-hand").mkdir()
    compiler._sweep()
    assert not folders["old"].exists()
    assert folders["fresh"].exists() and folders["mine"].exists() and (tmp_path / "jaxvram-plan-notes-by-hand").exists()


def test_products_that_no_default_tile_holds_go_to_cublas(rtx4070):
    asked = []

    class Untileable:
        def compile(self, compiler_options):
            asked.append(compiler_options.get("xla_gpu_enable_triton_gemm", True))
            raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot")

    with pytest.raises(UserError):
        compiler._compile(Untileable(), {}, rtx4070)
    assert asked == [True, False]


def test_plans_and_jaxs_own_cache_do_not_meet(rtx4070, tmp_path, recwarn):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compiler.compilation_cache.reset_cache()
    try:
        jax.jit(lambda x: jnp.cos(x) * 3)(jnp.ones(7))  # JAX now knows that it caches
        mine = set(tmp_path.rglob("*"))
        twice = [compile_for(rtx4070, lambda x: jnp.cos(x), (spec(7),)) for _ in range(2)]
        assert len(twice[0].module.instructions) == len(twice[1].module.instructions) > 0
        assert set(tmp_path.rglob("*")) == mine
        jax.jit(lambda x: jnp.cos(x) * 4)(jnp.ones(7))
        assert set(tmp_path.rglob("*")) > mine, "the cache no longer works after a plan"
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        compiler.compilation_cache.reset_cache()
    assert not recwarn.list


def test_without_the_planner_the_error_says_what_to_install(monkeypatch):
    def missing(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(compiler.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plan\]'.*jax\[cuda12-local\]"):
        compile_for(cards.find("rtx4070"), lambda x: x, (spec(1),))


def test_without_ptxas_the_error_says_what_to_install(rtx4070, monkeypatch):
    monkeypatch.setattr(ptx.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ptx.shutil, "which", lambda name: None)
    monkeypatch.setattr(ptx, "CUDA", pathlib.Path("/nowhere"))
    monkeypatch.setattr(ptx, "ptxas", ptx.ptxas.__wrapped__)
    with pytest.raises(UserError, match=r"ptxas.*nvidia-cuda-nvcc-cu12"):
        compile_for(rtx4070, lambda x: x, (spec(1),))


def test_a_machine_without_a_gpu_is_told_apart(monkeypatch):
    assert compiler.gpu_visible() == any(
        pathlib.Path(p).exists() for p in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
    )
    updates = []
    monkeypatch.setattr(compiler, "gpu_visible", lambda: True)
    monkeypatch.setattr(jax.config, "update", lambda *args: updates.append(args))
    compiler.settle_platform()
    assert updates == []  # with a GPU, JAX chooses
