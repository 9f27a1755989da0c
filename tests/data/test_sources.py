"""Every source, and everything that can be wrong with one."""

import builtins
import json
import os
import sysconfig

import pytest

from benthic.config.data import DataConfig
from benthic.data.sources import STDLIB_LEFT_OUT, open_source, standard_library
from benthic.errors import DataError


def texts(**settings):
    return [(document.name, document.text) for document in open_source(DataConfig(**settings)).read()]


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name, text in {"b.txt": "two", "a/z.md": "one", ".hidden.txt": "no", "c.bin": "no", ".git/x.txt": "no"}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert texts(source="folder", path=str(tmp_path)) == [("a/z.md", "one"), ("b.txt", "two")]
    assert texts(source="folder", path=str(tmp_path / "b.txt")) == [("b.txt", "two")]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhi")
    assert texts(source="folder", path=str(tmp_path)) == [("a.txt", "hi")]


def test_the_fingerprint_follows_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    config = DataConfig(source="folder", path=str(tmp_path))
    first = open_source(config).fingerprint
    assert open_source(config).fingerprint == first
    path.write_text("other")
    assert open_source(config).fingerprint != first


def test_jsonl_takes_the_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\u2028two"}\n\n{"text": "three", "more": 1}\n')
    assert [text for _, text in texts(source="jsonl", path=str(tmp_path))] == ["one\u2028two", "three"]
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    assert texts(source="jsonl", path=str(tmp_path / "a.jsonl"), text_field="body") == [("a.jsonl:1", "one")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        (b"[1]\n", r"a\.jsonl, line 1 holds a list, not an object"),
        (b'{"test": "a"}\n', r"a\.jsonl, line 1 has no field 'text'\nhint: did you mean 'test'\?"),
        (b'{"text": 3}\n', r"a\.jsonl, line 1: field 'text' holds a int, not text"),
        (b'{"text": "\\ud83c"}\n', r"a\.jsonl, line 1: field 'text' holds half a surrogate pair"),
        (b'{"text": "\xff"}\n', r"a\.jsonl, line 1 is not UTF-8 text \(byte 0xff at 10\)"),
    ],
)
def test_a_wrong_jsonl_line_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(source="jsonl", path=str(tmp_path))


def test_parquet_takes_the_text_column(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    config = {"source": "parquet", "path": str(tmp_path)}
    assert [text for _, text in texts(**config)] == ["one", "two"]
    with pytest.raises(DataError, match="has no column 'txt'\nhint: did you mean 'text'"):
        texts(**config, text_field="txt")
    with pytest.raises(DataError, match="column 'n' holds int64, not text"):
        texts(**config, text_field="n")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="as parquet"):
        texts(**config)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    plain = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return plain(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"needs pyarrow, which is not installed\nhint: pip install 'benthic\[data\]'"):
        texts(source="parquet", path=str(tmp_path))


def test_binary_and_other_encodings_are_refused_by_name(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"PK\0\x01")
    with pytest.raises(DataError, match=r"a\.txt is binary \(a zero byte at 2\)"):
        texts(source="folder", path=str(tmp_path))
    path.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text \(byte 0xe9 at 3\)\nhint: convert it"):
        texts(source="folder", path=str(tmp_path))


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"data path .*nowhere does not exist"):
        texts(source="folder", path=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no file ending in \.txt, \.md, \.rst, \.py in .*\nhint: set data\.suffixes"):
        texts(source="folder", path=str(tmp_path))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="holds no text: 1 files of 0 bytes"):
        texts(source="folder", path=str(tmp_path))
    with pytest.raises(DataError, match=r"no \.jsonl file in"):
        texts(source="jsonl", path=str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: Permission denied"):
        texts(source="folder", path=str(tmp_path))


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: Permission denied"):
        texts(source="folder", path=str(tmp_path))


def test_the_standard_library_is_read_in_place_without_its_tests():
    source = standard_library()
    names = [document.name for document in source.read()]
    assert {"ast.py", "asyncio/events.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if STDLIB_LEFT_OUT & set(name.split("/"))]
    assert names == sorted(names)
    assert "the standard library of Python 3." in source.description


def test_a_zipped_or_stripped_standard_library_points_to_procedural_text(tmp_path, monkeypatch):
    (tmp_path / "os.py").write_text("pass\n")
    for root in (tmp_path, tmp_path / "python311.zip"):
        with pytest.raises(DataError, match=r"it is zipped or stripped\)\nhint: use text .*procedural"):
            standard_library(root)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="bytes of source"):
        open_source(DataConfig())


def test_procedural_text_is_a_source():
    assert sum(len(text) for _, text in texts(source="procedural", procedural_bytes=5000)) >= 5000


def test_a_jsonl_row_keeps_its_name_when_others_are_added(tmp_path):
    rows = [json.dumps({"text": str(row)}) + "\n" for row in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(rows[:2]))
    before = texts(source="jsonl", path=str(tmp_path))
    (tmp_path / "a.jsonl").write_text("".join(rows))
    assert texts(source="jsonl", path=str(tmp_path))[:2] == before


@pytest.mark.parametrize("line", ["[" * 9000, '{"text": ' + "9" * 5000 + "}"])
def test_hostile_json_lines_are_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 is not JSON"):
        list(open_source(DataConfig(source="jsonl", path=str(path))).read())
