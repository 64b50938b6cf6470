from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import originals
from tests.checkpoints.parity import VARIED, assert_equal_outputs


@VARIED
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    dim=st.integers(2, 12),
    depth=st.integers(1, 3),
    expansion_factor=st.sampled_from([1, 4]),
)
def test_parity(**sizes) -> None:
    assert_equal_outputs(originals.lucidrains_mixer(**sizes))
