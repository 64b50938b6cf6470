import io
import tarfile

import pytest

from allmlp.data import text_sources
from allmlp.data.labelled_texts import read_labelled_texts
from allmlp.data.text_sources import STDLIB, TextFile, find_texts, read_tables, standard_library
from allmlp.errors import UserError
from tests.data.texts import LINES, TEXT, write_table, write_text


def test_a_text_file_is_read_in_pieces_that_end_with_lines(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(text_sources, "_PIECE", 100)
    text = TEXT.replace("fox", "füchsße 🦊")
    part = find_texts(write_text(tmp_path / "a.txt", text))["train"]
    pieces = list(part)
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert bytes(part.raw()) == text.encode()


def test_a_line_longer_than_a_piece_is_kept_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(text_sources, "_PIECE", 10)
    part = find_texts(write_text(tmp_path / "a.txt", "x" * 1000 + "é" * 100))["train"]
    assert "".join(part) == "x" * 1000 + "é" * 100


def test_a_large_file_is_many_pieces_for_a_tokenizers_threads(tmp_path) -> None:
    pieces = list(find_texts(write_text(tmp_path / "a.txt", "a line\n" * 100_000))["train"])
    assert len(pieces) >= 10
    assert max(map(len, pieces)) < 2**17


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_cut_splits_no_character(tmp_path, share) -> None:
    text = "äöü€🦊" * 40
    first, last = find_texts(write_text(tmp_path / "a.txt", text))["train"].cut(share)
    assert "".join(first) + "".join(last) == text
    size = len(text.encode())
    assert (last.stop - last.start) / size == pytest.approx(share, abs=4 / size)


@pytest.mark.parametrize("piece", [4, 7, 2**22])
def test_what_is_not_utf8_is_located(tmp_path, monkeypatch, piece) -> None:
    monkeypatch.setattr(text_sources, "_PIECE", piece)
    path = tmp_path / "a.txt"
    path.write_bytes("eins\nzw€\n".encode() + b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"a.txt is not UTF-8: byte 14 \(line 3\) is 0xE9.*--tokenizer bytes"):
        list(find_texts(str(path))["train"])
    assert bytes(find_texts(str(path))["train"].raw()) == path.read_bytes()


def test_a_folder_of_texts_has_separate_documents(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in (("b/2.txt", "two"), ("1.txt", "one"), ("b/3.txt", "")):
        write_text(tmp_path / name, text)
    part = find_texts(str(tmp_path))["train"]
    assert list(part) == ["one", "two", ""]
    assert part.separated
    first, last = part.cut(0.3)
    assert (list(first), list(last)) == (["one", "two"], [""])


def test_hidden_files_and_those_of_hidden_folders_are_no_texts(tmp_path) -> None:
    write_text(tmp_path / "a.txt", "seen")
    for name in ("._a.txt", ".ipynb_checkpoints/a.txt", "more/.x/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\xb0")
    write_text(tmp_path / "more" / "b.txt", "too")
    assert list(find_texts(str(tmp_path))["train"]) == ["seen", "too"]


def test_what_is_no_table_has_no_columns(tmp_path) -> None:
    path = write_text(tmp_path / "a.txt", "one")
    for data in (path, str(tmp_path), STDLIB):
        with pytest.raises(UserError, match="is no table, so it has no column 'story'; leave --text-column out"):
            find_texts(data, "story")
        with pytest.raises(UserError, match=r"is no table; texts with classes come from"):
            read_labelled_texts(data)


@pytest.mark.parametrize("rest", ["", "/of/more"])
def test_a_folder_of_texts_may_have_splits(tmp_path, rest) -> None:
    for split in ("train", "val", "test", "notes"):
        (tmp_path / f"{split}{rest}").mkdir(parents=True)
        write_text(tmp_path / f"{split}{rest}" / "a.txt", split)
    assert {split: list(part) for split, part in find_texts(str(tmp_path)).items()} == {
        "train": ["train"],
        "validation": ["val"],
    }


def test_split_files_are_one_text_each(tmp_path) -> None:
    for split in ("train", "Valid", "test"):
        write_text(tmp_path / f"{split}.txt", split)
    found = find_texts(str(tmp_path))
    assert {split: "".join(part) for split, part in found.items()} == {"train": "train", "validation": "Valid"}
    assert not any(part.separated for part in found.values())
    # Other names are no splits.
    (tmp_path / "train.txt").rename(tmp_path / "training_log.txt")
    assert len(list(find_texts(str(tmp_path))["train"])) == 3


@pytest.mark.parametrize("name", ["a.txt.gz", "a.zip", "a.ZST"])
def test_what_is_packed_is_no_text(tmp_path, name) -> None:
    with pytest.raises(UserError, match=f"{name} is packed, and its bytes are no text: unpack it"):
        find_texts(write_text(tmp_path / name, "PK"))


def write_tar(path, texts: list[bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for number, text in enumerate(texts):
            member = tarfile.TarInfo(f"{number:03}.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return str(path)


def test_texts_in_tar_files(tmp_path) -> None:
    write_tar(tmp_path / "train-0.tar", [b"one", "zwö".encode()])
    path = write_tar(tmp_path / "val-0.tar", [b"three"])
    found = find_texts(str(tmp_path))
    assert {split: list(part) for split, part in found.items()} == {"train": ["one", "zwö"], "validation": ["three"]}
    one = find_texts(path)["train"]
    assert list(one) == ["three"]
    with pytest.raises(UserError, match=r"Nothing is held out of shards such as .*val-0.tar: give some for validation"):
        one.cut(0.5)
    with pytest.raises(UserError, match=r"holds \.tar files, whose rows can be read as texts, but not as a table"):
        read_labelled_texts(path)
    broken = find_texts(write_tar(tmp_path / "latin.tar", [b"one", b"caf\xe9"]))["train"]
    with pytest.raises(UserError, match=r"latin.tar.* is not UTF-8: byte 3 is 0xE9; convert the text"):
        list(broken)


def test_a_csv_file_is_taken_at_its_word(tmp_path) -> None:
    words = ["NA", "None", "null", "007", "1e5", "", "nan"]
    path = write_text(tmp_path / "rows.CSV", "\n".join(["text,number", *(f'"{word}",3' for word in words)]))
    assert list(find_texts(path)["train"]) == words


def test_json_lines_are_a_table(tmp_path) -> None:
    path = write_text(tmp_path / "rows.jsonl", '{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n')
    assert list(find_texts(path)["train"]) == ["one", "two"]


def test_rows_are_counted_from_the_whole(tmp_path) -> None:
    path = write_table(tmp_path / "rows.parquet", {"text": [*LINES[:19], None]})
    with pytest.raises(UserError, match=r"Row 19 of .* holds no text"):
        list(find_texts(path)["train"].cut(0.2)[1])


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv"])
def test_tables_give_a_column_of_texts(tmp_path, name) -> None:
    path = write_table(tmp_path / name, {"number": list(range(200)), "content": LINES})
    part = find_texts(path)["train"]
    assert list(part) == LINES
    first, last = part.cut(0.1)
    assert list(first) + list(last) == LINES
    assert len(list(last)) == 20
    with pytest.raises(UserError, match="has no column 'text'; its columns are number, content"):
        find_texts(path, "text")
    if name.endswith(".csv"):
        assert list(find_texts(path, "number")["train"])[:3] == ["0", "1", "2"]
        return
    with pytest.raises(UserError, match=r"Row 0 of .* holds no text, but int"):
        list(find_texts(path, "number")["train"])


def test_a_folder_of_parquet_files_has_splits(tmp_path) -> None:
    write_table(tmp_path / "train-0.parquet", {"text": ["a"]})
    write_table(tmp_path / "train-1.parquet", {"text": ["b"]})
    write_table(tmp_path / "test-0.parquet", {"text": ["c"]})
    found = find_texts(str(tmp_path))
    assert {split: list(part) for split, part in found.items()} == {"train": ["a", "b"], "validation": ["c"]}


def test_the_standard_library_is_the_same_each_time() -> None:
    part = find_texts(STDLIB)["train"]
    names = [path.name for path in standard_library().texts]
    assert [path.name for path in part.texts] == names
    assert "argparse.py" in names
    assert not any("site-packages" in path.parts or "test" in path.parts for path in part.texts)
    assert "class ArgumentParser" in next(text for text in part if '"""Command-line parsing library' in text)


def test_what_cannot_be_found_is_refused(tmp_path) -> None:
    write_text(tmp_path / "empty.txt", "")
    with pytest.raises(UserError, match=r"empty.txt is empty"):
        find_texts(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match=r"There is no file or folder ./nothing.txt"):
        find_texts("./nothing.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"holds neither .txt nor .parquet nor .tar files"):
        find_texts(str(tmp_path / "folder"))
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"broken.parquet cannot be read as text"):
        read_tables(str(tmp_path / "broken.parquet"))
    path = write_table(tmp_path / "rows.parquet", {"number": [1], "words": ["a"]})
    with pytest.raises(UserError, match=r"no column of text with a usual name; .* number, words.*--text-column"):
        find_texts(path)
    single = TextFile(path=tmp_path / "empty.txt", start=0, stop=0)
    assert list(single) == []


def test_a_single_document_cannot_be_held_out(tmp_path) -> None:
    write_text(tmp_path / "1.txt", "one")
    with pytest.raises(UserError, match="has a single document: none can be held out"):
        find_texts(str(tmp_path))["train"].cut(0.1)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.35, 0.4, 0.5])
def test_characters_of_several_bytes_are_held_out_whole(tmp_path, share) -> None:
    text = "é" * 10 + "ab"
    parts = find_texts(write_text(tmp_path / "a.txt", text))["train"].cut(share)
    assert "".join(piece for part in parts for piece in part) == text


def test_a_text_that_ends_inside_a_character_is_refused(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes("words é".encode()[:-1])
    with pytest.raises(UserError, match="is not UTF-8: byte 6"):
        list(find_texts(str(tmp_path / "a.txt"))["train"])
