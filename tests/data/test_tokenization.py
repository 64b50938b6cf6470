import resource

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from allmlp.data.text_sources import find_texts
from allmlp.data.tokenization import (
    BYTES,
    CHARACTERS,
    END,
    encode,
    first_tokens,
    fitting_tokenizer,
    load_tokenizer,
    make_tokenizer,
)
from allmlp.errors import UserError
from allmlp.language import GMLPConfig, GMLPForCausalLM
from tests.data.texts import TEXT, write_table, write_text

STRANGE = "naïve façade 🦊\t\r\n\u2028 end"


@pytest.fixture(params=[BYTES, CHARACTERS, "trained"])
def tokenizer(request, tmp_path):
    texts = find_texts(write_text(tmp_path / "vocabulary.txt", TEXT + STRANGE)).values()
    size = 300 if request.param == "trained" else None
    return make_tokenizer(request.param, texts, trained_size=size)


def test_every_text_comes_back(tokenizer, tmp_path) -> None:
    text = STRANGE + TEXT[:500]
    found = encode(find_texts(write_text(tmp_path / "a.txt", text))["train"], tokenizer)
    assert tokenizer.decode(found.ids.tolist()) == text
    assert found.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (found.characters, found.bytes, found.unknown) == (len(text), len(text.encode()), 0)


def test_documents_end_with_the_end_of_text(tokenizer, tmp_path) -> None:
    path = write_table(tmp_path / "rows.parquet", {"text": ["line 1", "", "the fox"]})
    ids = encode(find_texts(path)["train"], tokenizer).ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 3
    assert tokenizer.decode(ids) == f"line 1{END}{END}the fox{END}"


