from pathlib import Path

import pytest

from allmlp.checkpoints.training_checkpoints import (
    STATE,
    checkpoint_step,
    checkpoints_in,
    last_checkpoint,
    publish_checkpoint,
    rotate_checkpoints,
    unfinished_checkpoint,
)


def _write_checkpoint(run: Path, step: int) -> Path:
    written = unfinished_checkpoint(run, step)
    (written / "shards").mkdir(parents=True)
    (written / "shards" / "0.bin").write_text(str(step))
    (written / STATE).write_text("{}")
    return written


def test_a_checkpoint_has_its_name_when_it_is_complete(tmp_path: Path) -> None:
    _write_checkpoint(tmp_path, 3)
    assert checkpoints_in(tmp_path) == []
    for _ in range(2):  # the second time in place of the first
        assert publish_checkpoint(tmp_path, 3) == tmp_path / "checkpoint-3"
        assert (tmp_path / "checkpoint-3" / "shards" / "0.bin").read_text() == "3"
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
        _write_checkpoint(tmp_path, 3)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [(2, None, [20, 100]), (1, 3, [3, 100]), (2, 20, [20, 100]), (9, 3, [3, 9, 20, 100])],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path, keep: int, best: int | None, kept: list[int]) -> None:
    for step in (9, 100, 3, 20):
        _write_checkpoint(tmp_path, step)
        publish_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    rotate_checkpoints(tmp_path, keep, best)
    assert [checkpoint_step(path) for path in checkpoints_in(tmp_path)] == kept
    assert (tmp_path / "checkpoint-best").is_dir(), "not ours"
