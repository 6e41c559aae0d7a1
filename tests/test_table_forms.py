"""Tables in the forms in which people write them: separators, JSON, gzip, Arrow's types, columns of 0 and 1."""

import gzip
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.columns import Labels
from data_prep.listing import SourceError
from tests.labelled_tables import embedded, image_files, images, labels_of, listed


@pytest.fixture
def folder(tmp_path):
    return image_files(tmp_path)


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
        ("t.csv", gzip.compress(b"path,label\na/0.jpg,cat\n"), r"it is compressed: call it t\.csv\.gz"),
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
