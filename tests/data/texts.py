"""Small texts in every kind of place that texts come from."""

from pathlib import Path

import datasets

LINES = [f"line {n}: " + "the quick brown fox jumps over the lazy dog. "[n % 20 :] for n in range(200)]
TEXT = "\n".join(LINES)


def write_text(path: Path, text: str = TEXT) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def write_table(path: Path, columns: dict[str, list]) -> str:
    table = datasets.Dataset.from_dict(columns)
    table.to_csv(str(path)) if path.suffix == ".csv" else table.to_parquet(str(path))
    return str(path)


def labelled(rows: int = 60) -> dict[str, list]:
    """Texts about two subjects, told apart by their words."""
    words = {"animals": ["cat", "dog", "fox"], "plants": ["oak", "elm", "ivy"]}
    labels = [("animals", "plants")[row % 2] for row in range(rows)]
    texts = []
    for row, label in enumerate(labels):
        texts.append(" ".join(words[label][(row + place) % 3] for place in range(3 + row % 4)))
    return {"text": texts, "label": labels}
