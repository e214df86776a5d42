import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from pipelines.data.texts import copy_files, read_documents, read_file, read_rows
from tests.shared_data import shared


def documents(path, kind="text", **record):
    return read_documents({"kind": kind, "digest": "0" * 64, "column": "text", **record}, locate=lambda _: path)


def test_a_text_is_one_document_or_cut_at_its_marks(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert documents(tmp_path / "a.txt") == ["one\ntwo\n"]
    (tmp_path / "b.txt").write_text("one\n<|endoftext|>\ntwo <|endoftext|> still two\n<|endoftext|>\n \n")
    assert documents(tmp_path / "b.txt") == ["one\n", "two <|endoftext|> still two\n"]
    assert len(documents(tmp_path)) == 3


def test_rows_of_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "url": 1}\n')
    assert documents(path) == ["one", "two"]
    with pytest.raises(ValueError, match=r"a.jsonl, line 1 has no text in 'body' \(it has text\)"):
        documents(path, column="body")
    path.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is not JSON"):
        documents(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1 has no text in 'text' \(it has list\)"):
        documents(path)


def test_bad_texts_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text .* at byte 2"):
        documents(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text at all"):
        documents(tmp_path / "a.txt")


def test_the_files_of_a_split(tmp_path):
    for name in ("wiki.train.raw", "wiki.test.raw", "wiki.valid.raw", "README.md"):
        (tmp_path / name).write_text(name)
    assert [p.name for p in copy_files(tmp_path, "train")] == ["wiki.train.raw"]
    assert [p.name for p in copy_files(tmp_path, "validation")] == ["wiki.valid.raw"]
    assert len(copy_files(tmp_path, None)) == 3
    (tmp_path / "wiki.train.raw").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file of the split 'train'; it has wiki.test.raw, wiki.valid.raw"):
        copy_files(tmp_path, "train")


def test_a_copy_whose_names_say_no_split_is_taken_whole(tmp_path):
    (tmp_path / "part-1.jsonl").write_text('{"text": "a"}\n')
    assert documents(tmp_path, kind="dataset", name="c4", split="train") == ["a"]
    with pytest.raises(FileNotFoundError, match="holds no text"):
        copy_files(tmp_path / "nothing", "train")


def test_compressed_rows_and_parquet(tmp_path):
    with gzip.open(tmp_path / "c4-train.00000-of-01024.json.gz", "wt") as file:
        file.write(json.dumps({"text": "zipped"}) + "\n")
    assert documents(tmp_path, kind="dataset", name="c4", split="train") == ["zipped"]
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"sentence": ["one", "two"]}), tmp_path / "x.parquet")
    assert list(read_file(tmp_path / "x.parquet", "sentence")) == ["one", "two"]
    with pytest.raises(ValueError, match="no column 'text'; it has sentence"):
        list(read_file(tmp_path / "x.parquet", "text"))


@pytest.mark.parametrize(
    ("name", "file", "least"),
    [("wikitext2", "wiki.valid.raw", 1), ("ptb", "ptb.valid.txt", 1), ("c4", "c4_sample_1000.jsonl", 1000)],
)
def test_real_copies(name, file, least):
    found = documents(shared("data/text") / file, kind="dataset", name=name, split="validation")
    assert len(found) == least and sum(map(len, found)) > 300_000


class Hub:
    """Stands for the `datasets` library, which has no network here: keeps what it is asked for."""

    def __init__(self, rows=None, error=None):
        self.asked, self.rows, self.error = None, rows, error

    def load_dataset(self, repo, **options):
        self.asked = (repo, options)
        if self.error:
            raise self.error
        return self.rows


def test_named_sets_from_the_hub_at_their_revision(monkeypatch):
    hub = Hub(rows=[{"text": "one"}, {"text": ""}, {"text": "two"}])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=hub.load_dataset))
    record = {"kind": "dataset", "name": "wikitext2", "repo": "org/wikitext", "revision": "f" * 40, "subset": "raw"}
    assert read_documents(record | {"split": "train", "column": "text"}) == ["one", "two"]
    assert hub.asked == ("org/wikitext", {"revision": "f" * 40, "split": "train", "name": "raw"})
    record |= {"name": "c4", "repo": "allenai/c4"}
    read_documents(record | {"split": "train", "column": "text"})
    assert hub.asked[1]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"} and "name" not in hub.asked[1]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    hub = Hub(error=ConnectionError("no route"))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=hub.load_dataset))
    record = {"kind": "dataset", "name": "ptb", "repo": "org/ptb", "revision": "f" * 40, "subset": None}
    with pytest.raises(
        ValueError, match=r"The data set ptb .* cannot be had from the hub here: no route. Set its `path`"
    ):
        read_documents(record | {"split": "train", "column": "sentence"})


def rows(path, name, **record):
    record = {"kind": "dataset", "name": name, "digest": "0" * 64, "column": "text", "split": None, **record}
    return read_rows(record, locate=lambda _: path)


def test_rows_of_plain_copies_are_those_of_the_hub(tmp_path):
    """Lines, as the builders of the two data sets made them: empty ones are rows, and a wikitext row keeps its end."""
    path = tmp_path / "wiki.train.raw"
    path.write_text(" \n = Title = \n \n Text . \n<|endoftext|>\n")
    assert rows(path, "wikitext2") == ["", " = Title = \n", "", " Text . \n", "<|endoftext|>\n"]
    assert rows(path, "ptb") == ["", "= Title =", "", "Text .", "<|endoftext|>"]
    assert read_documents({"kind": "dataset", "digest": "0", "column": "text"}, locate=lambda _: path) == [
        " \n = Title = \n \n Text . \n"
    ]


def test_rows_of_other_copies_are_their_documents_empty_ones_too(tmp_path):
    path = tmp_path / "c4.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    assert rows(path, "c4") == ["one", "", "two"] and rows(path, "wikitext2") == ["one", "", "two"]
    path.write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="the data set c4 holds no text at all"):
        rows(path, "c4")


def test_rows_of_the_hub_keep_empty_ones(monkeypatch):
    hub = Hub(rows=[{"text": "one"}, {"text": ""}])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=hub.load_dataset))
    record = {
        "kind": "dataset",
        "name": "wikitext2",
        "repo": "r",
        "revision": "f" * 40,
        "subset": "s",
        "split": "train",
    }
    assert read_rows(record | {"column": "text"}) == ["one", ""]


def test_damaged_rows_are_named_by_their_line_or_their_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "half \\ud800"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 has half of a surrogate pair"):
        documents(path)
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 is not JSON"):
        documents(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 is not JSON"):
        documents(path)
    path.write_text('\ufeff{"text": "with a mark of the byte order"}\n')
    assert documents(path) == ["with a mark of the byte order"]
    zipped = tmp_path / "b.jsonl.gz"
    zipped.write_bytes(gzip.compress(b'{"text": "one"}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz is damaged .*: fetch it again"):
        rows(zipped, "c4")
