"""From a config to tokens on disk: what is written, reused, refused, and never left half done."""

import errno
import json
import os

import numpy as np
import pytest
import torch

from benthic.config.data import DataConfig
from benthic.data import Dataset, Loader, compress, prepare, validation_batches
from benthic.data.sources import open_source
from benthic.data.splits import split
from benthic.errors import CapacityError, DataError, TextError
from benthic.text import train_tokenizer


def texts_of(config, which):
    return [
        document.text for name, document in split(open_source(config).read, config.validation_fraction) if name == which
    ]


def test_the_stream_is_bos_text_eos_of_every_document(dataset, procedural_config):
    tokenizer = dataset.tokenizer
    for name, source in (("train", dataset.train), ("validation", dataset.validation)):
        texts = texts_of(procedural_config, name)
        expected = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        assert source.tokens.tolist() == [one for ids in expected for one in ids]
        assert source.offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
        assert source.facts.text_bytes == sum(len(text.encode()) for text in texts)
        assert dataset.text(name) == "".join(texts).encode()
        assert source.tokens.dtype == np.uint16


def test_bytes_of_validation_labels_are_exact(dataset):
    for length in (16, 7):
        batches = validation_batches(dataset.validation, length, 4)
        counted = sum(int(dataset.token_bytes[batch.tokens[:, 1:]].sum()) for batch in batches)
        assert counted == dataset.manifest.validation.text_bytes


def test_special_tokens_stand_for_no_bytes(dataset):
    special = torch.tensor(sorted(dataset.tokenizer.special_ids))
    assert dataset.token_bytes[special].sum() == 0
    assert dataset.token_bytes.dtype == torch.int64
    assert len(dataset.token_bytes) == dataset.tokenizer.vocab_size


def test_the_second_run_needs_no_work(dataset, procedural_config, monkeypatch, caplog):
    monkeypatch.setattr("benthic.data.preparation.train_tokenizer", None)
    before = {path: path.stat().st_mtime_ns for path in dataset.folder.rglob("*")}
    with caplog.at_level("INFO", "benthic"):
        again = prepare(procedural_config, dataset.folder)
    assert again.manifest == dataset.manifest
    assert {path: path.stat().st_mtime_ns for path in dataset.folder.rglob("*")} == before
    assert "reusing the tokens" in caplog.text


def test_preparing_twice_gives_the_same_bytes(dataset, procedural_config, tmp_path):
    assert prepare(procedural_config, tmp_path).manifest == dataset.manifest


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 301}, {"seed": 1}, {"validation_fraction": 0.2}, {"fim_rate": 0.5}, {"procedural_bytes": 9000}],
)
def test_a_change_of_what_decides_the_tokens_prepares_again(procedural_config, tmp_path, change, caplog):
    config = procedural_config.replace(procedural_bytes=8000)
    first = prepare(config, tmp_path)
    with caplog.at_level("INFO", "benthic"):
        second = prepare(config.replace(**change), tmp_path)
    assert second.manifest.key != first.manifest.key
    assert "preparing again, because the text, the split or the tokenizer changed" in caplog.text
    assert prepare(config.replace(**change, sequence_length=9), tmp_path).manifest == second.manifest


def test_a_damaged_folder_is_prepared_again_and_says_why(procedural_config, tmp_path, caplog):
    config = procedural_config.replace(procedural_bytes=8000)
    first = prepare(config, tmp_path)
    (tmp_path / "train.bin").write_bytes(b"xx")
    assert prepare(config, tmp_path).manifest == first.manifest
    assert "preparing again, because" in caplog.text
    assert "train.bin has 2 bytes; its manifest says" in caplog.text


