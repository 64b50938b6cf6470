import contextlib
import json
from pathlib import Path

import pytest

from allmlp.files import atomic_path, write_json


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "metrics.json"
    write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        write_json(target, {"a": object()})
    with contextlib.suppress(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in target.parent.iterdir()] == ["metrics.json"]
