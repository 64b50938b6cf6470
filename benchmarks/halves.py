"""A gMLP block's expansion as one product, halved behind it, beside a product for each half, by number of images.

    python benchmarks/halves.py

Three minutes on two cores. Where the second takes less time is `allmlp.layers.spatial_gating._MANY_ROWS`.
"""

import argparse
from functools import partial

import timm
import torch
from torch import Tensor, nn

import allmlp  # noqa: F401  (registers the models)
from allmlp.layers import spatial_gating
from allmlp.timing import time_in_turn

TOKENS = 14 * 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 2, 4, 6, 8, 12, 16, 32])
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        blocks = timm.create_model("gmlp_small_patch16_224", num_blocks=8).eval().blocks.to(dtype)
        for batch_size in options.batch_size:
            x = torch.randn(batch_size, 14, 14, 256, dtype=dtype)
            forms = {"one": partial(run, blocks, x, float("inf")), "two": partial(run, blocks, x, 0)}
            times = time_in_turn(forms, rounds=options.rounds)
            name, tokens, one = str(dtype).removeprefix("torch."), batch_size * TOKENS, times["one"].milliseconds
            print(f"{name:9}{tokens:6} tokens {one:7.1f} ms, two products {times['two'].ratio:.2f} of it")


def run(blocks: nn.Module, x: Tensor, many: float) -> None:
    """The blocks, with two products from so many tokens on."""
    spatial_gating._MANY_ROWS = many
    with torch.no_grad():
        blocks(x)


if __name__ == "__main__":
    main()
