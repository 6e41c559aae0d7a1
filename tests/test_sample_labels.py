"""Labels beside images in WebDataset tars of others: what is read as one class, as many, as names, and what is not."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_prep.columns import Labels
from data_prep.copy_corpus import CopySettings, copy_corpus
from data_prep.corpus import Corpus
from data_prep.index import IndexSettings, index_corpus
from data_prep.listing import Listing, SourceError
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.subset import SubsetSettings, make_parts
from data_prep.verify import verify
from tests.corpora import encoded


def write_tar(path: Path, labels: list[Any], extension: str = "json") -> Path:
    """A tar of images and labels: bytes as they are, or as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            content = label if isinstance(label, bytes) else json.dumps(label).encode()
            for name, data in (
                (f"{number:04d}.jpg", encoded(number, (16, 16))),
                (f"{number:04d}.{extension}", content),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def labels_of(listing: Listing) -> list[list[str]]:
    numbers = [
        listing.labels[row]["class"].tolist() if isinstance(listing.labels, Labels) else [int(listing.labels[row])]
        for row in range(len(listing))
    ]
    return [[listing.classes[number] for number in some] for some in numbers]


ONE: list[tuple[list[Any], str, list[list[str]]]] = [
    ([{"label": 2}, {"label": 0}, {"label": 1}], "json", [["2"], ["0"], ["1"]]),
    ([{"label": [2]}, {"label": [0]}], "json", [["2"], ["0"]]),
    ([{"cls": 2.0}, {"cls": "0"}], "json", [["2"], ["0"]]),
    ([{"label": "cat", "caption": "a cat"}, {"label": "a dog"}], "json", [["cat"], ["a dog"]]),
    ([{"class": "cat"}, {"class": "dog"}], "json", [["cat"], ["dog"]]),
    ([{"category_id": 1}, {"category_id": 0}], "json", [["1"], ["0"]]),
    ([b"2", b"0\n"], "cls", [["2"], ["0"]]),
    ([b"cat\n", b"dog"], "cls", [["cat"], ["dog"]]),
]
MANY: list[tuple[list[Any], list[list[str]]]] = [
    ([{"labels": [2]}, {"labels": [0]}], [["2"], ["0"]]),
    ([{"label": [2, 1]}, {"label": [0]}], [["1", "2"], ["0"]]),
    ([{"labels": ["cat", "dog"], "weights": [1, 0.5]}, {"labels": []}], [["cat", "dog"], []]),
]


@pytest.mark.parametrize(("labels", "extension", "expected"), ONE)
def test_one_label_beside_an_image_is_one_label(tmp_path, labels, extension, expected):
    listing = list_source(SourceSettings(source=str(write_tar(tmp_path / "a.tar", labels, extension))))
    assert not isinstance(listing.labels, Labels)
    assert labels_of(listing) == expected
    many = list_source(SourceSettings(source=str(tmp_path / "a.tar"), labels_per_image="many"))
    assert isinstance(many.labels, Labels)
    assert labels_of(many) == expected


@pytest.mark.parametrize(("labels", "expected"), MANY)
def test_a_list_of_labels_is_many(tmp_path, labels, expected):
    listing = list_source(SourceSettings(source=str(write_tar(tmp_path / "a.tar", labels))))
    assert isinstance(listing.labels, Labels)
    assert labels_of(listing) == expected


@pytest.mark.parametrize(
    ("labels", "extension", "reason"),
    [
        ([{"caption": "a cat", "url": "x"}], "json", r"\.json has no label: its keys are caption, url \(label_column="),
        ([[3]], "json", r"\.json is no object with a label"),
        ([b"{"], "json", r"\.json is damaged"),
        ([{"label": {"a": 1}}], "json", r"label is neither a class number nor a name"),
        ([b"\x80\x04K\x03."], "cls", r"\.cls is no class number but"),
    ],
)
def test_what_is_no_label_is_refused_with_the_reason(tmp_path, labels, extension, reason):
    with pytest.raises(SourceError, match=rf"has a label: 2 x .*{reason}"):
        list_source(SourceSettings(source=str(write_tar(tmp_path / "a.tar", labels * 2, extension))))


@pytest.mark.parametrize(
    ("labels", "extension", "reason"),
    [
        ([b"1", b"-1", b"0"], "cls", "'-1' is negative, and so no class: no_label=-1 takes it as no label"),
        ([{"label": 1}, {"label": -1.0}, {"label": 0}], "json", "no_label=-1.0 takes"),
        ([{"label": "cat"}, {"label": ""}], "json", "no_label=empty takes"),
    ],
)
def test_what_others_write_for_no_label_is_asked_about(ray, tmp_path, labels, extension, reason):
    tar = write_tar(tmp_path / "a.tar", labels, extension)
    with pytest.raises(SourceError, match=rf"a\.tar, 0001\..*{reason}"):
        list_source(SourceSettings(source=str(tar)))
    with pytest.raises(SourceError, match=rf"a\.tar, sample 0001: .*{reason}"):
        index_corpus(IndexSettings(source=str(tar), destination=str(tmp_path / "index")))


@pytest.mark.parametrize(
    ("labels", "extension"),
    [([b"cat;dog", b"dog", b"bird"], "cls"), ([{"tags": "cat;dog"}, {"tags": "dog"}, {"tags": "bird"}], "json")],
)
def test_several_labels_in_one_text_are_refused_and_split(ray, tmp_path, labels, extension):
    tar = write_tar(tmp_path / "a.tar", labels, extension)
    with pytest.raises(SourceError, match=r"seems to hold several labels in a cell, such as 'cat;dog'.*delimiter=';'"):
        list_source(SourceSettings(source=str(tar)))
    listing = list_source(SourceSettings(source=str(tar), label_delimiter=";"))
    expected = [["cat", "dog"], ["dog"], ["bird"]]
    assert labels_of(listing) == expected
    assert listing.classes == ["bird", "cat", "dog"]
    corpus = index(tar, tmp_path / "index", label_delimiter=";")
    assert corpus_labels(corpus) == expected
    kept = list_source(SourceSettings(source=str(tar), label_delimiter="none"))
    assert kept.classes == ["bird", "cat;dog", "dog"]


def test_a_key_of_ones_own_and_labels_that_are_none(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [{"diagnosis": 1}, {"diagnosis": -1}, {"diagnosis": 0}])
    listing = list_source(SourceSettings(source=str(tar), label_column="diagnosis", no_label=("-1",)))
    assert labels_of(listing) == [["1"], ["0"]]
    assert listing.left_out == (("a.tar/0001.jpg", "left out: no label"),)


def test_weights_beyond_one_are_refused_and_scaled(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [{"labels": [1], "weights": [87]}, {"labels": [0], "weights": [12.5]}])
    with pytest.raises(SourceError, match=r"label '1' of 'a.tar/0000.jpg' has weight 87: .*weight_scale=0.01"):
        list_source(SourceSettings(source=str(tar)))
    listing = list_source(SourceSettings(source=str(tar), weight_scale=0.01))
    assert [float(listing.labels[row]["weight"][0]) for row in range(2)] == pytest.approx([0.87, 0.125])


def index(source: Path, destination: Path, **settings: Any) -> Corpus:
    corpus = index_corpus(IndexSettings(source=str(source), destination=str(destination), **settings))
    assert list(verify(corpus)) == []
    return corpus


def corpus_labels(corpus: Corpus) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in range(len(corpus))]
    rows, classes, _ = corpus.labels_of(range(len(corpus)))
    for row, number in zip(rows.tolist(), classes.tolist(), strict=True):
        found[row].append(corpus.classes[number])
    return found


