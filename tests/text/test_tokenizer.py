"""Ids and back, control tokens in untrusted text, published folders, broken folders."""

import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from benthic.errors import TextError
from benthic.text import Tokenizer

MARKERS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜fim▁hole｜>"]


def published(folder, edit=lambda definition: None, **config):
    """A copy of the trained tokenizer as somebody else might have published it."""
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    edit(definition)
    base = {"bos_token": {"content": MARKERS[0], "lstrip": False}, "eos_token": MARKERS[1], "pad_token": MARKERS[1]}
    return Tokenizer(json.dumps(definition), base | config)


def test_importing_text_does_not_import_torch():
    code = "import sys, benthic.text; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.one_of(st.sampled_from(MARKERS), st.text(max_size=5)), max_size=6))
def test_text_never_becomes_a_control_token(tokenizer, parts):
    text = "".join(parts).encode(errors="ignore").decode()
    assert not tokenizer.special_ids & set(tokenizer.encode(text))


def test_control_tokens_are_parsed_where_asked(tokenizer):
    assert tokenizer.encode("<｜User｜>", parse_control=True) == [tokenizer.token_id("<｜User｜>")]
    assert tokenizer.encode("<｜User｜>") != [tokenizer.token_id("<｜User｜>")]


def test_markers_that_are_not_flagged_special_are_still_control_tokens(folder):
    """As in DeepSeek-V3's own file, where <｜User｜> and <think> say special: false."""

    def unflag(definition):
        for row in definition["added_tokens"]:
            row["special"] = row["content"] in MARKERS[:2]
        last = max(row["id"] for row in definition["added_tokens"])
        size = max(definition["model"]["vocab"].values()) + 1
        assert last < size
        definition["added_tokens"] += [
            {"id": size, "content": "<think>", "special": False},
            {"id": size + 1, "content": "    ", "special": False},
        ]
        for row in definition["added_tokens"][-2:]:
            row.update(single_word=False, lstrip=False, rstrip=False, normalized=False)

    found = published(folder, unflag)
    assert found.token_id("<think>") not in found.encode("<think>")
    assert found.token_id("<｜User｜>") not in found.encode("<｜User｜>")
    assert found.encode("<think>", parse_control=True) == [found.token_id("<think>")]
    assert found.encode("a    b")[1] == found.token_id("    ")
    assert found.decode([found.token_id("<think>"), found.bos_id], skip_special=True) == "<think>"


def test_special_ids_and_their_order(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.special_ids == frozenset(range(8))
    assert tokenizer.fim_ids == (4, 3, 5)


def test_bos_is_added_on_request(tokenizer):
    assert tokenizer.encode("def", add_bos=True) == [0, *tokenizer.encode("def")]
    assert tokenizer.add_bos_token


@given(st.lists(st.integers(0, 330), max_size=30), st.booleans())
def test_decoding_agrees_with_tokenizers(tokenizer, folder, ids, skip):
    oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(ids, skip_special=skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_ids_past_the_vocabulary_are_empty_and_negative_ones_refused(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""
    with pytest.raises(TextError, match="token id -1 is negative"):
        tokenizer.decode([-1])


def test_a_saved_folder_loads_here_and_in_transformers(tokenizer, folder):
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    text = "def grüße(x):\n\treturn 12345  # 🎉"
    assert ours.fingerprint == tokenizer.fingerprint
    assert ours.encode(text, add_bos=True) == theirs(text).input_ids
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == ours.vocab_size


def test_a_batch_is_encoded_like_its_texts(tokenizer):
    texts = ["one", "", "two 2"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_truncation_left_in_a_file_is_ignored(folder):
    def truncate(definition):
        definition["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}

    assert len(published(folder, truncate).encode("a b c d e f")) > 2


def test_whether_bos_is_added_is_read_from_the_post_processor_when_the_config_is_silent(folder):
    def without(definition):
        definition["post_processor"] = None

    assert published(folder).add_bos_token
    assert not published(folder, without).add_bos_token
    assert not published(folder, add_bos_token=False).add_bos_token


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(TextError, match="cannot be encoded as UTF-8"):
        tokenizer.encode("\ud800")


def test_a_missing_file_says_what_was_found(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TextError, match=r"no tokenizer\.json in .* \(found tokenizer\.model\)"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(TextError, match=r"no tokenizer\.json in"):
        Tokenizer.from_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list, not a JSON object"),
        ("{}", "has no 'model'; it is not a tokenizer.json"),
        ('{"model": {}, "decoder": {"type": "WordPiece"}}', "decoder WordPiece is not supported; allowed: ByteLevel"),
        (
            '{"model": {}, "decoder": {"type": "ByteLevel"}, "added_tokens": [{"id": 3}]}',
            "every one of added_tokens needs an id and its content",
        ),
        (
            '{"model": {"type": "Nonsense"}, "decoder": {"type": "ByteLevel"}}',
            "not a tokenizer that `tokenizers` reads",
        ),
    ],
)
def test_a_corrupt_file_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TextError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_special_token_outside_the_vocabulary_is_refused(folder):
    with pytest.raises(TextError, match="eos_token '<｜end▁of▁sentense｜>' is not in the vocabulary") as caught:
        published(folder, eos_token="<｜end▁of▁sentense｜>")
    assert caught.value.hint == "did you mean '<｜end▁of▁sentence｜>'?"


def test_a_folder_that_cannot_be_written_is_a_clear_error(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TextError, match="cannot write"):
        tokenizer.save(tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": 3}, "decoder must be an object, or a sequence of them"),
        ({"decoder": {"decoders": [3]}}, "decoder must be an object, or a sequence of them"),
        ({"added_tokens": 3}, "every one of added_tokens needs an id and its content"),
        ({"added_tokens": [{"id": "x", "content": "a"}]}, "every one of added_tokens needs an id and its content"),
    ],
)
def test_parts_of_other_types_are_refused(tmp_path, changes, message):
    content = {"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}} | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TextError, match=message):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["[" * 9000, '{"model": ' + "9" * 5000 + "}"])
def test_hostile_json_is_a_text_error(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TextError, match="is not JSON"):
        Tokenizer.from_folder(tmp_path)


def test_a_special_token_that_is_no_text_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": [3]}')
    with pytest.raises(TextError, match=r"bos_token is \[3\] in tokenizer_config.json of .*; it must be a token"):
        Tokenizer.from_folder(tmp_path)
