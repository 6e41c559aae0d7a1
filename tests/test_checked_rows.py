"""Rows of an index are read as they were when the corpus was opened, or not at all."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.folders import folder_at
from data_prep.checked_rows import BLOCK_ROWS, AlteredIndexError, CheckedRows, hash_blocks
from data_prep.corpus import Corpus
from data_prep.corpus_format import INDEX, LABELS, MANIFEST, PLACES, SAMPLE_DTYPE, CorpusError, manifest_hash
from data_prep.subset import SubsetSettings, make_parts
from pipeline.data_config import DataSettings
from pipeline.loader import EvalLoader, TrainLoader
from pipeline.workers import Worker
from tests.corpora import image_folder, make_corpus
from tests.s3_server import S3Server

ROWS = 3 * BLOCK_ROWS + 77
LABEL = 16
"""Place of the label in a row of an index."""


@pytest.fixture
def rows(tmp_path: Path) -> tuple[CheckedRows, np.ndarray]:
    random = np.random.default_rng(0)
    content = random.integers(0, 256, ROWS * SAMPLE_DTYPE.itemsize, np.uint8).tobytes()
    (tmp_path / "rows").write_bytes(content)
    checks = hash_blocks(tmp_path / "rows", SAMPLE_DTYPE.itemsize)[1]
    return CheckedRows(tmp_path / "rows", SAMPLE_DTYPE, checks=checks, where="rows"), np.frombuffer(
        content, SAMPLE_DTYPE
    )


def flip(path: Path, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1]))


@pytest.mark.parametrize(
    "key",
    [
        0, ROWS - 1, slice(None), slice(3, 700), slice(700, 3, -2), slice(5, 5), "label", "offset",
        np.arange(BLOCK_ROWS - 2, BLOCK_ROWS + 2), np.array([ROWS - 1, 0, 7, 7, 1024, 5]), np.empty(0, np.int64),
        np.random.default_rng(1).permutation(ROWS),
    ],
    ids=str,
)  # fmt: skip
def test_every_access_gives_what_an_array_gives(rows: tuple[CheckedRows, np.ndarray], key: Any) -> None:
    checked, expected = rows
    assert len(checked) == len(expected)
    np.testing.assert_array_equal(checked[key], expected[key])
    np.testing.assert_array_equal(np.asarray(checked), expected)


def test_only_the_rows_of_a_changed_block_are_refused(rows: tuple[CheckedRows, np.ndarray], tmp_path: Path) -> None:
    checked, expected = rows
    flip(tmp_path / "rows", SAMPLE_DTYPE.itemsize * BLOCK_ROWS + 5)
    np.testing.assert_array_equal(checked[:BLOCK_ROWS], expected[:BLOCK_ROWS])
    np.testing.assert_array_equal(checked[[3, 2 * BLOCK_ROWS]], expected[[3, 2 * BLOCK_ROWS]])
    for key in (BLOCK_ROWS, [0, 2 * BLOCK_ROWS - 1], slice(BLOCK_ROWS - 1, BLOCK_ROWS + 1), "label"):
        with pytest.raises(AlteredIndexError, match=rf"rows: rows {BLOCK_ROWS} to|rows {BLOCK_ROWS}|rows 0"):
            checked[key]


def single(tmp_path: Path) -> Corpus:
    return make_corpus(image_folder(tmp_path / "images"), tmp_path / "corpus")


def multi(tmp_path: Path) -> Corpus:
    image_folder(tmp_path / "images")
    table = tmp_path / "labels.csv"
    lines = [
        f"c{c}/{i:03d}.JPEG,{label},{w}" for c in range(3) for i in range(10) for label, w in (("a", 1), ("b", 0.5))
    ]
    table.write_text("\n".join(["path,label,weight", *lines]) + "\n")
    return make_corpus(tmp_path / "images", tmp_path / "corpus", labels=table)


@pytest.mark.parametrize(("make", "name"), [(single, INDEX), (multi, LABELS), (multi, INDEX)])
def test_a_label_that_flips_while_a_corpus_is_in_use_is_noticed(
    make: Callable[[Path], Corpus], name: str, tmp_path: Path
) -> None:
    corpus = make(tmp_path)
    of_a_rank = Corpus.open(corpus.url, "sizes", checks=corpus.checks)
    sent = pickle.dumps(corpus)
    flip(corpus.path / name, LABEL if name == INDEX else 0)
    for reader in (corpus, of_a_rank, pickle.loads(sent)):
        look = reader.labels_of if name == LABELS or make is single else reader.read
        with pytest.raises(AlteredIndexError, match=rf"{name} was altered while it was in use"):
            look(np.arange(len(corpus)))
    assert of_a_rank.checks == corpus.checks


def test_training_and_evaluation_stop_where_a_label_has_flipped(tmp_path: Path) -> None:
    corpus = single(tmp_path)
    third = (0.5, 0.5, 0.5)
    settings = DataSettings(corpus=corpus.url, image_size=16, mean=third, std=third, decode_threads=1)
    train = TrainLoader(corpus, settings, 0, Worker(), 4, 4, 0, 3, "cpu")
    evaluation = EvalLoader(corpus, settings, Worker(), 4, "cpu")
    flip(corpus.path / INDEX, LABEL)
    for loader in (train, evaluation):
        with pytest.raises(AlteredIndexError):
            list(loader)


def test_an_index_that_is_cut_short_in_use_is_an_error_and_no_crash(tmp_path: Path) -> None:
    corpus = single(tmp_path)
    with (corpus.path / INDEX).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(AlteredIndexError):
        corpus.read([len(corpus) - 1])


def test_a_damaged_copy_in_the_cache_of_a_node_is_fetched_anew(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = single(tmp_path)
    store = folder_at(s3.bucket() + "/corpus", "test")
    for name in corpus.folder.tree():
        store.put(corpus.path / name, name)
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "driver"))
    driver = Corpus.open(store)
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "node"))
    for damaged in (True, False):
        rank = Corpus.open(store, "sizes", checks=driver.checks)
        if damaged:
            flip(rank.path / INDEX, LABEL)
            with pytest.raises(AlteredIndexError, match="copy of it is removed"):
                rank.labels_of([0])
        else:
            assert rank.labels_of([0])[1] == corpus.labels_of([0])[1]


def rewrite(corpus: Corpus, name: str, content: bytes) -> None:
    """Puts other content into a file of a corpus, and makes all checksums anew."""
    (corpus.path / name).write_bytes(content)
    whole = hash_blocks(corpus.path / name, 1)[0]
    manifest = dict(corpus.manifest)
    manifest["files"] = {**manifest["files"], name: {"bytes": len(content), "xxh3_128": whole}}
    manifest["corpus_hash"] = manifest_hash(manifest)
    corpus.folder.write_json(MANIFEST, manifest)


@pytest.mark.parametrize(
    ("column", "value"),
    [("shard", 99), ("label", 3), ("label", -1), ("offset", 2**63), ("offset", 0), ("length", 2**32 - 1)],
)
def test_rows_that_can_be_none_are_refused_though_all_checksums_fit(tmp_path: Path, column: str, value: int) -> None:
    corpus = single(tmp_path)
    rows = corpus.index[:]
    rows[7][column] = value
    rewrite(corpus, INDEX, rows.tobytes())
    again = Corpus.open(corpus.url)
    for action in (again.read, again.labels_of, again.places_of, lambda ids: again.index["label"]):
        with pytest.raises(CorpusError, match="none of this corpus"):
            action([3, 7])
    assert len(again.read([3])) == 1


def test_labels_and_places_that_can_be_none_are_refused(tmp_path: Path) -> None:
    corpus = multi(tmp_path)
    labels = corpus._labels[:]
    labels[0]["class"] = 2
    rewrite(corpus, LABELS, labels.tobytes())
    with pytest.raises(CorpusError, match="none of this corpus"):
        Corpus.open(corpus.url).labels_of(np.arange(len(corpus)))
    labels[0]["class"] = 0
    rewrite(corpus, LABELS, labels[:-1].tobytes())
    with pytest.raises(CorpusError, match="outside the labels"):
        Corpus.open(corpus.url).labels_of(np.arange(len(corpus)))
    rewrite(corpus, LABELS, labels.tobytes())
    base = Corpus.open(corpus.url)
    part = make_parts(SubsetSettings(corpus=base.url, destination=str(tmp_path / "parts"), holdout=0.2))["train"]
    rewrite(part, PLACES, np.full(len(part), 2**32 - 1, "<u4").tobytes())
    with pytest.raises(CorpusError, match="another shard"):
        Corpus.open(part.folder).origin(0)
