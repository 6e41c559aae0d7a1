"""Which files a table's images are, and COCO's JSON as a table."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.folders import folder_at
from data_prep.listing import SourceError
from tests.layouts import IMAGE, commands, listed, names, numbers, write

# -------------------------------------------------------------------------------------------------- names in tables


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("above", ["", "pictures/"])
def test_ids_without_an_ending_find_their_files(tmp_path, messages, form, above):
    images = [f"{above}{number:06d}.{'png' if number == 3 else 'jpg'}" for number in range(4)]
    write(tmp_path / "images", *images)
    rows = [{"id_code": image.rpartition(".")[0], "diagnosis": "ab"[k % 2]} for k, image in enumerate(images)]
    table = tmp_path / f"train.{form}"
    if form == "csv":
        table.write_text("id_code,diagnosis\n" + "".join(f"{row['id_code']},{row['diagnosis']}\n" for row in rows))
    elif form == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), table)
    found = listed(tmp_path / "images", labels=table)
    assert (names(found), found.classes, numbers(found)) == (images, ["a", "b"], [0, 1, 0, 1])
    assert "4 images are named without their endings" in messages()
    if above:
        with pytest.raises(SourceError, match=r"is in .*, but .*/images has it") as refused:
            listed(table)
        assert names(commands(refused)[0]) == images
    else:
        assert names(listed(table)) == [f"images/{image}" for image in images]
        write(tmp_path / "more", images[0])
        with pytest.raises(SourceError, match=r"could be 'images/000000.jpg' or 'more/000000.jpg'"):
            listed(table)
    write(tmp_path / "images", images[0].replace("jpg", "webp"))
    with pytest.raises(SourceError, match=r"could be '.*000000.jpg' or '.*000000.webp'"):
        listed(tmp_path / "images", labels=table)


def test_ids_without_an_ending_on_s3(s3):
    there = folder_at(s3.bucket(), "test")
    for number in range(3):
        there.write_bytes(f"images/{number:03d}.jpg", IMAGE)
    there.write_bytes("train.csv", b"id,breed\n000,pug\n001,husky\n002,pug\n")
    found = listed(f"{there.url}/images", labels=f"{there.url}/train.csv")
    assert (names(found), numbers(found)) == (["000.jpg", "001.jpg", "002.jpg"], [1, 0, 1])
    with pytest.raises(SourceError, match="which would be their only class") as refused:
        listed(there.url)
    assert len(commands(refused)[0]) == 3


def test_an_image_that_is_named_with_and_without_its_ending_is_one(tmp_path):
    write(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "table.csv").write_text("path,label\na,x\na.jpg,y\nb,x\n")
    found = listed(tmp_path, labels=tmp_path / "table.csv")
    assert names(found) == ["a.jpg", "b.jpg"]
    assert [len(found.labels[row]) for row in range(2)] == [2, 1]


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet"])
def test_splits_in_a_column_are_told_apart(tmp_path, form):
    """As the table of BIRDS 525 and FER 2013 has them."""
    rows = [
        {"class id": k % 2, "filepaths": f"{split}/{k}.jpg", "labels": "ab"[k % 2], column: split}
        for column in ("data set",)
        for split in ("train", "valid", "test")
        for k in range(3)
    ]
    write(tmp_path, *(str(row["filepaths"]) for row in rows))
    table = tmp_path / f"birds.{form}"
    if form == "csv":
        lines = [",".join(map(str, row.values())) for row in rows]
        table.write_text("\n".join([",".join(rows[0]), *lines]))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=2)
    else:
        text = json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows))
        table.write_text(text)
    for source, labels in ((table, {}), (tmp_path, {"labels": table})):
        with pytest.raises(SourceError, match=r"column 'data set': 'train' \(3\), 'valid' \(3\), 'test' \(3\)"):
            listed(source, **labels, kind="table")
        found = listed(source, **labels, kind="table", split="val")
        assert (names(found), numbers(found)) == ([f"valid/{k}.jpg" for k in range(3)], [0, 1, 0])
        assert len(listed(source, **labels, kind="table", split="all")) == 9
        with pytest.raises(SourceError, match=r"several splits, in column") as refused:
            listed(source, **labels)
        assert [len(each) for each in commands(refused)] == [3, 3, 3, 9]
    with pytest.raises(SourceError, match="split = extra: column 'data set'"):
        listed(table, split="extra")


def test_a_split_that_nothing_knows_is_refused(tmp_path):
    write(tmp_path, "a.jpg")
    (tmp_path / "table.csv").write_text("path,label\na.jpg,x\n")
    with pytest.raises(ValueError, match=r"split is not read: .* no column of it names splits"):
        listed(tmp_path / "table.csv", split="train")


def hugging_face_paths(path: Path, paths: list[str]) -> Path:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": name} for name in paths], kind)
    features = {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}
    table = pa.table({"image": images, "label": [k % 2 for k in range(len(paths))]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": features})}), path)
    return path


def test_paths_in_the_column_of_images_are_followed(tmp_path):
    paths = [f"images/{number}.jpg" for number in range(4)]
    table = hugging_face_paths(write(tmp_path / "set", *paths) / "train.parquet", paths)
    for source in (table, table.parent):
        found = listed(source)
        assert (names(found), found.classes, numbers(found)) == (paths, ["cat", "dog"], [0, 1, 0, 1])
    elsewhere = hugging_face_paths(tmp_path / "away.parquet", paths)
    assert names(listed(table.parent, labels=elsewhere)) == paths
    with pytest.raises(SourceError, match=r"but .*/set has it") as refused:
        listed(elsewhere)
    assert names(commands(refused)[0]) == paths
    for outside in ("/etc/hostname", "../secret.jpg"):
        hugging_face_paths(table, [outside, paths[0]])
        with pytest.raises(SourceError, match=r"line 1: path .* (absolute path|leads out of the folder)"):
            listed(table)
    hugging_face_paths(table, ["http://127.0.0.1:9/a.jpg", paths[0]])
    with pytest.raises(SourceError, match="nothing is fetched unless you say so"):
        listed(table)


# ------------------------------------------------------------------------------------------------------------- COCO


def coco(names: list[str], **more: object) -> dict[str, object]:
    """Two boxes and three categories, whose ids are neither dense nor in the order of their names."""
    return {
        "images": [{"id": 10 + k, "file_name": name, "width": 16, "height": 12} for k, name in enumerate(names)],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 90, "bbox": [0, 0, 1, 1]},
            {"id": 2, "image_id": 10, "category_id": 7, "bbox": [0, 0, 1, 1]},
            {"id": 3, "image_id": 10, "category_id": 7, "bbox": [1, 1, 1, 1]},
            {"id": 4, "image_id": 12, "category_id": 7, "iscrowd": 1},
        ],
        "categories": [{"id": 90, "name": "bus"}, {"id": 7, "name": "zebra"}, {"id": 8, "name": "cup"}],
        **more,
    }


def test_coco_is_read(tmp_path):
    images = [f"{number:012d}.jpg" for number in range(3)]
    write(tmp_path / "train2017", *images)
    write(tmp_path / "val2017", "000000000009.jpg")
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    (annotations / "instances_train2017.json").write_text(json.dumps(coco(images)))
    captions = coco(images, annotations=[{"id": 1, "image_id": 10, "caption": "a bus"}])
    (annotations / "captions_train2017.json").write_text(json.dumps(captions))
    (annotations / "instances_val2017.json").write_text(
        json.dumps(coco(["000000000009.jpg", "000000000008.jpg", "000000000007.jpg"]))
    )
    found = listed(tmp_path / "train2017", labels=annotations / "instances_train2017.json")
    assert found.classes == ["zebra", "cup", "bus"]  # by their ids
    assert [[int(number) for number in found.labels[row]["class"]] for row in range(3)] == [[0, 2], [], [0]]
    for source in (tmp_path, tmp_path / "train2017"):
        with pytest.raises(SourceError, match=r"annotations/instances_train2017\.json|are splits") as refused:
            listed(source)
        assert commands(refused)[0].classes == ["zebra", "cup", "bus"]
    with pytest.raises(SourceError, match=r"captions_train2017.json is COCO's JSON of captions.*instances_"):
        listed(tmp_path / "train2017", labels=annotations / "captions_train2017.json")
    with pytest.raises(ValueError, match="is COCO's JSON, which has no columns"):
        listed(tmp_path / "train2017", labels=annotations / "instances_train2017.json", label_column="x")


def test_coco_with_one_category_an_image_gives_classes(tmp_path):
    images = [f"{number}.jpg" for number in range(3)]
    each = [{"id": k, "image_id": 10 + k, "category_id": (7, 90, 7)[k]} for k in range(3)]
    write(tmp_path, *images)
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(coco(images, annotations=each)))
    for settings in ({}, {"labels": tmp_path / "_annotations.coco.json"}):
        found = listed(tmp_path, **settings)
        assert (found.classes, numbers(found)) == (["zebra", "cup", "bus"], [0, 2, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": []}, "without categories"),
        ({"categories": [{"id": 7, "name": "a"}, {"id": 7, "name": "b"}]}, "no id of its own"),
        ({"categories": [{"id": 7, "name": 3}]}, "has no name"),
        ({"images": [{"id": 10}]}, "images, entry 1, has no file_name"),
        ({"images": [{"id": 10, "file_name": "../../etc/passwd"}], "annotations": []}, "leads out of the folder"),
        ({"images": [3]}, "images, entry 1, is no object"),
        ({"annotations": [{"image_id": 99, "category_id": 7}]}, "an annotation is of image 99"),
        ({"annotations": [{"image_id": [1], "category_id": 7}]}, "is of no image"),
        ({"annotations": [{"image_id": 10, "segments_info": []}]}, "panoptic"),
    ],
)
def test_coco_that_cannot_be_is_refused(tmp_path, change, message):
    write(tmp_path, "0.jpg")
    (tmp_path / "coco.json").write_text(json.dumps(coco(["0.jpg", "1.jpg", "2.jpg"], **change)))
    with pytest.raises(SourceError, match=message):
        listed(tmp_path, labels=tmp_path / "coco.json")
    (tmp_path / "coco.json").write_bytes(b"\xed" + (tmp_path / "coco.json").read_bytes())
    with pytest.raises(SourceError, match="it is not UTF-8"):
        listed(tmp_path, labels=tmp_path / "coco.json")