def test_tars_are_indexed_as_they_are_sharded(ray, tmp_path):
    for number, (labels, extension, expected) in enumerate(ONE):
        corpus = index(write_tar(tmp_path / f"{number}" / "a.tar", labels, extension), tmp_path / f"one {number}")
        assert (corpus.label_kind, corpus_labels(corpus)) == ("single", expected)
    for number, (many, expected) in enumerate(MANY):
        corpus = index(write_tar(tmp_path / f"m{number}" / "a.tar", many), tmp_path / f"many {number}")
        assert (corpus.label_kind, corpus_labels(corpus)) == ("multi", expected)


def test_an_index_of_names_is_that_of_all_its_parts_and_copies(ray, tmp_path, messages):
    names = ["cat", "dog", "train", "cat", "dog", "cat", "sparrow"]
    source = write_tar(tmp_path / "tars" / "a.tar", [{"class": name} for name in names])
    write_tar(tmp_path / "tars" / "b.tar", [{"class": "ant"}, {"class": 3}, {"class": ["cat", "dog"]}])
    corpus = index(source.parent, tmp_path / "corpus", labels_per_image="one")
    assert corpus.classes == ["3", "ant", "cat", "dog", "sparrow", "train"]
    assert [entry["reason"] for entry in corpus.quarantined()] == [
        "2 labels where one is read (labels_per_image=many reads all)"
    ]
    assert "1 class is called like a split of a data set" in messages()
    parts = make_parts(SubsetSettings(corpus=str(corpus.path), destination=str(tmp_path / "parts"), subsets=(0.5,)))
    (part,) = parts.values()
    assert list(verify(part)) == []
    copy = copy_corpus(CopySettings(source=part.url, destination=str(tmp_path / "copy")))
    assert list(verify(copy)) == []
    assert corpus_labels(copy) == corpus_labels(part)
    (tmp_path / "classes.txt").write_text("sparrow\ncat\ndog\n")
    chosen = index(source, tmp_path / "chosen", classes=str(tmp_path / "classes.txt"))
    assert corpus_labels(chosen) == [[name] for name in names if name != "train"]
    assert [entry["reason"] for entry in chosen.quarantined()] == ["class train is none of the 3 classes"]


def test_indexing_refuses_weights_beyond_one_with_the_command_that_scales_them(ray, tmp_path):
    tar = write_tar(tmp_path / "a.tar", [{"labels": [1], "weights": [87]}])
    with pytest.raises(SourceError, match=r"a.tar, 0000.json: label 1 has weight 87: .*shard.py SOURCE DESTINATION"):
        index(tar, tmp_path / "corpus")
