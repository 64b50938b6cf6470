"""Results as a file, a table, a picture, and a part of a page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from allmlp.benchmark.measurement import FLOOR, OURS, Result, Setting
from allmlp.errors import UserError
from allmlp.files import atomic_path, write_json, write_text

_HEADING = ("model", "setting", "allmlp ms", "over floor", "peer", "peer / allmlp", "memory / peer's")


def write_results(path: Path, results: Sequence[Result], machine: Mapping[str, Any]) -> None:
    """Write results and what they depend on as JSON, all at once or not at all."""
    content = {"machine": dict(machine), "results": [result.as_dict() for result in results]}
    write_json(path, content)


def read_results(path: Path) -> tuple[list[Result], dict[str, Any]]:
    """The results of a file and the machine they were found on.

    Raises:
        UserError: if it is no file of results.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [Result.from_dict(flat) for flat in content["results"]], content["machine"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no file of benchmark results: {error}") from error


def result_table(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """A heading and a row for each setting and peer.

    The floor is allmlp's own matrix products alone; memory is what backward keeps in training, else the highest point.
    """
    rows: list[tuple[str, ...]] = [_HEADING]
    for setting, found in _by_setting(results).items():
        ours = found[OURS]
        over = f"{1 / found[FLOOR].ratio:.2f}" if FLOOR in found else "–"
        time = f"{ours.milliseconds:.1f}" + (f" ({ours.engine})" if ours.engine else "")
        first = (setting.model, describe(setting), time, over)
        peers = [result for name, result in found.items() if name not in (OURS, FLOOR)]
        rows += [(*first, peer.contender, f"{peer.ratio:.2f}", _memory(ours, peer)) for peer in peers]
        if not peers:
            rows.append((*first, "–", "–", "–"))
    return rows


def describe(setting: Setting) -> str:
    """A setting in a few words, its model left out."""
    words = [setting.task, setting.dtype, f"batch {setting.batch_size}"]
    if setting.compiled:
        words.append("compiled")
    if setting.device != "cpu":
        words.append(setting.device)
    return ", ".join(words)


def draw(path: Path, results: Iterable[Result], machine: Mapping[str, Any]) -> None:
    """An SVG picture: how many times as long as allmlp each peer takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [
        (f"{setting.model}\n{describe(setting)}, {name}", result.ratio)
        for setting, found in _by_setting(results).items()
        for name, result in found.items()
        if name not in (OURS, FLOOR)
    ]
    with matplotlib.rc_context({"svg.hashsalt": "allmlp", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
        labels, ratios = zip(*rows, strict=True) if rows else ((), ())
        bars = axes.barh(labels, ratios, color=["#2a6f97" if ratio >= 1 else "#c44536" for ratio in ratios])
        axes.bar_label(bars, fmt="%.2f×", padding=3, fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=6)
        axes.set_xlabel("time of the peer over time of allmlp")
        axes.set_title(f"{machine['processor']}, {machine['threads']} threads", fontsize=9)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def write_page(page: Path, name: str, results: Sequence[Result], machine: Mapping[str, Any]) -> None:
    """Put the table, the picture and the machine's description into a page, and the picture beside it.

    They take the place of what stands between the lines `<!-- benchmark NAME -->` and `<!-- end NAME -->`.

    Raises:
        UserError: if the page has no such lines.
    """
    picture = page.with_name(f"{page.stem}_{name}.svg")
    draw(picture, results, machine)
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    described = (
        f"{machine['processor']} ({machine['vector_extensions']}), {machine['threads']} threads; {versions}; "
        f"Python {machine['python']}; {machine['date']}."
    )
    body = [_markdown(result_table(results)), f"![Time of each peer over time of allmlp]({picture.name})", described]
    replace_part(page, name, "\n\n".join(body))


def replace_part(page: Path, name: str, body: str) -> None:
    """Put `body` between the lines `<!-- benchmark NAME -->` and `<!-- end NAME -->` of a page."""
    begin, end = f"<!-- benchmark {name} -->", f"<!-- end {name} -->"
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{page} has no lines {begin} and {end} to write between")
    write_text(page, f"{before}{begin}\n\n{body}\n\n{end}{after}")


def _by_setting(results: Iterable[Result]) -> dict[Setting, dict[str, Result]]:
    grouped: dict[Setting, dict[str, Result]] = {}
    for result in results:
        grouped.setdefault(result.setting, {})[result.contender] = result
    return grouped


def _memory(ours: Result, peer: Result) -> str:
    if ours.kept_bytes and peer.kept_bytes:
        return f"{ours.kept_bytes / peer.kept_bytes:.2f} kept"
    if ours.peak_bytes and peer.peak_bytes:
        return f"{ours.peak_bytes / peer.peak_bytes:.2f} peak"
    return "–"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
