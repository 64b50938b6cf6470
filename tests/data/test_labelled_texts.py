from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from allmlp.data.labelled_texts import LabelledTexts, TextBatches, load_labelled_texts, read_labelled_texts
from allmlp.data.tokenization import make_tokenizer
from allmlp.errors import UserError
from tests.data.texts import labelled, write_table


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv"])
def test_each_class_is_held_out_in_its_share(tmp_path, name) -> None:
    rows = labelled()
    classes, train, held_out = load_labelled_texts(write_table(tmp_path / name, rows), holdout=0.2, seed=0)
    assert classes == ("animals", "plants")
    assert np.bincount(train.labels).tolist() == [24, 24]
    assert np.bincount(held_out.labels).tolist() == [6, 6]
    pairs = {*zip(rows["text"], rows["label"], strict=True)}
    for part in (train, held_out):
        assert all((text, classes[label]) in pairs for text, label in zip(part.texts, part.labels, strict=True))
    again = load_labelled_texts(str(tmp_path / name), holdout=0.2, seed=0)[2]
    assert list(again.texts) == list(held_out.texts)


def test_numbers_and_class_labels_are_classes_too(tmp_path) -> None:
    write_table(tmp_path / "n.csv", {"text": ["a", "b", "c"], "label": [10, 2, 10]})
    classes, splits = read_labelled_texts(str(tmp_path / "n.csv"))
    assert classes == ("2", "10")
    assert splits["train"].labels.tolist() == [1, 0, 1]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features).to_parquet(str(tmp_path / "c.parquet"))
    classes, splits = read_labelled_texts(str(tmp_path / "c.parquet"))
    assert (classes, splits["train"].labels.tolist()) == (("no", "yes"), [1, 0])


def test_batches_are_padded_and_cut() -> None:
    tokenizer = make_tokenizer("bytes", [])
    texts = LabelledTexts(texts=["abcdefgh", "ab", ""], labels=np.array([1, 0, 1]))
    batch = TextBatches(texts, tokenizer, 5).__getitems__([0, 1, 2])
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 1]
    assert batch["input_ids"][0].tolist() == [*b"abcde"]
    assert batch["input_ids"][1, -2:].tolist() == [*b"ab"]


def test_texts_become_tokens_once() -> None:
    texts = LabelledTexts(texts=["fox", "", " "], labels=np.array([1, 0, 1]))
    tokenizer = make_tokenizer("bytes", [])
    batches = TextBatches(texts, tokenizer, 5)
    batches.tokenizer = SimpleNamespace(pad_token_id=7, padding_side="right")
    batch = batches.__getitems__([1, 0])
    assert batch["input_ids"].tolist() == [[tokenizer.eos_token_id, 7, 7], [*b"fox"]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["names"] == ["", "fox"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", "b"], "label": ["x", None]}, r"Row 1 of .* \(train\) has no class in column 'label'"),
        ({"text": ["a", "b"], "label": ["x", ""]}, r"Row 1 of .* \(train\) has no class in column 'label'"),
        ({"text": ["a", None], "label": ["x", "y"]}, r"Row 1 of .* \(train\) has no text in column 'text'"),
        ({"text": ["a", "b"], "kind": ["x", "y"]}, "no column of classes with a usual name.*--label-column"),
    ],
)
def test_bad_tables_are_refused(tmp_path, columns, message) -> None:
    with pytest.raises(UserError, match=message):
        read_labelled_texts(write_table(tmp_path / "rows.parquet", columns))


def test_lists_are_no_classes(tmp_path) -> None:
    path = write_table(tmp_path / "rows.parquet", {"text": ["a", "b"], "label": [[1], [2]]})
    with pytest.raises(UserError, match=r"Column 'label' of .*rows.parquet holds no classes, but values of type list"):
        read_labelled_texts(path)


def test_dates_are_classes_too(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    # What looks like a date, datasets reads as one.
    path.write_text('{"text": "a", "label": "2021-02-03"}\n{"text": "b", "label": "2020-01-01"}\n')
    classes, splits = read_labelled_texts(str(path))
    assert classes == ("2020-01-01 00:00:00", "2021-02-03 00:00:00")
    assert splits["train"].labels.tolist() == [1, 0]


def test_classes_of_a_csv_file_may_have_any_name(tmp_path) -> None:
    names = ["NA", "None", "10", "9", "-1"]
    path = write_table(tmp_path / "rows.csv", {"text": list("abcde"), "label": names})
    assert read_labelled_texts(path)[0] == ("9", "10", "-1", "NA", "None")


def test_one_class_can_be_evaluated_and_not_learnt(tmp_path) -> None:
    path = write_table(tmp_path / "rows.parquet", {"text": ["a", "b"], "label": ["x", "x"]})
    assert read_labelled_texts(path)[0] == ("x",)
    with pytest.raises(UserError, match="has 1 class; telling texts apart takes at least two"):
        load_labelled_texts(path, holdout=0.5, seed=0)


def test_unknown_classes_and_single_texts_are_refused(tmp_path) -> None:
    write_table(tmp_path / "train.parquet", {"text": ["a", "b"], "label": ["x", "y"]})
    write_table(tmp_path / "test.parquet", {"text": ["a"], "label": ["z"]})
    with pytest.raises(UserError, match=r"Row 0 of .* \(validation\) has the class 'z', which training has not"):
        read_labelled_texts(str(tmp_path))
    with pytest.raises(UserError, match=r"Class 'x' of .* has a single text, so none can be held out"):
        load_labelled_texts(str(tmp_path / "train.parquet"), holdout=0.1, seed=0)


def test_small_shares_still_hold_out_one_of_each_class(tmp_path) -> None:
    path = write_table(tmp_path / "rows.parquet", labelled(8))
    _, train, held_out = load_labelled_texts(path, holdout=0.01, seed=0)
    assert np.bincount(train.labels).tolist() == [3, 3]
    assert np.bincount(held_out.labels).tolist() == [1, 1]
