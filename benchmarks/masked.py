"""Masked language modelling: gMLP, aMLP and a BERT of the same size, the same text, masks, steps and optimiser.

    python benchmarks/masked.py TEXT

takes about 15 minutes on two cores and writes results/masked.json and .png and the table of docs/language.md.

The gMLP paper's pretraining scaled down (its section 4 and appendix): 15% of the tokens masked, AdamW with ε 1e-6,
β .9 and .999, weight decay .01, a tenth of the steps of warm-up, linear decay, no clipping, no dropout. Tokens are
characters; the last tenth of the text is held out. BERT is transformers', with learnt positions, as published.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

CONTEXT, BATCH, STEPS, SHARE = 64, 32, 1000, 0.15
RESULTS = Path(__file__).parent / "results" / "masked.json"
PICTURE = RESULTS.with_suffix(".png")
PAGE = Path(__file__).parents[1] / "docs" / "language.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="a text file")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the results")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3], help="the best of these counts")
    options = parser.parse_args()
    if not options.page:
        if options.text is None:
            parser.error("name a text file")
        measure(options)
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


def measure(options: argparse.Namespace) -> None:
    """Write the results and draw them."""
    from allmlp.benchmark.measurement import machine
    from allmlp.data.text import load_text
    from allmlp.files import write_json

    data = load_text(options.text, tokenizer_name="characters")
    rows = []
    for name, model in models(data.tokenizer).items():
        runs = [learn(model, data, lr, options.steps) for lr in options.lr]
        rows.append({"model": name, **min(runs, key=lambda run: run["nats"])})
        print({key: value for key, value in rows[-1].items() if key != "curve"}, flush=True)
    results = {"machine": machine(), "text": Path(options.text).name, "steps": options.steps, "rows": rows}
    write_json(RESULTS, results)
    draw(results)


def models(tokenizer: Any) -> dict[str, Any]:
    """Functions that make the three models, of nearly the same number of parameters."""
    from transformers import BertConfig, BertForMaskedLM

    from allmlp.language import GMLPConfig, GMLPForMaskedLM

    common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    gmlp = {"max_position_embeddings": CONTEXT, **common}
    bert = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512}
    undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": CONTEXT}
    return {
        "gMLP": lambda: GMLPForMaskedLM(GMLPConfig.named("gmlp_nano", **gmlp)),
        "aMLP": lambda: GMLPForMaskedLM(GMLPConfig.named("amlp_nano", tiny_attention_size=16, **gmlp)),
        "BERT": lambda: BertForMaskedLM(BertConfig(**common, **bert, **undropped)),
    }


def learn(make: Any, data: Any, lr: float, steps: int) -> dict[str, Any]:
    """Train one model and measure it on the held-out text."""
    import torch
    from transformers import set_seed

    from allmlp.data import as_is
    from allmlp.data.text import IGNORED, Masking, TokenWindows
    from allmlp.training.language import WindowsEngine, parameter_groups
    from allmlp.training.language_evaluation import text_loss
    from allmlp.training.recipe import MaskedRecipe, make_recipe

    settings = {
        "data": "text", "max_steps": steps, "batch_size": BATCH, "lr": lr, "schedule": "linear", "warmup": 0.1,
        "weight_decay": 0.01, "adam_eps": 1e-6, "clip": 0.0, "eval_every": steps // 10, "keep": 1, "log_every": 50,
        "precision": "fp32", "mask_share": SHARE,
    }  # fmt: skip
    recipe = make_recipe(settings, MaskedRecipe)
    set_seed(recipe.seed)
    model = make()
    masking = Masking(share=SHARE, mask_token=data.tokenizer.mask_token_id, vocabulary=len(data.tokenizer))
    training = TokenWindows(data.train, CONTEXT, masking=masking, seed=recipe.seed)
    held_out = TokenWindows(data.validation, CONTEXT, masking=masking)
    with tempfile.TemporaryDirectory() as folder:
        engine = WindowsEngine(
            recipe, Path(folder), model, parameter_groups(model, recipe), unit="tokens", per_example=CONTEXT,
            train_dataset=training, eval_dataset=held_out, data_collator=as_is,
        )  # fmt: skip
        engine.run()
    nats, predicted = text_loss(model, held_out)
    right = 0
    with torch.inference_mode():
        for start in range(0, len(held_out), 64):
            batch = held_out.__getitems__(list(range(start, min(start + 64, len(held_out)))))
            chosen = batch["labels"] != IGNORED
            guesses = model.eval()(batch["input_ids"], attention_mask=batch.get("attention_mask")).logits.argmax(-1)
            right += int((guesses[chosen] == batch["labels"][chosen]).sum())
    curve = [(entry["step"], entry["eval_loss"]) for entry in engine.state.log_history if "eval_loss" in entry]
    return {
        "parameters": model.num_parameters(),
        "lr": lr,
        "nats": nats / predicted,
        "accuracy": right / predicted,
        "curve": curve,
    }


def draw(results: dict[str, Any]) -> None:
    """Held-out loss over the steps."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from allmlp.training.report import BLUE, GREEN, ORANGE, STYLE, save

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 3.8), layout="constrained")
        axes = figure.subplots()
        for row, colour in zip(results["rows"], (BLUE, GREEN, ORANGE), strict=True):
            label = f"{row['model']}, {row['parameters'] / 1e6:.2f}M: {row['nats']:.3f}"
            axes.plot(*zip(*row["curve"], strict=True), color=colour, marker="o", ms=3, label=label)
        axes.set(title="Held-out loss, nats a masked character", xlabel="step")
        axes.legend()
    save(figure, PICTURE)


def write_page(results: dict[str, Any]) -> None:
    """Put the table and the picture into the documentation."""
    import math

    from allmlp.benchmark.report import replace_part

    lines = [
        "| | parameters | lr | nats | perplexity | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {row['lr']:g} | {row['nats']:.4f} "
            f"| {math.exp(row['nats']):.3f} | {row['accuracy']:.2%} |"
        )
    picture = f"![Held-out loss](../benchmarks/results/{PICTURE.name})"
    replace_part(PAGE, "masked", "\n".join(lines) + f"\n\n{picture}")


if __name__ == "__main__":
    main()