def test_tokenizers_are_saved_with_everything_they_need(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    part = find_texts(write_text(tmp_path / "a.txt"))["train"]
    assert np.array_equal(encode(part, loaded).ids, encode(part, tokenizer).ids)
    assert (loaded.eos_token, loaded.pad_token_id, loaded.padding_side) == (END, loaded.eos_token_id, "left")
    assert loaded.mask_token_id == tokenizer.mask_token_id < len(loaded)
    assert loaded("\nfox", add_special_tokens=False) == tokenizer("\nfox", add_special_tokens=False)


def test_bytes_are_their_own_numbers_and_need_not_be_text(tmp_path) -> None:
    path = tmp_path / "binary.txt"
    path.write_bytes(bytes(range(256)) * 2)
    tokenizer = make_tokenizer(BYTES, [])
    found = encode(find_texts(str(path))["train"], tokenizer)
    assert found.ids.tolist() == list(range(256)) * 2
    assert found.ids.dtype == np.uint8
    assert len(tokenizer) == 258


@pytest.mark.parametrize(("vocabulary", "tokens"), [(256, 256), (257, 256), (258, 258), (300, 258)])
def test_bytes_fit_the_vocabulary_of_a_model(vocabulary: int, tokens: int) -> None:
    model = GMLPForCausalLM(GMLPConfig.named("gmlp_nano", vocab_size=vocabulary, num_hidden_layers=1))
    tokenizer = fitting_tokenizer(BYTES, model)
    assert len(tokenizer) == tokens
    assert tokenizer("aß")["input_ids"] == list("aß".encode())
    assert tokenizer(["a", "bc"], padding=True)["attention_mask"] == [[0, 1], [1, 1]]


def test_a_tokenizer_that_fits_no_model_is_refused(tmp_path) -> None:
    model = GMLPForCausalLM(GMLPConfig.named("gmlp_nano", vocab_size=100, num_hidden_layers=1))
    with pytest.raises(UserError, match="bytes has 256 tokens, the model a vocabulary of 100"):
        fitting_tokenizer(BYTES, model)
    with pytest.raises(UserError, match="which characters the model knows is not known"):
        fitting_tokenizer(CHARACTERS, model)
    with pytest.raises(UserError, match="only a language model has a tokenizer"):
        fitting_tokenizer(BYTES, nn.Linear(2, 2))


def test_characters_count_what_they_do_not_know(tmp_path) -> None:
    tokenizer = make_tokenizer(CHARACTERS, find_texts(write_text(tmp_path / "a.txt", "abc\n")).values())
    found = encode(find_texts(write_text(tmp_path / "b.txt", "cab ü"))["train"], tokenizer)
    assert found.unknown == 2
    assert tokenizer.convert_ids_to_tokens(found.ids.tolist()) == ["c", "a", "b", "<|unknown|>", "<|unknown|>"]
    assert tokenizer("cab ü")["input_ids"] == found.ids.tolist()


def test_a_trained_tokenizer_joins_what_is_frequent(tmp_path) -> None:
    texts = list(find_texts(write_text(tmp_path / "a.txt")).values())
    tokenizer = make_tokenizer(BYTES, texts, trained_size=400)
    assert len(tokenizer) == 401  # and the mask
    assert len(encode(texts[0], tokenizer)) < len(TEXT) / 3
    with pytest.raises(UserError, match=r"needs at least 257 tokens.*got 100"):
        make_tokenizer(BYTES, texts, trained_size=100)


def test_any_tokenizer_of_the_tokenizers_library_serves(tmp_path) -> None:
    texts = list(find_texts(write_text(tmp_path / "a.txt")).values())
    make_tokenizer(BYTES, texts, trained_size=300).backend_tokenizer.save(str(tmp_path / "own.json"))
    tokenizer = make_tokenizer(str(tmp_path / "own.json"), [])
    assert tokenizer.eos_token == END
    assert tokenizer.decode(encode(texts[0], tokenizer).ids.tolist()) == TEXT


def test_what_is_no_tokenizer_is_refused(tmp_path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    for name in (tmp_path / "broken.json", tmp_path):
        with pytest.raises(UserError, match="is no tokenizer: neither bytes nor characters, nor a file"):
            load_tokenizer(name)


def test_a_vocabulary_may_be_larger_than_sixteen_bits(tmp_path) -> None:
    words = {f"w{number}": number for number in range(2**16 + 10)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = write_text(tmp_path / "a.txt", "w1 w65540")
    tokens = encode(find_texts(path)["train"], PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokens.ids.tolist() == [1, 65540]


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(tmp_path) -> None:
    backend = make_tokenizer(BYTES, []).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(tmp_path / "ends")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "bare")
    assert load_tokenizer(tmp_path / "ends").pad_token == END
    bare = load_tokenizer(tmp_path / "bare")
    assert bare.pad_token is None
    with pytest.raises(UserError, match="neither padding nor an end of text to fill up shorter texts with"):
        first_tokens(["a"], bare, 4)


@pytest.mark.parametrize("count", [1, 7, 40])
def test_first_tokens_are_the_tokenizer_s_own(tokenizer, count) -> None:
    texts = [STRANGE, END * 50 + "fox", "", "fox" + END + TEXT]
    wanted = tokenizer(texts, truncation=True, max_length=count)["input_ids"]
    found = [ids.tolist() for ids in first_tokens(texts, tokenizer, count)]
    assert found == [ids or [tokenizer.eos_token_id] for ids in wanted]


def test_a_text_without_tokens_is_an_end_of_text() -> None:
    backend = Tokenizer(models.WordLevel({"fox": 0, END: 1}, unk_token="fox"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    assert [ids.tolist() for ids in first_tokens(["  ", "fox", ""], tokenizer, 4)] == [[1], [0], [1]]


def test_tokens_that_find_no_room_say_where(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    part = find_texts(write_text(tmp_path / "a.txt", "fox " * 100_000))["train"]
    tokenizer = make_tokenizer(CHARACTERS, [part])
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        with pytest.raises(
            UserError, match=rf"do not fit into {tmp_path}, .*: File too large\. Name a folder .* TMPDIR"
        ):
            encode(part, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert len(encode(part, tokenizer)) == 400_000
