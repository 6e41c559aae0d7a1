"""What cells and labels mean: no label is decided in silence, numbers stay numbers, and refusals say what to give."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.columns import Labels
from data_prep.label_report import report_classes, report_labels
from data_prep.listing import Listing, SourceError
from tests.corpora import encoded
from tests.labelled_tables import csv, embedded, image_files, images, labels_of, listed


@pytest.fixture
def folder(tmp_path):
    return image_files(tmp_path)


# ---------------------------------------------------------------------------------- several labels in a cell


@pytest.mark.parametrize(
    ("cells", "column", "advice"),
    [
        (["haze primary", "primary", "clear primary water"], "tags", "space"),
        (["1 2", "2", "3 1"], "label", "space"),
        (["a b", "a", "b a"], "label", "space"),
        (["3;7;9", "7", "3;9"], "label", "';'"),
        (["Mass|Nodule", "Mass", "Edema"], "Finding Labels", "'|'"),
        (["a, b", "a", "c"], "label", "','"),
        (["3,7", "12"], "label", "','"),
        (['["a", "b"]', '["a"]'], "label", "list"),
        (["['a', 'b']", "[]"], "label", "list"),
        (["[3 7 9]", "[3]"], "label", "list"),
        (["{'a'}", "('b',)"], "label", "list"),
    ],
)
def test_a_column_that_seems_to_hold_several_labels_in_a_cell_is_refused(folder, cells, column, advice):
    table = csv(folder, *cells, column=column)
    with pytest.raises(SourceError, match="seems to hold several labels in a cell") as refusal:
        listed(table, f"label_column={column}")
    assert f"label_delimiter={advice} splits them, label_delimiter=none takes each cell" in str(refusal.value)
    said = f"label_delimiter={advice.strip(chr(39))}"
    assert isinstance(listed(table, f"label_column={column}", said).labels, Labels) or len(cells) == 2
    assert sorted(listed(table, f"label_column={column}", "label_delimiter=none").classes) == sorted(cells)


@pytest.mark.parametrize(
    ("delimiter", "cells", "expected"),
    [
        ("space", ["haze  primary ", "primary"], [["haze", "primary"], ["primary"]]),
        (";", ["3;7;9;", "7"], [["3", "7", "9"], ["7"]]),
        (",", ["a, b", "c"], [["a", "b"], ["c"]]),
        ("tab", ["a\tb", "c"], [["a", "b"], ["c"]]),
        ("list", ["['a', 'it\\'s', \"x y\"]", '["b"]'], [["a", "it's", "x y"], ["b"]]),
        ("list", ["[3 7]", "[0, 2.0]"], [["3", "7"], ["0", "2"]]),
        ("list", ["[golden retriever, cat]", "dog"], [["cat", "golden retriever"], ["dog"]]),
        (" - ", ["a - b", "c"], [["a", "b"], ["c"]]),
    ],
)
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_delimiter_splits_cells_into_labels(folder, delimiter, cells, expected, form):
    table = csv(folder, *cells)
    rows = pandas.read_csv(table, dtype=str)
    if form == "jsonl":
        table = folder / "table.jsonl"
        rows.to_json(table, orient="records", lines=True)
    elif form == "parquet":
        table = folder / "table.parquet"
        rows.to_parquet(table)
    found = labels_of(listed(table, f"label_delimiter={delimiter}"))
    assert [sorted(found[f"a/{number}.jpg"]) for number in range(len(cells))] == expected


def test_a_delimiter_that_stands_in_no_cell_is_not_the_right_one(folder):
    table = csv(folder, "a;b", "b", "a")
    with pytest.raises(SourceError, match=r"such as 'a;b': label_delimiter=';' splits them"):
        listed(table, "label_delimiter=|")


def test_names_of_several_words_stay_names_and_what_is_in_doubt_is_said(folder, messages):
    names = [
        "golden retriever",
        "labrador retriever",
        "tench, Tinca tinca",
        "great white shark",
        "New York/Harlem",
        "(unknown)",
    ]
    assert listed(csv(folder, *names)).classes == sorted(names)
    assert "label_delimiter" not in messages()
    listed(csv(folder, "primary", "haze primary", "clear primary water"))
    assert "though a part of 'clear primary water' is a label, too" in messages()
    assert "label_delimiter=space splits them" in messages()


def test_weights_beside_labels_in_a_cell_are_split_as_they_are(folder):
    (folder / "table.csv").write_text("path,label,weight\na/0.jpg,a;b,0.5;1\na/1.jpg,b,0.25\n")
    listing = listed(folder / "table.csv", "label_delimiter=;")
    assert [row.tolist() for row in map(listing.labels.__getitem__, range(2))] == [[(0, 0.5), (1, 1.0)], [(1, 0.25)]]
    (folder / "lists.csv").write_text('path,label,weight\na/0.jpg,"[""a"",""b""]","[0.5, 1]"\na/1.jpg,[b],[0.25]\n')
    listing = listed(folder / "lists.csv", "label_delimiter=list")
    assert [row.tolist() for row in map(listing.labels.__getitem__, range(2))] == [[(0, 0.5), (1, 1.0)], [(1, 0.25)]]
    (folder / "table.csv").write_text("path,label,weight\na/0.jpg,a;b,0.5\n")
    with pytest.raises(SourceError, match=r"line 2: not as many weights \(1\) as labels \(2\)"):
        listed(folder / "table.csv", "label_delimiter=;")


# ------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("form", ["csv", "csv of floats", "jsonl", "int8", "float32", "float64", "float16", "decimal"])
def test_numbers_stay_numbers_in_the_order_of_their_values(folder, form):
    values = [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    paths = [f"a/{number}.jpg" for number in range(len(values))]
    table = folder / "table.parquet"
    if form.startswith("csv"):
        table = csv(folder, *(str(float(value) if "floats" in form else value) for value in values))
    elif form == "jsonl":
        table = folder / "table.jsonl"
        table.write_text(
            "".join(json.dumps({"path": p, "label": float(v)}) + "\n" for p, v in zip(paths, values, strict=True))
        )
    else:
        kind = pa.decimal128(21, 1) if form == "decimal" else getattr(pa, form)()
        column = pa.array(np.array(values, np.float16)) if form == "float16" else pa.array(values).cast(kind)
        pq.write_table(pa.table({"path": paths, "label": column}), table)
    listing = listed(table)
    assert listing.classes == [str(number) for number in range(11)]
    assert labels_of(listing) == {path: [str(value)] for path, value in zip(paths, values, strict=True)}


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["1e1", "2.0", "+3"], [str(number) for number in range(11)]),
        (["007", "010", "08"], ["007", "08", "010"]),
        (["1440764000.0", "7", "30"], ["7", "30", "1440764000"]),
        (["0.5", "10", "2.50"], ["0.5", "2.5", "10"]),
        (["True", "False", "True"], ["False", "True"]),
        (["3", "x", "20"], ["20", "3", "x"]),
        (["9" * 70, "2", "10"], ["10", "2", "9" * 70]),
    ],
)
def test_what_is_a_number_is_one_however_it_is_written(folder, labels, classes):
    assert listed(csv(folder, *labels)).classes == classes


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "images"])
@pytest.mark.parametrize(
    ("odd", "said", "value"),
    [
        (-1, "'-1' of .* is negative, and so no class", "-1"),
        (-1.0, r"'-1(\.0)?' of .* is negative", "-1"),
        (float("nan"), "'nan' of .* is not a number", "nan"),
        (None, "'' of .* has no name", "empty"),
    ],
)
def test_what_is_no_class_is_refused_with_its_row_and_taken_as_no_label(folder, form, odd, said, value):
    labels = [2, 0, odd, 1] if not isinstance(odd, float) else [2.0, 0.0, odd, 1.0]
    paths = [f"a/{number}.jpg" for number in range(len(labels))]
    table = folder / f"table.{form.replace('images', 'parquet')}"

    def read(*words: str) -> Listing:
        return listed(table, *words) if form != "images" else embedded(folder, *words)

    if form == "csv":
        table.write_text(
            "path,label\n" + "".join(f"{p},{'' if v is None else v}\n" for p, v in zip(paths, labels, strict=True))
        )
        said = rf"line 4: label {said}"
    elif form == "jsonl":
        table.write_text(
            "".join(json.dumps({"path": p, "label": v}) + "\n" for p, v in zip(paths, labels, strict=True))
        )
        said = rf"line 3: label {said}"
    else:
        pq.write_table(pa.table({"path": paths, "label": labels, **images(folder, form, paths)}), table)
        said = rf"(line 3|table.parquet): label {said}"
    with pytest.raises(SourceError, match=said) as refusal:
        read()
    assert re.search(rf"no_label={value}(\.0)? takes it as no label", str(refusal.value))
    listing = read(f"no_label={value}")
    assert listing.classes == ["0", "1", "2"]
    assert sorted(labels_of(listing).values()) == [["0"], ["1"], ["2"]]
    assert [reason for _, reason in listing.left_out] == ["left out: no label"]


def test_an_image_without_a_label_is_one_of_no_class_where_others_have_many(folder, messages):
    table = csv(folder, "1;2", "2", "-1")
    listing = listed(table, "label_delimiter=;", "no_label=-1")
    assert labels_of(listing) == {"a/0.jpg": ["1", "2"], "a/1.jpg": ["2"], "a/2.jpg": []}
    report_labels(listing)
    assert "1 image has no label and so no class" in messages()
    (folder / "t.jsonl").write_text('{"path":"a/0.jpg","label":["x"]}\n{"path":"a/1.jpg","label":[]}\n')
    with pytest.raises(SourceError, match=r"gives 'a/1.jpg' no label .* no_label=empty .* labels_per_image=many"):
        listed(folder / "t.jsonl")
    assert labels_of(listed(folder / "t.jsonl", "labels_per_image=many")) == {"a/0.jpg": ["x"], "a/1.jpg": []}
    assert labels_of(listed(folder / "t.jsonl", "no_label=empty")) == {"a/0.jpg": ["x"]}


def class_folders(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "x.jpg").write_bytes(encoded(number, (16, 16)))
    return root


def test_class_folders_that_are_numbers_are_in_the_order_of_their_values(tmp_path):
    source = class_folders(tmp_path / "source", *map(str, range(12)))
    listing = listed(source)
    assert listing.classes == [str(number) for number in range(12)]
    assert labels_of(listing) == {f"{number}/x.jpg": [str(number)] for number in range(12)}
    index = tmp_path / "imagenet_class_index.json"
    index.write_text(json.dumps({str(number): [f"n1{number:07d}", f"name{number}"] for number in range(12)}))
    named = listed(source, f"classes={index}")
    assert named.classes == [f"n1{number:07d}" for number in range(12)]
    assert named.class_descriptions == [f"name{number}" for number in range(12)]
    assert labels_of(named) == {f"{number}/x.jpg": [f"n1{number:07d}"] for number in range(12)}
    called = listed(source, f"words={index}")
    assert called.class_descriptions == named.class_descriptions


@pytest.mark.parametrize("packed", [False, True])
def test_class_folders_in_a_tar_are_in_the_same_order(tmp_path, packed, monkeypatch):
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    source = class_folders(tmp_path / "source", *map(str, range(12)))
    tar = tmp_path / ("a.tar.gz" if packed else "a.tar")
    with tarfile.open(tar, "w:gz" if packed else "w") as file:
        file.add(source, "train")
    listing = listed(tar)
    assert listing.classes == [str(number) for number in range(12)]
    assert labels_of(listing) == {f"{number}/x.jpg": [str(number)] for number in range(12)}


def test_class_folders_that_are_some_of_the_numbers_get_their_names(tmp_path):
    source = class_folders(tmp_path / "source", "00003", "00011")
    (tmp_path / "names.txt").write_text("".join(f"name{number}\n" for number in range(12)))
    listing = listed(source, f"classes={tmp_path / 'names.txt'}")
    assert labels_of(listing) == {"00003/x.jpg": ["name3"], "00011/x.jpg": ["name11"]}
    assert len(listing.classes) == 12
    from_one = class_folders(tmp_path / "from one", "1", "2", "10")
    (tmp_path / "names.json").write_text(json.dumps({"10": "ten", "1": "one", "2": "two"}))
    listing = listed(from_one, f"classes={tmp_path / 'names.json'}")
    assert [labels_of(listing)[f"{number}/x.jpg"] for number in (1, 2, 10)] == [["one"], ["two"], ["ten"]]
    assert listing.classes == ["one", "two", "ten"]
    (tmp_path / "three.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(SourceError, match=r"3 names for class numbers up to 10 in"):
        listed(from_one, f"classes={tmp_path / 'three.txt'}")
    (tmp_path / "classes.csv").write_text("id,name\n0,zero\n1,one\n")
    with pytest.raises(SourceError, match=r"classes\.csv is a table of several columns: give a text file"):
        listed(from_one, f"classes={tmp_path / 'classes.csv'}")


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("form", ["csv", "images"])
def test_weights_above_one_are_refused_with_what_scales_them(folder, form):
    paths = [f"a/{number}.jpg" for number in range(3)]
    columns = {"path": paths, "label": ["cat", "dog", "cat"], "confidence": [87, 12.5, 100]}
    table = folder / f"table.{form.replace('images', 'parquet')}"
    if form == "csv":
        pandas.DataFrame(columns).to_csv(table, index=False)
    else:
        pq.write_table(pa.table({**columns, **images(folder, form, paths)}), table)

    def read(*words: str) -> Listing:
        return listed(table, *words) if form == "csv" else embedded(folder, *words)

    where = "line 2: " if form == "csv" else ""
    with pytest.raises(SourceError, match=rf"{where}label 'cat' of '.*a/0\.jpg' has weight 87: .* weight_scale=0\.01"):
        read()
    listing = read("weight_scale=0.01")
    assert sorted(float(listing.labels[row]["weight"][0]) for row in range(3)) == pytest.approx([0.125, 0.87, 1.0])
    with pytest.raises(SourceError, match=r"has weight 100: .* weight_scale=0.01|has weight 87"):
        read("weight_scale=0.02")


def test_a_column_that_is_called_like_weights_need_not_be_them(folder):
    (folder / "table.csv").write_text("path,label,score\na/0.jpg,cat,7\na/1.jpg,dog,9.5\n")
    with pytest.raises(SourceError, match=r"line 2: .*has weight 7: .*; weight_column=none reads none"):
        listed(folder / "table.csv")
    listing = listed(folder / "table.csv", "weight_column=none")
    assert not isinstance(listing.labels, Labels)
    assert labels_of(listing) == {"a/0.jpg": ["cat"], "a/1.jpg": ["dog"]}


def test_a_scale_of_weights_that_are_not_there_is_refused(folder):
    with pytest.raises(ValueError, match=r"weight_scale is not read: .* has no weights"):
        listed(csv(folder, "a", "b"), "weight_scale=0.01")
    (folder / "table.csv").write_text("path,label,weight\na/0.jpg,a,255\n")
    with pytest.raises(ValueError, match=r"weight_scale=0\.00392 brings the largest, 255, to 1"):
        listed(folder / "table.csv")


# --------------------------------------------------------------------------------------------- the report


def reported(messages: Any, classes: list[str], counts: list[int]) -> str:
    rows = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    report_classes("here", classes, np.array(counts), len(rows), None)
    return str(messages())


@pytest.mark.parametrize(
    ("classes", "counts", "said"),
    [
        (["a", "b", "c"], [3, 9, 5], "3 classes for 17 images, one label an image; first 'a' (0), last 'c' (2); fewest "
         "images: 3 of 'a', most: 9 of 'b'"),
        (["cat", "test", "train"], [5, 5, 5], "2 classes are called like a split of a data set"),
        (["cat", "images"], [5, 5], "1 class is called like a part of a data set"),
        (["Cat", "cat ", "dog"], [5, 5, 5], "1 group of classes differ only in case, spaces"),
        (["007", "7"], [5, 5], "differ only in case, spaces, zeros"),
        (["e\u0301clair", "\u00e9clair"], [5, 5], "or the form of letters"),
        (["0.5", "cat"], [5, 5], "1 class name looks like a number that is not whole"),
        (["3", "cat"], [5, 5], "some class names are numbers ('3'), and some are not ('cat')"),
        (["cat"], [5], "all images are of one class, 'cat'"),
        (["cat", "dog"], [5, 0], "1 class has no image: 'dog'"),
        (["cat", "dog"], [5000, 3], "the largest class has 1,667 times the images of the smallest"),
        (["None", "dog"], [5, 5], "like what stands for no label (no_label= takes it as that)"),
        (["a.jpg", "dog"], [5, 5], "like a file of an image"),
        ([f"c{number}" for number in range(20)], [1] * 20, "nearly every image is a class of its own"),
        (["x" * 200, "dog"], [5, 5], "by a whole sentence"),
    ],
)  # fmt: skip
def test_what_a_person_would_find_odd_about_labels_is_said(messages, classes, counts, said):
    assert said in reported(messages, classes, counts)


def test_nothing_is_found_odd_about_usual_classes(messages):
    assert "odd" not in reported(messages, ["bear", "polar bear", "n01440764", "red_car", "x-ray"], [5, 5, 9, 7, 5])
    assert "odd" not in reported(messages, [str(number) for number in range(10)], [50] * 10)


# ---------------------------------------------------------------------------------------- files beside images


def test_a_file_of_truth_has_the_same_numbers(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.jpg").write_bytes(encoded(number, (16, 16)))
    truth = tmp_path / "truth.txt"
    truth.write_text("0.jpg 10\n1.jpg 2\n2.jpg 0\n3.jpg 2.0\n")
    listing = listed(source, f"truth={truth}")
    assert listing.classes == [str(number) for number in range(11)]
    assert labels_of(listing) == {"10/0.jpg": ["10"], "2/1.jpg": ["2"], "0/2.jpg": ["0"], "2.0/3.jpg": ["2"]}
    truth.write_text("0.jpg -1\n1.jpg 2\n2.jpg 0\n3.jpg 2\n")
    with pytest.raises(SourceError, match=r"label '-1' is negative, and so no class.* labels=TABLE no_label=-1"):
        listed(source, f"truth={truth}")


def test_classes_that_are_renamed_to_numbers_are_in_the_order_of_their_values(tmp_path):
    source = class_folders(tmp_path / "source", "cat", "dog", "ant")
    (tmp_path / "new.txt").write_text("cat\t10\ndog\t2\nant\t7\n")
    assert listed(source, f"relabel={tmp_path / 'new.txt'}").classes == ["2", "7", "10"]
