"""What other tools find in our folders: Hugging Face's datasets, webdataset, DALI, DuckDB, pandas, polars.

timm and Energon, which do not install small: python -m tests.other_readers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.card import write_card
from data_prep.copy_corpus import CopySettings, copy_corpus
from data_prep.corpus import Corpus
from data_prep.index import IndexSettings, index_corpus
from data_prep.listing import SourceError
from data_prep.sample_table import TABLE
from data_prep.shard import ShardSettings, shard_corpus
from data_prep.subset import SubsetSettings, make_parts
from data_prep.verify import verify
from tests.corpora import encoded, image_folder, make_corpus
from tests.s3_server import S3Server

CLASSES = ["c0", "yes", "é: 'x' # [1]"]
"""Names that YAML must have in quotes."""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))


def picture_folder(root: Path, png: int = 3) -> Path:
    image_folder(root, classes=3, images=6)
    for number, name in enumerate(CLASSES[1:], 1):
        (root / f"c{number}").rename(root / name)
    for place in range(png):
        (root / "yes" / f"p{place}.png").write_bytes(encoded(900 + place, image_format="PNG"))
    return root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """21 images of three classes; 18 JPEG, 3 PNG."""
    root = tmp_path_factory.mktemp("tools")
    return make_corpus(picture_folder(root / "images"), root / "corpus")


def load(folder: Path, tmp_path: Path, streaming: bool) -> Any:
    import datasets

    return datasets.load_dataset(str(folder), streaming=streaming, cache_dir=str(tmp_path / "hf"))["train"]


def labels_of(corpus: Corpus) -> list[int]:
    return [int(label) for label in corpus.labels_of(np.arange(len(corpus)))[1]]


def part_of(corpus: Corpus, destination: Path) -> Corpus:
    return make_parts(SubsetSettings(corpus=corpus.url, destination=str(destination), holdout=0.3))["heldout"]


def check_table(corpus: Corpus) -> None:
    import duckdb
    import pandas
    import polars

    place = f"{corpus.url}/{TABLE}"
    rows = pandas.read_parquet(place)
    assert polars.read_parquet(place).rows() == [tuple(row) for row in rows.itertuples(index=False)]
    assert list(rows["origin"]) == list(corpus.origins())
    names = [shard["name"] for shard in corpus.manifest["shards"]]
    assert list(rows["shard"]) == [names[number] for number in corpus.index[:]["shard"]]
    assert list(rows["label"]) == labels_of(corpus)
    assert list(rows["class"]) == [corpus.classes[number] for number in labels_of(corpus)]
    for side in ("width", "height"):
        assert list(rows[side]) == corpus.index[:][side].tolist()
    counts = duckdb.sql(f"SELECT class, count(*) FROM '{place}' GROUP BY class").fetchall()
    assert dict(counts) == {name: n for name, n in zip(corpus.classes, corpus.class_counts, strict=True) if n}


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_reads_a_corpus_a_part_and_its_copy(
    ray: None, corpus: Corpus, tmp_path: Path, streaming: bool
) -> None:
    part = part_of(corpus, tmp_path / "parts")
    copy = copy_corpus(CopySettings(source=part.url, destination=str(tmp_path / "copy")))
    for each in (corpus, copy):
        rows = load(each.path, tmp_path, streaming)
        assert rows.features["cls"].names == CLASSES
        found = list(rows)
        assert [row["cls"] for row in found] == labels_of(each)
        sizes = [(row["jpg"] or row["png"]).size for row in found]
        assert sizes == each.index[:][["width", "height"]].tolist()
    table = list(load(part.path, tmp_path, streaming))
    assert [row["origin"] for row in table] == list(part.origins())
    assert [row["class"] for row in table] == [CLASSES[number] for number in labels_of(part)]


def test_data_tools_read_the_table_of_a_corpus_a_part_and_its_copy(ray: None, corpus: Corpus, tmp_path: Path) -> None:
    part = part_of(corpus, tmp_path / "parts")
    copy = copy_corpus(CopySettings(source=part.url, destination=str(tmp_path / "copy")))
    for each in (corpus, part, copy):
        check_table(each)
        assert list(verify(each)) == []
    assert not list(part.path.glob("*.tar"))
    with pytest.raises(SourceError, match=r"no \.tar file: it is a part"):
        index_corpus(IndexSettings(source=part.url, destination=str(tmp_path / "indexed")))
    assert "copy_corpus.py" in (part.path / "README.md").read_text()
    assert not (part.path / "_info.json").exists()
    split = json.loads((copy.path / "_info.json").read_text())["splits"]["train"]
    assert split["num_samples"] == len(part) == sum(split["shard_lengths"])
    assert split["filenames"] == [shard["name"] for shard in copy.manifest["shards"]]


def test_keys_of_the_table_are_those_of_webdataset(corpus: Corpus) -> None:
    import pandas
    import webdataset

    rows = pandas.read_parquet(corpus.path / TABLE)
    tars = [str(corpus.path / shard["name"]) for shard in corpus.manifest["shards"]]
    assert [sample["__key__"] for sample in webdataset.WebDataset(tars, shardshuffle=False)] == list(rows["key"])
    both = webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg;png", "cls")
    assert [label for _, label in both] == list(rows["label"])
    assert "`jpg;png`" in (corpus.path / "README.md").read_text()


def test_one_ending_for_all(ray: None, tmp_path: Path, messages: Any) -> None:
    import webdataset
    from nvidia.dali import fn, pipeline_def

    source = picture_folder(tmp_path / "images")
    settings = ShardSettings(source=str(source), destination=str(tmp_path / "own"))
    own = shard_corpus(settings)
    assert "several endings (jpg and png): webdataset and DALI are to be told 'jpg;png'" in messages()
    assert "endings of the images: 18 jpg, 3 png" in messages()
    one = shard_corpus(settings.model_copy(update={"ending": "jpg", "destination": str(tmp_path / "one")}))
    assert messages().count("several endings") == 1
    assert list(verify(one)) == []
    ids = np.arange(len(own))
    assert [image.tobytes() for image in one.read(ids)] == [image.tobytes() for image in own.read(ids)]
    tars = [one.path / shard["name"] for shard in one.manifest["shards"]]
    pairs = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls")
    assert [label for _, label in pairs] == labels_of(one)
    assert list(load(one.path, tmp_path, streaming=False).features) == ["jpg", "cls", "__key__", "__url__"]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def read() -> Any:
        outputs: Any = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg", "cls"],
        )
        return fn.decoders.image(outputs[0], device="cpu")

    pipeline = read()
    pipeline.build()
    shapes = [np.asarray(pipeline.run()[0][0]).shape[:2] for _ in ids]
    assert shapes == one.index[:][["height", "width"]].tolist()
    again = shard_corpus(ShardSettings(source=one.url, destination=str(tmp_path / "again")))
    assert sorted(one.index[:]["check"]) == sorted(again.index[:]["check"])


def test_many_labels_an_image(tmp_path: Path) -> None:
    import duckdb
    import webdataset

    source = image_folder(tmp_path / "images", classes=1, images=12)
    lines = ["path,label,weight"]
    for place in range(6):  # the others have no label
        lines += [f"c0/{place:03d}.JPEG,{name},{weight}" for name, weight in (("no", 1), ("b", 0.25))]
    lines += [f"c0/{place:03d}.JPEG,b,0" for place in range(6, 12)]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    corpus = make_corpus(source, tmp_path / "corpus", labels=tmp_path / "labels.csv")
    assert list(verify(corpus)) == []
    of_row, numbers, weights = corpus.labels_of(np.arange(12))
    expected = [(numbers[of_row == row].tolist(), weights[of_row == row].tolist()) for row in range(12)]
    for streaming in (False, True):
        rows = load(corpus.path, tmp_path, streaming)
        assert rows.features["json"]["labels"].feature.names == ["b", "no"]
        assert [(row["json"]["labels"], row["json"]["weights"]) for row in rows] == expected
    tars = [str(corpus.path / shard["name"]) for shard in corpus.manifest["shards"]]
    pairs = webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg", "json")
    assert [label["labels"] for _, label in pairs] == [each for each, _ in expected]
    table = f"{corpus.url}/{TABLE}"
    assert duckdb.sql(f"SELECT labels, weights FROM '{table}'").fetchall() == expected
    counts = duckdb.sql(f"SELECT unnest(classes) AS class, count(*) FROM '{table}' GROUP BY class").fetchall()
    assert dict(counts) == dict(zip(corpus.classes, corpus.class_counts, strict=True))


def test_tars_of_others(ray: None, tmp_path: Path) -> None:
    import duckdb
    import webdataset

    (tmp_path / "tars").mkdir()
    with webdataset.TarWriter(str(tmp_path / "tars" / "x.tar")) as sink:
        for place in range(8):
            sample = {"__key__": f"a b/{place}", "txt": "caption", "JPEG": encoded(place), "cls": place % 2}
            sink.write(sample)
    settings = IndexSettings(source=str(tmp_path / "tars"), destination=str(tmp_path / "corpus"))
    corpus = index_corpus(settings)
    assert list(verify(corpus)) == []
    for streaming in (False, True):
        rows = list(load(corpus.path, tmp_path, streaming))
        assert [row["cls"] for row in rows] == labels_of(corpus)
        assert rows[0]["JPEG"].size == (40, 30)
    seen = [sample["__key__"] for sample in webdataset.WebDataset(str(corpus.path / "x.tar"), shardshuffle=False)]
    assert duckdb.sql(f"SELECT key FROM '{corpus.url}/{TABLE}'").fetchall() == [(key,) for key in seen]


def test_labels_of_others_in_json(ray: None, tmp_path: Path) -> None:
    import webdataset

    (tmp_path / "tars").mkdir()
    with webdataset.TarWriter(str(tmp_path / "tars" / "x.tar")) as sink:
        for place in range(8):
            sink.write({"__key__": f"{place}", "jpg": encoded(place), "json": {"class_id": place % 3, "caption": "a"}})
    corpus = index_corpus(IndexSettings(source=str(tmp_path / "tars"), destination=str(tmp_path / "corpus")))
    assert corpus.label_kind == "single"
    for streaming in (False, True):
        rows = list(load(corpus.path, tmp_path, streaming))
        assert [row["json"]["class_id"] for row in rows] == labels_of(corpus)
    check_table(corpus)
    assert 'target_key="class_id"' in (corpus.path / "README.md").read_text()


def test_a_persons_files_stay_and_ours_follow_the_corpus(ray: None, tmp_path: Path, messages: Any) -> None:
    source = image_folder(tmp_path / "images", classes=2, images=4)
    settings = ShardSettings(source=str(source), destination=str(tmp_path / "corpus"), shard_mb=0.01)
    shard_corpus(settings)
    card, info = tmp_path / "corpus" / "README.md", tmp_path / "corpus" / "_info.json"
    edited = card.read_text().replace("# 8 images", "# My 8 images")
    card.write_text(edited)
    (source / "c1" / "new.JPEG").write_bytes(encoded(77))
    grown = settings.model_copy(update={"append": True})
    newest = shard_corpus(grown)
    assert card.read_text() == edited
    assert "README.md stays as it is: it was changed by hand" in messages()
    assert json.loads(info.read_text())["splits"]["train"]["num_samples"] == 9
    check_table(newest)
    assert [problem.partition(" says ")[2][:40] for problem in verify(newest)] == [
        "that there are 8 images, the corpus has 9"[:40]
    ]
    assert list(verify(Corpus.open(f"{newest.url}#1"))) == []
    card.unlink()
    shard_corpus(grown)
    assert "# 9 images of 2 classes" in card.read_text()
    assert list(verify(newest)) == []
    card.write_text("# mine\n")
    info.write_text('{"splits": {}}')
    (tmp_path / "corpus" / TABLE).write_bytes(b"a table of mine")
    write_card(newest)
    assert (card.read_text(), info.read_text()) == ("# mine\n", '{"splits": {}}')
    assert (tmp_path / "corpus" / TABLE).read_bytes() == b"a table of mine"
    assert list(verify(newest)) == []


def test_verify_notices_what_is_not_of_the_corpus(corpus: Corpus, tmp_path: Path) -> None:
    copy = Corpus.open(shutil.copytree(corpus.path, tmp_path / "corpus").as_posix())
    other = make_corpus(image_folder(tmp_path / "images", 2, 4), tmp_path / "other")
    for name in (TABLE, "_info.json", "README.md"):
        shutil.copy(other.path / name, copy.path)
        found = list(verify(copy))
        assert len(found) == 1
        assert f"{name} is {'of another version' if name == TABLE else 'not of this corpus'}" in found[0]
        shutil.copy(corpus.path / name, copy.path)
    damaged = bytearray((copy.path / TABLE).read_bytes())
    damaged[40] ^= 0xFF
    (copy.path / TABLE).write_bytes(damaged)
    assert TABLE in next(iter(verify(copy)))
    for name in (TABLE, "_info.json", "README.md"):
        (copy.path / name).unlink()
    assert list(verify(copy)) == []  # as older versions made them
    write_card(copy)
    for name in (TABLE, "_info.json", "README.md"):
        assert (copy.path / name).read_bytes() == (corpus.path / name).read_bytes()


def test_on_s3(ray: None, corpus: Corpus, s3: S3Server, tmp_path: Path) -> None:
    there = copy_corpus(CopySettings(source=corpus.url, destination=s3.bucket() + "/corpus"))
    part = make_parts(
        SubsetSettings(corpus=there.url, destination=there.url.replace("/corpus", "/parts"), holdout=0.3)
    )["heldout"]
    made = copy_corpus(CopySettings(source=part.url, destination=there.url.replace("/corpus", "/copy")))
    for each in (there, part, made):
        assert list(verify(each)) == []
        for name in (TABLE, "README.md"):
            assert each.folder.size(name)
    there.folder.remove(TABLE)
    write_card(there)
    assert there.folder.read_bytes(TABLE) == (corpus.path / TABLE).read_bytes()
