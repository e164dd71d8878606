"""Makes nf4.npz: what bitsandbytes makes of arrays in NF4 with double quantisation, and of values in its 8-bit map.

  python tests/golden/make_nf4.py     (needs torch and bitsandbytes; the tests that read the file do not)

Arrays come from NumPy's RandomState, whose stream is frozen, so the file holds results alone. PyTorch adds the mean of up to
32,768 blocks in one order on every x86 CPU and number of threads; these are fewer.
"""

import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("nf4.npz")
SHAPES = {  # one scale, two and more; whole blocks and groups, and not; a single block; fewer than 8 blocks
    "whole": (64, 64),
    "ragged": (3, 50),
    "two_scales": (140, 130),
    "one_block": (2, 32),
    "pair": (1, 2),
    "zeros": (40, 192),
    "edges": (16, 128),
    "ragged_edges": (1, 62),
    "float16": (30, 70),
}
LENGTHS = (1, 5, 7, 8, 31, 33, 100, 255, 256, 300, 1000, 4096, 5000, 17000, 70000)  # of arrays to take the mean of
NIBBLES = [  # of NF4, to make arrays of which many weights lie where two codes meet
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302, 0.2461123,
    0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip


def array(name: str) -> np.ndarray:
    random = np.random.RandomState(list(SHAPES).index(name))
    w = random.normal(0, 0.02, SHAPES[name]).astype(np.float32)
    if name == "zeros":
        w[3], w[7, :64], w[-1] = 0, 0, 0
    if name.endswith("edges"):
        values = np.array(NIBBLES, np.float32)
        w = random.choice((values[:-1] + values[1:]) / np.float32(2), SHAPES[name])
        w = np.where(random.rand(*w.shape) < 0.5, w, np.nextafter(w, random.choice(np.array([-9, 9], np.float32), w.shape)))
        w[:, ::64] = random.choice(np.array([-1, 1], np.float32), w[:, ::64].shape)
        w *= np.resize(np.array([3.83, 1, 3, 0.25], np.float32), (len(w), 1))
    return w.astype(np.float16) if name == "float16" else w


def groups() -> np.ndarray:
    """Groups of 256 for the 8-bit map: all of [-1, 1], near 0, and where the grid's places with different codes meet."""
    random = np.random.RandomState(99)
    even = np.linspace(-1, 1, 256 * 40).reshape(40, 256)
    near = np.exp(random.uniform(np.log(1e-7), 0, (40, 256))) * random.choice([-1, 1], (40, 256))
    bounds = np.concatenate([10.0 ** (i - 6) * np.linspace(0.1, 1, 2**i + 1)[1:-1] for i in range(7)])
    places = np.ceil((np.concatenate([bounds, -bounds]) + 1) / 2 * 65535) - 0.5
    x = np.concatenate([even, near, random.choice(places / 65535 * 2 - 1, (80, 256))]).astype(np.float32)
    x[:, 0] = 1
    x *= np.exp(random.uniform(-4, 1, (160, 1))).astype(np.float32)
    x[5] = 0
    return x


def addends(length: int) -> np.ndarray:
    return np.random.RandomState(length).rand(length).astype(np.float32) + np.float32(0.1)


def oracle() -> dict[str, np.ndarray]:
    """NAME/codes, absmax, scales, offset and values (fp32), the codes and scales of `groups`, and means of `addends`."""
    golden_file.quiet_torch()
    import bitsandbytes.functional as bnb
    import torch

    found = {}
    for name in SHAPES:
        w = torch.tensor(array(name))
        codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
        state.dtype = torch.float32
        values = bnb.dequantize_4bit(codes, state).reshape(w.shape)
        parts = codes, state.absmax, state.state2.absmax, state.offset.float(), values
        for part, value in zip(("codes", "absmax", "scales", "offset", "values"), parts, strict=True):
            found[f"{name}/{part}"] = value.squeeze(-1).numpy() if part == "codes" else value.numpy()
    codes, state = bnb.quantize_blockwise(torch.tensor(groups()), blocksize=256)
    found |= {"groups/codes": codes.numpy(), "groups/scales": state.absmax.numpy()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found["means"] = np.array([torch.tensor(addends(length)).mean().item() for length in LENGTHS], np.float32)
    torch.set_num_threads(threads)
    return found


if __name__ == "__main__":
    golden_file.write(FILE, oracle())
