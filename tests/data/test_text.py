import numpy as np
import pytest
import torch

from allmlp.data.sampling import IGNORED
from allmlp.data.text import Masking, TokenWindows, load_text
from allmlp.data.tokenization import Tokens
from allmlp.errors import UserError
from tests.data.texts import TEXT, write_table, write_text


def numbers(count: int) -> Tokens:
    return Tokens(ids=np.arange(count, dtype=np.uint16), characters=count, bytes=count)


def everything(windows: TokenWindows) -> dict[str, torch.Tensor]:
    batches = [windows[index] for index in range(len(windows))]
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels")}


@pytest.mark.parametrize("count", [9, 17, 18, 24, 25, 100])
def test_evaluation_predicts_every_token_once(count) -> None:
    windows = TokenWindows(numbers(count), 8)
    found = everything(windows)
    labels = found["labels"][found["labels"] != IGNORED]
    assert labels.tolist() == list(range(1, count))
    kept = found["labels"] != IGNORED
    assert torch.equal(found["input_ids"][kept] + 1, found["labels"][kept])
    assert torch.equal(windows[0]["labels"], windows[0]["shift_labels"])


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_overlapping_windows_count_each_token_once_with_the_most_context(stride) -> None:
    found = everything(TokenWindows(numbers(30), 8, stride=stride))
    kept = found["labels"] != IGNORED
    assert sorted(found["labels"][kept].tolist()) == list(range(1, 30))
    assert not kept[1:, : 8 - stride].any()


@pytest.mark.parametrize("count", [9, 64, 65, 100])
def test_an_epoch_of_training_takes_every_token_and_each_begins_elsewhere(count) -> None:
    windows = TokenWindows(numbers(count), 8, seed=0)
    starts = set()
    for epoch in range(6):
        windows.set_epoch(epoch)
        found = everything(windows)
        assert set(found["labels"].flatten().tolist()) == set(range(1, count))
        assert torch.equal(found["labels"], found["input_ids"] + 1)
        assert len(found["labels"]) == -(-(count - 1) // 8)
        starts.add(int(found["input_ids"][0, 0]))
    assert len(starts) > 1


def test_a_batch_is_its_windows() -> None:
    windows = TokenWindows(numbers(100), 8, masking=Masking(share=0.3, mask_token=100, vocabulary=100), seed=0)
    together = windows.__getitems__([3, 1, 7])
    for row, index in enumerate([3, 1, 7]):
        for name, value in windows[index].items():
            assert torch.as_tensor(together[name][row] == value[0]).all()


def test_masks_follow_the_shares() -> None:
    masking = Masking(share=0.15, mask_token=1000, vocabulary=1000)
    windows = TokenWindows(numbers(50_000), 500, masking=masking, seed=0)
    found = everything(windows)
    chosen = found["labels"] != IGNORED
    original = torch.arange(50_000).view(100, 500) % 50_000
    assert torch.equal(found["labels"][chosen], original[chosen])
    assert torch.equal(found["input_ids"][~chosen], original[~chosen])
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    masked = found["input_ids"][chosen] == 1000
    kept = found["input_ids"][chosen] == original[chosen]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_masks_change_with_the_epoch_and_repeat_with_the_seed() -> None:
    masking = Masking(share=0.5, mask_token=50, vocabulary=50)
    first, same, evaluated = (TokenWindows(numbers(50), 10, masking=masking, seed=s) for s in (0, 0, None))
    assert torch.equal(everything(first)["labels"], everything(same)["labels"])
    before = everything(evaluated)["labels"]
    first.set_epoch(1)
    evaluated.set_epoch(1)
    assert not torch.equal(everything(first)["labels"], everything(same)["labels"])
    assert len(everything(evaluated)["labels"]) == 5
    assert before.shape == everything(evaluated)["labels"].shape


def test_the_last_masked_window_of_evaluation_is_padded() -> None:
    masking = Masking(share=0.99, mask_token=50, vocabulary=50)
    batch = TokenWindows(numbers(13), 10, masking=masking)[1]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert (batch["labels"][0, 3:] == IGNORED).all()


def test_a_text_of_which_nothing_is_masked_is_refused() -> None:
    masking = Masking(share=1e-9, mask_token=50, vocabulary=50)
    with pytest.raises(UserError, match="of the text's 13 tokens none is masked: give more text"):
        TokenWindows(numbers(13), 10, masking=masking)


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"the text has 8 tokens, too few for windows of 8.*--context"):
        TokenWindows(numbers(8), 8, seed=0)
    assert len(TokenWindows(numbers(8), 8)) == 1
    with pytest.raises(UserError, match="the text has 1 tokens"):
        TokenWindows(numbers(1), 8)
    with pytest.raises(UserError, match="the stride must be from 1 to the context of 8, got 9"):
        TokenWindows(numbers(80), 8, stride=9)


def test_the_last_share_is_held_out(tmp_path) -> None:
    data = load_text(write_text(tmp_path / "a.txt"), holdout=0.2)
    cut = int(len(TEXT) * 0.8)
    assert bytes(data.train.ids) == TEXT[:cut].encode()
    assert bytes(data.validation.ids) == TEXT[cut:].encode()


def test_a_validation_split_of_its_own_is_used(tmp_path) -> None:
    write_table(tmp_path / "train.parquet", {"text": ["abc", "de"]})
    write_table(tmp_path / "val.parquet", {"text": ["f"]})
    data = load_text(str(tmp_path), tokenizer_name="characters")
    assert data.tokenizer.decode(data.train.ids.tolist(), skip_special_tokens=True) == "abcde"
    assert data.tokenizer.decode(data.validation.ids.tolist(), skip_special_tokens=True) == "f"


def test_each_epoch_masks_other_tokens() -> None:
    tokens = Tokens(ids=np.arange(400) % 200, characters=400, bytes=400)
    windows = TokenWindows(tokens, 64, masking=Masking(share=0.3, mask_token=257, vocabulary=258), seed=0)
    first = windows.__getitems__([0, 1])["labels"] == IGNORED
    windows.set_epoch(1)
    assert not torch.equal(windows.__getitems__([0, 1])["labels"] == IGNORED, first)
