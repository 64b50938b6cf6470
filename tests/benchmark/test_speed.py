"""benchmarks/speed.py in short."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("speed", Path(__file__).parents[2] / "benchmarks" / "speed.py")
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)


def test_a_network_without_a_peer_is_refused_beside_the_engines() -> None:
    with pytest.raises(SystemExit, match="gmlp_nano_patch4_32 has no peer"):
        benchmark._beside_engines("gmlp_nano_patch4_32", "float32", 1, {}, 1)