def test_documents_are_listed_with_their_hashes(dataset):
    rows = [json.loads(line) for line in (dataset.folder / "documents.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "validation"}
    assert sum(row["bytes"] for row in rows if row["split"] == "train") == dataset.manifest.train.text_bytes
    assert all(len(row["sha256"]) == 64 for row in rows)


def test_fill_in_the_middle_touches_training_documents_only(procedural_config, tmp_path):
    config = procedural_config.replace(procedural_bytes=20_000, fim_rate=1.0)
    found = prepare(config, tmp_path)
    begin, hole, end = found.tokenizer.fim_ids
    first = found.train.tokens[: found.train.offsets[1]].tolist()
    assert first[:2] == [found.tokenizer.bos_id, begin]
    assert first[-1] == found.tokenizer.eos_id
    prefix, rest = first[2 : first.index(hole)], first[first.index(hole) + 1 : -1]
    suffix, middle = rest[: rest.index(end)], rest[rest.index(end) + 1 :]
    assert found.tokenizer.decode(prefix + middle + suffix) == texts_of(config, "train")[0]
    assert not {begin, hole, end} & set(found.validation.tokens.tolist())


def test_a_published_tokenizer_is_used_and_kept_beside_the_tokens(procedural_config, tmp_path):
    published = train_tokenizer(["1 + 2 = 3\n" * 9], 280)
    published.save(tmp_path / "published")
    config = procedural_config.replace(procedural_bytes=8000, tokenizer=str(tmp_path / "published"))
    assert prepare(config, tmp_path / "data").tokenizer.fingerprint == published.fingerprint


def test_a_large_vocabulary_needs_wider_ids(procedural_config, tmp_path, monkeypatch):
    monkeypatch.setattr("benthic.text.Tokenizer.vocab_size", 70_000)
    found = prepare(procedural_config.replace(procedural_bytes=8000), tmp_path)
    assert found.train.tokens.dtype == np.uint32
    assert found.text("train") == "".join(texts_of(procedural_config.replace(procedural_bytes=8000), "train")).encode()


def test_progress_is_told(procedural_config, tmp_path):
    seen = []
    prepare(procedural_config.replace(procedural_bytes=8000), tmp_path, lambda *told: seen.append(told))
    assert {stage for stage, _, _ in seen} == {"training the tokenizer", "tokenising"}
    stage, done, total = seen[-1]
    assert (stage, total) == ("tokenising", 8000)
    assert done >= 8000


def test_a_loader_reads_the_prepared_tokens(dataset, procedural_config):
    batch = Loader(dataset.train, procedural_config.sequence_length).next_batch(3)
    assert batch.tokens.shape == batch.documents.shape == (3, 17)
    assert int(batch.tokens.max()) < dataset.tokenizer.vocab_size


def test_a_full_disk_leaves_nothing_under_a_final_name(procedural_config, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("benthic.files.os.fsync", full)
    with pytest.raises(CapacityError, match="No space left on device"):
        prepare(procedural_config.replace(procedural_bytes=8000), tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_interrupted_run_leaves_no_manifest_and_is_done_again(procedural_config, tmp_path, monkeypatch):
    config = procedural_config.replace(procedural_bytes=8000)
    first = prepare(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("benthic.data.preparation.Manifest", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config.replace(seed=3), tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert prepare(config, tmp_path).manifest == first.manifest


def test_text_that_is_only_white_space_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="no text in it"):
        prepare(DataConfig(source="folder", path=str(tmp_path)), tmp_path / "data")


def test_a_tokenizer_without_document_ends_or_fim_tokens_is_refused(tmp_path, procedural_config):
    plain = train_tokenizer(["1 + 2"], 264)
    folder = tmp_path / "tokenizer"
    plain.save(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    config = procedural_config.replace(tokenizer=str(folder), procedural_bytes=8000)
    with pytest.raises(DataError, match="names neither bos_token nor eos_token"):
        prepare(config, tmp_path / "data")
    definition = (folder / "tokenizer.json").read_text().replace("fim▁", "mid▁")
    (folder / "tokenizer.json").write_text(definition)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<｜end▁of▁sentence｜>"}))
    with pytest.raises(TextError, match="no token '<｜fim▁begin｜>'"):
        prepare(config.replace(fim_rate=1.0), tmp_path / "data")


def test_hashes_are_verified_on_request(procedural_config, tmp_path):
    prepare(procedural_config.replace(procedural_bytes=8000), tmp_path)
    Dataset.open(tmp_path, verify=True)
    content = bytearray((tmp_path / "train.bin").read_bytes())
    content[10] ^= 1
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.bin was changed after it was written"):
        Dataset.open(tmp_path, verify=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ('{"version": 99}', "has version 99; this benthic reads 1"),
        ('{"version": 1}', "key: Field"),
    ],
)
def test_a_wrong_manifest_is_named(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        Dataset.open(tmp_path)


@pytest.mark.slow
def test_the_standard_library_is_prepared(tmp_path):
    found = prepare(DataConfig(), tmp_path)
    assert found.manifest.train.tokens > 500_000
    assert found.tokenizer.vocab_size == 4096
    assert found.manifest.train.text_bytes / found.manifest.train.tokens > 3
    held = compress(found.text("validation"))
    assert 0.8 < held.xz_alone < held.zlib_alone < 3


def test_changed_tokens_are_never_reused(procedural_config, tmp_path, caplog):
    expected = prepare(procedural_config, tmp_path).train.tokens.tolist()
    path = tmp_path / "train.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert prepare(procedural_config, tmp_path).train.tokens.tolist() == expected
    assert "preparing again, because" in caplog.text
    assert "was changed after it was written" in caplog.text
