"""Text that streams: each document once an epoch, cut into windows whoever reads."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from allmlp.data import PLACE, as_is, image_sources, text_stream
from allmlp.data.sampling import IGNORED
from allmlp.data.text import Masking
from allmlp.data.text_stream import Place, TokenStream, streamed_text
from allmlp.errors import UserError

SIZES = (5, 1, 11)


def _write(folder: Path) -> Path:
    """Documents of one letter each, a letter no other has: `aaa…` and so on."""
    number = 0
    for split, sizes in (("train", SIZES), ("val", (2,))):
        for shard, size in enumerate(sizes):
            texts = [chr(97 + number + i) * (3 + number % 4) for i in range(size)]
            pq.write_table(pa.table({"text": texts}), folder / f"{split}-{shard}.parquet", row_group_size=2)
            number += size
    return folder


def _stream(folder: Path, **settings: object) -> TokenStream:
    data = streamed_text(str(folder))
    arguments = {"batch_size": 2, "batches": 12, "seed": 0, "buffer": 3, **settings}
    return TokenStream(data.train, data.tokenizer, 8, **arguments)


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("epoch", [0, 1])
def test_readers_share_the_documents_out(tmp_path: Path, readers: int, epoch: int) -> None:
    stream = _stream(_write(tmp_path))
    found = [[text[0] for text in stream.documents(reader, readers, epoch)] for reader in range(readers)]
    assert sorted(letter for part in found for letter in part) == [chr(97 + i) for i in range(sum(SIZES))]
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_windows_follow_each_other(tmp_path: Path, processes: int, workers: int) -> None:
    _write(tmp_path)
    seen: set[str] = set()
    for process in range(processes):
        stream = _stream(tmp_path, process=process, processes=processes)
        batches = list(DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=as_is))
        assert len(batches) == len(stream) == 12
        # A worker's windows are one text: the label of a window's last token begins the next window.
        for number in range(max(workers, 1)):
            mine = batches[number :: max(workers, 1)]
            ids = torch.cat([batch["input_ids"] for batch in mine]).flatten()
            labels = torch.cat([batch["labels"] for batch in mine]).flatten()
            assert torch.equal(ids[1:], labels[:-1])
            seen |= {chr(token) for token in ids.tolist() if token < 256}
    assert seen == {chr(97 + i) for i in range(sum(SIZES))}


def test_masks_and_order_follow_the_seed(tmp_path: Path) -> None:
    _write(tmp_path)
    masking = Masking(share=0.3, mask_token=257, vocabulary=258)
    first, again, other = (list(_stream(tmp_path, masking=masking, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))
    kept = first[0]["labels"] == IGNORED
    assert kept.any()
    assert not kept.all()


def test_the_hub_s_shards_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path)
    files = {split: tuple(map(str, sorted(tmp_path.glob(f"{split}-*")))) for split in ("train", "val")}
    found = {"train": files["train"], "validation": files["val"]}
    asked: list[str] = []
    monkeypatch.setattr(image_sources, "hub_shards", lambda name: asked.append(name) or found)
    data = streamed_text("somebody/letters:en")
    assert asked == ["somebody/letters:en"]
    assert len(data.train) == sum(SIZES)
    with pytest.raises(UserError, match=r"There is no file or folder \./letters"):
        streamed_text("./letters")
    with pytest.raises(UserError, match="python-stdlib cannot be streamed"):
        streamed_text("python-stdlib")


def test_what_cannot_stream_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(UserError, match="cannot be streamed"):
        streamed_text(str(tmp_path))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match="nothing is held out"):
        streamed_text(str(tmp_path))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "val-0.parquet")
    with pytest.raises(UserError, match="1 documents for 2 processes"):
        list(_stream(tmp_path, processes=2))


def test_each_process_masks_its_own_tokens(tmp_path: Path) -> None:
    _write(tmp_path)
    masking = Masking(share=0.3, mask_token=257, vocabulary=258)
    one, other = (next(iter(_stream(tmp_path, masking=masking, process=rank, processes=2))) for rank in (0, 1))
    assert not torch.equal(one["labels"] == IGNORED, other["labels"] == IGNORED)


def test_each_epoch_takes_the_shards_in_another_order(tmp_path: Path) -> None:
    stream = _stream(_write(tmp_path), buffer=1)
    assert len({"".join(text[0] for text in stream.documents(0, 1, epoch)) for epoch in range(4)}) > 1


def test_each_epoch_shuffles_a_shard_anew(tmp_path: Path) -> None:
    for split in ("train", "val"):
        pq.write_table(pa.table({"text": list("abcdefghijklmnopqrst")}), tmp_path / f"{split}-0.parquet")
    stream = _stream(tmp_path, buffer=8)
    assert list(stream.documents(0, 1, 0)) != list(stream.documents(0, 1, 1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_a_stream_goes_on_from_the_places_of_its_readers(tmp_path: Path, workers: int, masked: bool) -> None:
    _write(tmp_path)
    masking = Masking(share=0.3, mask_token=257, vocabulary=258) if masked else None

    def batches(stream: TokenStream) -> list[dict]:
        return list(DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=as_is))

    whole = batches(_stream(tmp_path, masking=masking))
    for cut in (1, 2, 7, 11):
        stream = _stream(tmp_path, masking=masking)
        stream.go_on(cut, {batch[PLACE][0]: Place(*batch[PLACE]) for batch in whole[:cut]}.values())
        rest = batches(stream)
        assert rest[:cut] == [None] * cut
        for found, expected in zip(rest[cut:], whole[cut:], strict=True):
            assert found[PLACE] == expected[PLACE]
            assert torch.equal(found["input_ids"], expected["input_ids"])
            assert torch.equal(found["labels"], expected["labels"])


def test_what_was_read_is_not_made_tokens_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path)
    monkeypatch.setattr(text_stream, "_DOCUMENTS", 1)
    counted: list[str] = []
    real = text_stream.token_ids
    monkeypatch.setattr(text_stream, "token_ids", lambda texts, own: counted.extend(texts) or real(texts, own))
    whole = list(_stream(tmp_path))
    all_of_them = len(counted)
    counted.clear()
    stream = _stream(tmp_path)
    stream.go_on(10, [Place(*whole[9][PLACE])])
    list(stream)
    assert len(counted) < all_of_them / 3
    # Places among other readers say nothing, and what was given is read through.
    stream.go_on(10, [Place(0, 2, *whole[9][PLACE][2:])])
    again = list(stream)
    assert again[:10] == [None] * 10
    assert torch.equal(again[10]["input_ids"], whole[10]["input_ids"])
