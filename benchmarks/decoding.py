"""Time a token of a causal gMLP with a full window: g-mlp-pytorch, allmlp's cache, GPT-2 with its own, bare products.

    python benchmarks/decoding.py

takes about a minute on two cores and writes results/decoding.json and the table of docs/language.md.

8 layers, width 512, d_ffn 2048, 256 tokens of vocabulary, one sequence. allmlp's model has g-mlp-pytorch's weights and
must give the same logits. Everything is generated through each library's own `generate`, and runs in turn; prompts lie
in the caches already. The bare products are one token's matrix-vector products, nothing between them.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WINDOWS = (256, 768, 2048)
LAYERS, WIDTH, VOCABULARY = 8, 512, 256
NEW_TOKENS = 24
RESULTS = Path(__file__).parent / "results" / "decoding.json"
PAGE = Path(__file__).parents[1] / "docs" / "language.md"
PEER, OURS, GPT2, FLOOR = "g-mlp-pytorch", "allmlp", "GPT-2 (transformers)", "matrix products alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the results")
    parser.add_argument("--windows", nargs="+", type=int, default=WINDOWS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if not options.page:
        measure(options)
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


def measure(options: argparse.Namespace) -> None:
    """Write the results."""
    import torch

    from allmlp.benchmark.measurement import machine
    from allmlp.files import write_json

    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for window in options.windows:
        rows += times_with(window, options.rounds)
        print(*table_lines(rows), sep="\n")
    write_json(RESULTS, {"machine": machine(), "rows": rows})


def times_with(window: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds a token of every contender with this window."""
    import torch
    from g_mlp_pytorch import gMLP
    from g_mlp_pytorch.autoregressive_wrapper import AutoregressiveWrapper

    from allmlp.checkpoints.conversion import convert_state_dict
    from allmlp.timing import time_in_turn

    torch.manual_seed(0)
    theirs = gMLP(num_tokens=VOCABULARY, dim=WIDTH, depth=LAYERS, seq_len=window, causal=True).eval()
    for parameter in theirs.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    facts = {"causal": True, "gate_act": "none"}
    ours = convert_state_dict(theirs.state_dict(), "lucidrains", facts).model
    ids = torch.randint(0, VOCABULARY, (1, window))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids), rtol=1e-3, atol=1e-3)
    wrapped = AutoregressiveWrapper(theirs)
    gpt2 = same_size_gpt2(window, ours.num_parameters())
    contenders = {PEER: lambda: wrapped.generate(ids, 1)}
    for name, model in ((OURS, ours), (GPT2, gpt2)):
        for dtype in (torch.float32, torch.bfloat16):
            label = name if dtype == torch.float32 else f"{name}, bfloat16"
            copy = type(model)(model.config).eval()
            copy.load_state_dict(model.state_dict())
            contenders[label] = continued(copy.to(dtype), ids)
            if name == OURS:
                contenders[label.replace(OURS, FLOOR)] = floor(copy, window)
    times = time_in_turn(contenders, rounds=rounds, warmup=2)
    tokens = {name: 1 if name == PEER else NEW_TOKENS for name in contenders}
    per_token = {name: timing.milliseconds / tokens[name] for name, timing in times.items()}
    parameters = {PEER: ours.num_parameters(), OURS: ours.num_parameters(), GPT2: gpt2.num_parameters()}
    return [
        {
            "window": window,
            "contender": name,
            "parameters": parameters.get(name.removesuffix(", bfloat16")),
            "milliseconds": value,
            "times_faster_than_peer": tokens[name] / times[name].ratio,
        }
        for name, value in per_token.items()
    ]


def same_size_gpt2(window: int, parameters: int) -> Any:
    """A GPT-2 of as many layers and, as closely as heads of 64 channels allow, as many parameters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    def build(width: int) -> Any:
        sizes = {"n_embd": width, "n_head": max(1, width // 64), "n_layer": LAYERS, "n_positions": window}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, **sizes))

    def size(width: int) -> int:
        with torch.device("meta"):
            return build(width).num_parameters()

    return build(min(range(64, 2048, 64), key=lambda width: abs(size(width) - parameters))).eval()


def continued(model: Any, ids: Any) -> Callable[[], None]:
    """A function that generates the last tokens of a full window, all earlier ones being in the cache."""
    import torch

    from allmlp.language.cache import CACHE

    prompt = ids[:, : ids.shape[1] - NEW_TOKENS]
    with torch.inference_mode():
        cache = getattr(model(prompt[:, :-1], use_cache=True), CACHE)
    length = prompt.shape[1] - 1

    def generate() -> None:
        out = model.generate(prompt, **{CACHE: cache}, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert out.shape == ids.shape
        cache.crop(length - cache.get_seq_length())

    return generate


def floor(model: Any, window: int) -> Callable[[], None]:
    """A function that computes the bare matrix-vector products of one token, as often as `continued` makes tokens."""
    import torch

    head, blocks = model.lm_head.weight, model.model.layers
    layers = [(block.proj_in.weight, block.proj_out.weight) for block in blocks]
    halves = [torch.randn(window, model.config.intermediate_size // 2, dtype=head.dtype) for _ in blocks]
    x, gated, row = (torch.randn(size, dtype=head.dtype) for size in (WIDTH, halves[0].shape[1], window))

    def run() -> None:
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                for (expand, project), half in zip(layers, halves, strict=True):
                    torch.mv(expand, x)
                    torch.mv(half.t(), row)
                    torch.mv(project, gated)
                torch.mv(head, x)

    return run


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The results as a Markdown table."""
    lines = ["| window | | parameters | ms a token | tokens/s | over g-mlp-pytorch |", "|---|---|---|---|---|---|"]
    for row in rows:
        size = f"{row['parameters'] / 1e6:.1f}M" if row["parameters"] else ""
        lines.append(
            f"| {row['window']:,} | {row['contender']} | {size} | {row['milliseconds']:.2f} "
            f"| {1000 / row['milliseconds']:,.0f} | {row['times_faster_than_peer']:.0f}× |"
        )
    return lines


def write_page(results: dict[str, Any]) -> None:
    """Put the table into the documentation."""
    from allmlp.benchmark.report import replace_part

    facts = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    described = f"{facts['processor']}, {facts['threads']} threads; {versions}; {facts['date']}."
    replace_part(PAGE, "decoding", "\n".join(table_lines(results["rows"])) + f"\n\n{described}")


if __name__ == "__main__":
    main()
