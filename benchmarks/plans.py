"""Works out what a training costs before it is run, and renders the table of docs/scaling.md.

    python benchmarks/plans.py

Multiply-adds are counted by running the model on the meta device. A step forward and back takes three times the forward
pass, a multiply-add two operations. GPU-hours are for PEAK operations a second of which UTILISATION is used: both are
assumptions, to be replaced by what a few hundred steps on the machine at hand show.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from allmlp import GMLPConfig, GMLPForMaskedLM
from allmlp.benchmark.report import replace_part
from allmlp.catalogue import layer_table

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
GPUS = {"A100": 312e12, "H100": 989e12}
"""Dense bfloat16 operations a second, as NVIDIA's data sheets have them."""
UTILISATION = 0.3


@dataclass(frozen=True)
class Plan:
    """A training of a paper.

    Attributes:
        title: what is trained.
        data: on what, for how long.
        steps: optimiser steps.
        examples: images or tokens in all.
        unit: which of them.
        macs: Multiply-adds of one of them, forward.
        expected: the score the paper prints, and where.
    """

    title: str
    data: str
    steps: int
    examples: int
    unit: str
    macs: float
    expected: str

    @property
    def operations(self) -> float:
        return 6 * self.macs * self.examples


def plans() -> list[Plan]:
    images = 1_281_167
    # 8 processes × 256 images × 2 forward passes; the last step of an epoch takes what is left.
    steps = 300 * -(-images // 4096)
    batch, length = 256, 512
    with torch.device("meta"):
        model = GMLPForMaskedLM(GMLPConfig.named("gmlp_base")).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.zeros(1, length, dtype=torch.long))
    return [
        Plan(
            title="`gmlp_small_patch16_224`, `recipes/imagenet_gmlp_small.yaml`",
            data="ImageNet-1k, 300 epochs, batch 4,096",
            steps=steps,
            examples=300 * images,
            unit="image",
            macs=layer_table("gmlp_small_patch16_224").macs,
            expected="79.6% top 1 (arXiv 2105.08050)",
        ),
        Plan(
            title="`gmlp_base`, masked",
            data="C4, 1M steps of 256 × 512 tokens",
            steps=1_000_000,
            examples=1_000_000 * batch * length,
            unit="token",
            macs=counter.get_total_flops() / 2 / length,
            expected="perplexity 4.28, MNLI 83.7/84.1 (arXiv 2105.08050)",
        ),
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    hours = [f"{name} hours" for name in GPUS]
    rows = [
        "| model | data | steps | MACs | operations | " + " | ".join(hours) + " | expected |",
        "|---|---|---:|---:|---:|" + "---:|" * len(GPUS) + "---|",
    ]
    for plan in plans():
        cost = [f"{plan.operations / (peak * UTILISATION) / 3600:,.0f}" for peak in GPUS.values()]
        work = f"{plan.macs / 1e9:.2f}G an image" if plan.unit == "image" else f"{plan.macs / 1e6:.0f}M a token"
        rows.append(
            f"| {plan.title} | {plan.data} | {plan.steps:,} | {work} | {plan.operations:.2g} | "
            f"{' | '.join(cost)} | {plan.expected} |"
        )
    replace_part(PAGE, "plans", "\n".join(rows))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
