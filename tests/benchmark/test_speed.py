"""benchmarks/speed.py in short."""

import pytest

from tests.scripts import script

benchmark = script("speed")


def test_a_network_without_a_peer_is_refused_beside_the_engines() -> None:
    with pytest.raises(SystemExit, match="gmlp_nano_patch4_32 has no peer"):
        benchmark._beside_engines("gmlp_nano_patch4_32", "float32", 1, {}, 1)
