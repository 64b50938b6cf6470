"""docs/models.md, rendered from the catalogue.

python -m tests.models_page        writes the page
"""

from itertools import groupby
from pathlib import Path

from allmlp.catalogue import ModelCard, is_language, list_models

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_HEAD = """# Models

Image models are timm models once `allmlp` is imported: `timm.create_model(name)`. Parameters and multiply-adds (MACs)
are counted at the model's own image size, the last number of its name; in brackets stands what the paper prints (for
S²-MLP with the classifier that the paper leaves out). Accuracy is the paper's, in percent on ImageNet-1k, trained on
ImageNet-1k alone. `nano` models are this library's own, for 32×32 images; [cifar10.md](cifar10.md) says what they reach
on CIFAR-10. The figures' home is `src/allmlp/published.toml`; the tests hold every model to them.

This page is written by `python -m tests.models_page`.
"""


_LANGUAGE = """
## Language models

`GMLPConfig.named(name)`; [language.md](language.md) says how they are used. Counted with the paper's vocabulary of
32,000 tokens, for one text of the model's length; the perplexity is of masked tokens, on C4. `nano` models are this
library's own.

| model | parameters | MACs | perplexity |
|---|---|---|---|
"""


def page() -> str:
    """The page's text."""
    parts = [_HEAD]
    images = [card for card in list_models() if not is_language(card.name)]
    for title, cards in groupby(images, key=lambda card: (card.title, card.url)):
        parts.append(f"\n## [{title[0]}]({title[1]})\n\n| model | parameters | MACs | top-1 |\n|---|---|---|---|\n")
        parts.extend(_row(card) for card in cards)
    parts.append(_LANGUAGE)
    parts.extend(_row(card) for card in list_models() if is_language(card.name))
    return "".join(parts)


def _row(card: ModelCard) -> str:
    parameters = f"{card.parameters:,}" + (f" ({card.published_parameters})" if card.published_parameters else "")
    macs = f"{card.macs / 1e9:.3f}G" + (f" ({card.published_macs})" if card.published_macs else "")
    score = card.top1 or card.perplexity or ""
    return f"| `{card.name}` | {parameters} | {macs} | {score} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
