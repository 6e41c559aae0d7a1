"""What cells and labels mean: no label is decided in silence, numbers stay numbers, and refusals say what to give."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.folders import LocalFolder
from cluster.settings import parse_command
from data_prep import embedded_images
from data_prep.columns import Labels
from data_prep.label_report import report_classes, report_labels
from data_prep.listing import Listing, SourceError
from data_prep.sources import SourceSettings, list_source
from data_prep.table_files import ColumnNames, class_names_of, columns_of, table_files
from data_prep.table_labels import LabelOptions
from tests.corpora import encoded

SPACE = "path,tags\na/0.jpg,haze primary\na/1.jpg,primary\na/2.jpg,clear primary water\na/3.jpg,haze primary\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(12):
        (tmp_path / "a" / f"{number}.jpg").write_bytes(encoded(number, (16, 16)))
    return tmp_path


def listed(source: Path, *words: str) -> Listing:
    """As a command line says it."""
    settings = parse_command(
        SourceSettings, prog="x", description="", positionals=("source",), argv=[str(source), *words]
    )
    return list_source(settings)


def labels_of(listing: Listing) -> dict[str, list[str]]:
    """Names of the labels of each image."""
    found = {}
    for row in range(len(listing)):
        numbers = listing.labels[row]["class"] if isinstance(listing.labels, Labels) else [listing.labels[row]]
        found[listing.names[row].decode()] = [listing.classes[int(number)] for number in numbers]
    return found


def csv(folder: Path, *labels: str, column: str = "label") -> Path:
    """A table of a/0.jpg, a/1.jpg, ..., each with its label."""
    path = folder / "table.csv"
    rows = [[f"a/{number}.jpg", label] for number, label in enumerate(labels)]
    path.write_text(pandas.DataFrame(rows, columns=["path", column]).to_csv(index=False))
    return path


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


def test_names_of_several_words_stay_names_and_what_is_in_doubt_is_said(folder, messages):
    names = ["golden retriever", "labrador retriever", "tench, Tinca tinca", "great white shark", "New York/Harlem"]
    assert listed(csv(folder, *names)).classes == sorted(names)
    assert "label_delimiter" not in messages()
    listed(csv(folder, "primary", "haze primary", "clear primary water"))
    assert "though a part of 'clear primary water' is a label, too" in messages()
    assert "label_delimiter=space splits them" in messages()


def test_weights_beside_labels_in_a_cell_are_split_as_they_are(folder):
    (folder / "table.csv").write_text("path,label,weight\na/0.jpg,a;b,0.5;1\na/1.jpg,b,0.25\n")
    listing = listed(folder / "table.csv", "label_delimiter=;")
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


def images(folder: Path, form: str, paths: list[str]) -> dict[str, Any]:
    """A column of images, where these stand in the table."""
    return {"image": [(folder / path).read_bytes() for path in paths]} if form == "images" else {}


def embedded(folder: Path, *words: str) -> Listing:
    """What sharding makes of table.parquet, in this process."""
    settings = parse_command(SourceSettings, prog="x", description="", positionals=("source",), argv=["x", *words])
    (file,) = table_files(LocalFolder(folder), "table.parquet")
    columns = columns_of([file], ColumnNames(indicators=settings.label_columns, unset=settings.no_label))
    laid_down = LocalFolder(folder / "laid")
    embedded_images._lay_down_file(embedded_images._FileTask(file, laid_down, "0", columns, ""))
    options = LabelOptions(settings.labels_per_image, no_label=settings.no_label, weight_scale=settings.weight_scale)
    return embedded_images.list_laid_down(laid_down, ["0"], str(file), columns, class_names_of(file, columns), options)


def test_an_image_without_a_label_is_one_of_no_class_where_others_have_many(folder, messages):
    table = csv(folder, "1;2", "2", "-1")
    listing = listed(table, "label_delimiter=;", "no_label=-1")
    assert labels_of(listing) == {"a/0.jpg": ["1", "2"], "a/1.jpg": ["2"], "a/2.jpg": []}
    report_labels(listing)
    assert "1 images have no label: they are images of no class" in messages()
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


def test_a_scale_of_weights_that_are_not_there_is_refused(folder):
    with pytest.raises(ValueError, match=r"weight_scale is not read: .* has no weights"):
        listed(csv(folder, "a", "b"), "weight_scale=0.01")
    (folder / "table.csv").write_text("path,label,weight\na/0.jpg,a,255\n")
    with pytest.raises(ValueError, match=r"weight_scale=0\.00392 brings the largest, 255, to 1"):
        listed(folder / "table.csv")


# ------------------------------------------------------------------------------------------ forms of tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.CSV", "path,label\na/0.jpg,cat\na/1.jpg,dog\n"),
        ("t.csv", "\ufeffpath;label\r\na/0.jpg;cat\r\na/1.jpg;dog\r\n"),
        ("t.csv", "path, label\na/0.jpg, cat\na/1.jpg, dog\n"),
        ("t.csv", '"File Path" ,"Label"\n"a/0.jpg","cat "\n"a/1.jpg",dog\n'),
        ("t.csv", 'path, label\n"a/0.jpg", "cat"\n"a/1.jpg", "dog"\n'),
        ("t.csv", "path|label\na/0.jpg|cat\na/1.jpg|dog\n"),
        ("t.csv", ",path,label\n0,a/0.jpg,cat\n1,a/1.jpg,dog\n"),
        ("t.tsv", "path\tlabel\na/0.jpg\tcat\na/1.jpg\tdog\n"),
        ("t.csv", "path\tlabel\na/0.jpg\tcat\na/1.jpg\tdog\n"),
        ("t.json", '[{"path": "a/0.jpg", "label": "cat"}, {"path": "a/1.jpg", "label": "dog"}]'),
        ("t.json", '{"path": "a/0.jpg", "label": "cat"}\n{"path": "a/1.jpg", "label": "dog"}\n'),
        ("t.JSON", '{"a/0.jpg": "cat", "a/1.jpg": "dog"}'),
        ("t.json", '{"labels": [["a/0.jpg", "cat"], ["a/1.jpg", "dog"]]}'),
        ("t.json", '{"path": ["a/0.jpg", "a/1.jpg"], "label": ["cat", "dog"]}'),
        ("t.ndjson", '{"path": "a/0.jpg", "label": "cat"}\n\n{"path": "a/1.jpg", "label": "dog"}\n'),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_table_is_read_in_the_forms_in_which_people_write_it(folder, name, text, packed):
    table = folder / (f"{name}.gz" if packed else name)
    table.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert labels_of(listed(table)) == {"a/0.jpg": ["cat"], "a/1.jpg": ["dog"]}


@pytest.mark.parametrize("orient", ["records", "split", "table", "columns", "index"])
def test_what_pandas_writes_as_json_is_read(folder, orient):
    rows = pandas.DataFrame({"path": ["a/0.jpg", "a/1.jpg"], "label": [10.0, 2.0]})
    rows.to_json(folder / "t.json", orient=orient)
    assert labels_of(listed(folder / "t.json")) == {"a/0.jpg": ["10"], "a/1.jpg": ["2"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", b'{"a": 1}', r"is JSON, but no table that is known: \[\{\"path\""),
        ("t.json", b"[1, 2]", "is JSON, but no table"),
        ("t.json", b"{", "it is not JSON"),
        ("t.csv", b"path;label\na/0.jpg;caf\xe9\n", "is not UTF-8"),
        ("t.csv", b'path,label\na/0.jpg,"cat\na/1.jpg,dog\n', "line 3: a value goes over several lines"),
        ("t.csv", b"path,label,label\na/0.jpg,cat,dog\n", "two columns called 'label'"),
        ("t.csv", b"path,label\na/0.jpg,cat,dog\n", "line 2: has 3 fields where the header has 2"),
        ("t.csv.gz", gzip.compress(b"path,label\na/0.jpg,cat\n")[:-9], "cannot be read: Compressed file ended"),
        ("t.csv.gz", b"path,label\na/0.jpg,cat\n", "cannot be read: Not a gzipped file"),
        ("t.jsonl", b'{"path": "a/0.jpg", "label": {"a": 1}}\n', "line 1: label must be a name, a number, or a list"),
    ],
)
def test_a_table_that_cannot_be_read_says_why_and_where(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        listed(folder / name)


def _view(values: list[Any]) -> pa.Array:
    return pa.array(values, pa.string_view())


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (_view, _view),
        (lambda v: pa.array(v, pa.large_string()), lambda v: pa.array(v, pa.large_string())),
        (lambda v: pa.array(v).dictionary_encode(), lambda v: pa.array(v).dictionary_encode()),
        (pa.array, lambda v: pa.array([[x] for x in v], pa.list_(pa.dictionary(pa.int8(), pa.string())))),
        (pa.array, lambda v: pa.array([[x] for x in v], pa.large_list(pa.large_string()))),
        (pa.array, lambda v: pa.array([[x] for x in v], pa.list_(pa.string(), 1))),
        (pa.array, lambda v: pa.array([[x] for x in v], pa.list_(pa.string_view()))),
    ],
)
def test_every_type_of_text_that_arrow_has_is_read(folder, paths, labels):
    pq.write_table(
        pa.table({"path": paths(["a/0.jpg", "a/1.jpg"]), "label": labels(["cat", "dog"])}), folder / "t.parquet"
    )
    assert labels_of(listed(folder / "t.parquet")) == {"a/0.jpg": ["cat"], "a/1.jpg": ["dog"]}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize("nested", [False, True])
def test_every_type_of_bytes_that_arrow_has_is_an_image(folder, kind, nested):
    content = pa.array([(folder / "a" / f"{number}.jpg").read_bytes() for number in range(2)], kind)
    paths = _view(["0.jpg", "1.jpg"])
    image = pa.StructArray.from_arrays([content, paths], ["bytes", "path"]) if nested else content
    pq.write_table(pa.table({"image": image, "label": pa.array([1, 0])}), folder / "table.parquet")
    assert [labels for _, labels in sorted(labels_of(embedded(folder)).items())] == [["1"], ["0"]]


# ------------------------------------------------------------------------------------- columns of 0 and 1


@pytest.mark.parametrize("form", ["csv", "parquet", "images", "bool"])
def test_columns_of_zero_and_one_are_classes(folder, form):
    paths = [f"a/{number}.jpg" for number in range(3)]
    header = {"filename": paths}
    columns: dict[str, list[Any]] = {"bird": [1, 0, 0], "cat": [0, 0, 1], "dog": [0, 1, 0]}
    table = folder / "table.parquet"
    if form == "csv":  # as Roboflow writes it
        table = folder / "_classes.csv"
        table.write_text(
            "filename, bird, cat, dog\n"
            + "".join(
                f"{path}, {', '.join(str(column[row]) for column in columns.values())}\n"
                for row, path in enumerate(paths)
            )
        )
    else:
        columns = {k: [bool(x) for x in v] if form == "bool" else v for k, v in columns.items()}
        pq.write_table(
            pa.table({**(header if form != "images" else {}), **columns, **images(folder, form, paths)}), table
        )
    listing = embedded(folder) if form == "images" else listed(table)
    assert listing.classes == ["bird", "cat", "dog"]
    assert [labels for _, labels in sorted(labels_of(listing).items())] == [["bird"], ["dog"], ["cat"]]


def test_columns_of_zero_and_one_are_many_labels_where_a_row_has_several(folder):
    (folder / "t.csv").write_text("filename,b,a\na/0.jpg,1,1\na/1.jpg,0,0\na/2.jpg,0,1\n")
    listing = listed(folder / "t.csv")
    assert isinstance(listing.labels, Labels)
    assert labels_of(listing) == {"a/0.jpg": ["b", "a"], "a/1.jpg": [], "a/2.jpg": ["a"]}
    (folder / "t.csv").write_text("filename,b,a\na/0.jpg,1,0\na/1.jpg,0,0\n")
    with pytest.raises(SourceError, match=r"gives 'a/1.jpg' no label"):
        listed(folder / "t.csv")
    (folder / "t.csv").write_text("filename,b,a\na/0.jpg,1,-1\na/1.jpg,-1,1\n")
    with pytest.raises(SourceError, match=r"line 2: a is '-1', and 0 or 1 is needed: no_label=-1 takes it as 0"):
        listed(folder / "t.csv")
    assert labels_of(listed(folder / "t.csv", "no_label=-1")) == {"a/0.jpg": ["b"], "a/1.jpg": ["a"]}


def test_columns_of_zero_and_one_beside_others_must_be_named(folder):
    (folder / "t.csv").write_text("path,width,b,a\na/0.jpg,64,1,0\na/1.jpg,32,0,1\n")
    with pytest.raises(SourceError, match=r"no column of labels: .* label_columns=\[b,a\] takes those of 0 and 1"):
        listed(folder / "t.csv")
    assert labels_of(listed(folder / "t.csv", "label_columns=[b,a]")) == {"a/0.jpg": ["b"], "a/1.jpg": ["a"]}
    with pytest.raises(SourceError, match=r"line 2: width is '64', and 0 or 1 is needed"):
        listed(folder / "t.csv", "label_columns=[width,a]")


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
