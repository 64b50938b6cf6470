"""timm's own model tests on this package's models.

    python tests/vision/timm_suite.py TIMM [pytest arguments]

TIMM is a checkout of https://github.com/huggingface/pytorch-image-models. Its `tests/test_models.py` runs as it is, but
`timm.list_models` answers with the models registered here, for whatever modules it is asked. TorchScript, which torch
has deprecated, is left out.
"""

import sys
from pathlib import Path

import pytest
import timm

import allmlp.vision

FAMILIES = sorted(vars(allmlp.vision)[name].__module__.rsplit(".", 1)[1] for name in allmlp.vision.__all__)
_list_models = timm.list_models


def list_our_models(filter: str | list[str] = "", module: str | list[str] = "", **options) -> list[str]:
    """`timm.list_models` for these families only, whatever modules are asked for."""
    return sorted(name for family in FAMILIES for name in _list_models(filter, module=family, **options))


class WhatMixerPasses:
    """Deselects what is not about a model, or is about one of timm's, or is asked of no Mixer there.

    That is TorchScript, and for S²-MLPv2, which has two stages, `test_model_forward_features`: it wants three default
    feature levels and spares timm's own MLPs; `test_model_forward_intermediates_features` covers the two.
    """

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        ours = set(list_our_models()) | set(list_our_models(include_tags=True))

        def wanted(item: pytest.Item) -> bool:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            name = parameters.get("model_name", "")
            two_stages = item.originalname == "test_model_forward_features" and name.startswith("s2mlpv2")
            return name in ours and "torchscript" not in item.name and not two_stages

        config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
        items[:] = [item for item in items if wanted(item)]


def main(checkout: str, *arguments: str) -> int:
    root = Path(checkout)
    timm.list_models = list_our_models
    return pytest.main(
        [
            str(root / "tests" / "test_models.py"),
            f"--rootdir={root}",
            f"--config-file={root / 'pyproject.toml'}",
            "-p",
            "no:cacheprovider",
            *arguments,
        ],
        plugins=[WhatMixerPasses()],
    )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
