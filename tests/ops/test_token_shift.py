import pytest
import torch

from allmlp.ops import token_shift


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("reach", "channels"), [(1, 6), (2, 11), (0, 4), (3, 7)])
def test_each_group_of_channels_comes_from_its_neighbour(reach, channels, causal) -> None:
    x = torch.randn(2, 5, channels)
    out = token_shift(x, reach, causal=causal)
    shifts = list(range(0 if causal else -reach, reach + 1))
    width = channels // len(shifts)
    for i in range(5):
        for c in range(channels):
            shift = shifts[c // width] if c // width < len(shifts) else 0
            inside = 0 <= i - shift < 5
            assert torch.equal(out[:, i, c], x[:, i - shift, c] if inside else torch.zeros(2))


def test_reach_beyond_the_sequence_gives_zero() -> None:
    assert torch.equal(
        token_shift(torch.ones(1, 2, 4), 3, causal=True)[0], torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0.0]])
    )


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="5 shifts need at least as many channels, got 4"):
        token_shift(torch.ones(1, 2, 4), 2, causal=False)
