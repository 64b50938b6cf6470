"""The examples of the README, each copied alone into a new program."""

import ast
import builtins
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    pytest.param(example, id=f"{page}-{number}")
    for page in ("README.md", "README.zh-CN.md")
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_imports_what_it_uses(example):
    nodes = list(ast.walk(ast.parse(example)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    imported = [alias.asname or alias.name for node in nodes if hasattr(node, "names") for alias in node.names]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(imported) | set(dir(builtins))
    assert {node.id for node in names} <= bound
    # Only that registers the models.
    assert re.search(r"^(import|from) allmlp", example, re.MULTILINE)
