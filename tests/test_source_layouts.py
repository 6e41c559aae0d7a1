"""Folders and tars as other tools and people lay them out: read right, or refused with the command that is right."""

import json
import pickle
import re
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.folders import folder_at
from data_prep.index_tars import label_extension_of, list_tars
from data_prep.listing import SourceError
from tests.corpora import encoded
from tests.layouts import IMAGE, commands, listed, names, packed, shards, tar_of, write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))


# --------------------------------------------------------------------------------------- splits beside each other


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("birds-train-0000.tar", "birds-validation-0000.tar"),
        ("imagenet-train-000.tar", "imagenet-val-000.tar"),
        ("Train_0.tar", "dev_0.tar"),
        ("train.tar", "rest.tar"),
    ],
)
def test_tars_of_several_splits_are_not_joined(tmp_path, train, other):
    folder = shards(tmp_path / "tars", train, other)
    for source in (folder, f"{folder}/*.tar"):
        with pytest.raises(SourceError, match="files of several splits") as refused:
            listed(source)
        found = commands(refused)
        assert {len(each) for each in found[:-1]} == {2}
        assert len(found[-1]) == 4  # split=all
    assert {name.split("/")[0] for name in names(listed(folder, split="train"))} == {train}
    assert len(listed(f"{folder}/{{{train},{other}}}")) == 4
    with pytest.raises(SourceError, match=r"split = test: .* has no file of it, but .*train"):
        listed(folder, split="test")


def test_splits_are_told_by_timms_description_too(tmp_path):
    folder = shards(tmp_path, "a.tar", "b.tar", "c.tar")
    info = {"splits": {"train": {"filenames": ["a.tar", "b.tar"]}, "validation": {"filenames": ["c.tar"]}}}
    (folder / "_info.json").write_text(json.dumps(info))
    with pytest.raises(SourceError, match=r"train \(2: 'a.tar', 'b.tar'\); validation \(1: 'c.tar'\)"):
        listed(folder)
    assert len(listed(folder, split="train")) == 4
    (folder / "_info.json").write_text('{"splits": 3}')
    assert len(listed(folder)) == 6


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_of_several_splits_are_not_joined(tmp_path, suffix):
    folder = write(tmp_path, *(f"images/{number}.jpg" for number in range(6))).joinpath("tables")
    folder.mkdir()
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        rows = [{"path": f"../images/{2 * number + k}.jpg".removeprefix("../"), "label": "ab"[k]} for k in (0, 1)]
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        else:
            lines = [f"{row['path']},{row['label']}\n" for row in rows]
            (folder / f"{name}.csv").write_text("path,label\n" + "".join(lines))
    for labels in (folder, f"{folder}/*.{suffix}"):
        with pytest.raises(SourceError, match=r"test \(1: 'test-00000-of-00001"):
            listed(tmp_path, labels=labels)
    chosen: tuple[dict[str, object], ...] = (
        {"labels": folder, "split": "train"},
        {"labels": f"{folder}/train-*.{suffix}"},
        {"labels": f"{folder}/train-0000{{0,1}}-of-00002.{suffix}"},
    )
    for given in chosen:
        assert names(listed(tmp_path, **given)) == [f"images/{number}.jpg" for number in range(4)]
    for path in folder.iterdir():
        path.rename(tmp_path / path.name)
    folder.rmdir()
    with pytest.raises(SourceError, match="files of several splits"):
        listed(f"{tmp_path}/t*.{suffix}")
    assert len(listed(f"{tmp_path}/train*.{suffix}")) == 4
    assert len(listed(f"{tmp_path}/t*.{suffix}", split="test")) == 2


def split_folders(root: Path, *splits: str) -> Path:
    return write(root, *(f"{split}/{name}/{k}.jpg" for split in splits for name in ("cat", "dog") for k in (0, 1)))


_SPLITS = [
    ("train", "valid", "test"),
    ("Training", "Validation"),
    ("train2017", "val2017"),
    ("in21k_train", "in21k_val"),
]


@pytest.mark.parametrize(
    ("splits", "form"),
    [*((splits, form) for splits in _SPLITS for form in ("folder", "tar", "tar.gz")), (_SPLITS[0], "s3")],
)
def test_folders_of_splits_are_no_classes(tmp_path, request, splits, form):
    folder = split_folders(tmp_path / "data", *splits)
    source: object = folder
    if form.startswith("tar"):
        source = packed(folder, tmp_path / f"data.{form}")
    elif form == "s3":
        source = request.getfixturevalue("s3").bucket()
        for path in folder.rglob("*.jpg"):
            folder_at(str(source), "test").put(path, str(path.relative_to(folder)))
    with pytest.raises(SourceError, match="are splits and no classes") as refused:
        listed(source)
    for found in commands(refused):
        assert (found.classes, len(found)) == (["cat", "dog"], 4)
    train = listed(source, split="train")
    assert names(train) == names(listed(source, inside=splits[0]))
    kind = "tar" if form.startswith("tar") else "folder"
    assert len(listed(source, kind=kind).classes) == len(splits)  # where somebody means it
    with pytest.raises(SourceError, match=r"split = unsup: .* (of that split|no folder and no file of it)"):
        listed(source, split="unsup")


def test_classes_with_the_word_of_a_split_in_their_names_stay_classes(tmp_path):
    folder = write(
        tmp_path, *(f"{name}/{k}.jpg" for name in ("test tube", "steam train", "train", "bus") for k in (0, 1))
    )
    assert listed(folder).classes == ["bus", "steam train", "test tube", "train"]


def test_folders_that_differ_in_the_word_of_a_split_are_no_classes(tmp_path):
    """As Market-1501 has them, with the images directly in them."""
    folder = write(
        tmp_path, *(f"{name}/{k}.jpg" for name in ("bounding_box_train", "bounding_box_test", "query") for k in "01")
    )
    with pytest.raises(
        SourceError, match="'bounding_box_train', 'bounding_box_test' are splits and no classes, beside"
    ):
        listed(folder)


def test_a_split_in_a_tar_of_tars_is_no_class(tmp_path):
    inner = tar_of(tmp_path / "train.tar", {"cat/0.jpg": IMAGE}).read_bytes()
    outer = tar_of(tmp_path / "data.tar", {"train.tar": inner, "val.tar": inner})
    with pytest.raises(SourceError, match=r"holds the tars train, val, which are splits and no classes: unpack it"):
        listed(outer)
    classes = tar_of(tmp_path / "classes.tar", {"bus.tar": inner, "train.tar": inner})
    assert listed(classes).classes == ["bus", "train"]


# ------------------------------------------------------------------------------------------ above or below the classes


@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize(
    "extra", [(), ("__MACOSX/a/._0.jpg", ".DS_Store", "raw/._x", "raw/cat/@eaDir/0.jpg", "raw/cat/.cache/1.jpg")]
)
def test_the_folder_above_the_classes_is_refused(tmp_path, form, extra):
    folder = write(tmp_path / "animals", *(f"raw/{name}/{k}.jpg" for name in ("cat", "dog") for k in (0, 1)), *extra)
    if form == "tar":
        assert listed(packed(folder, tmp_path / "a.tar")).classes == ["cat", "dog"]
        return
    with pytest.raises(SourceError, match="all images lie below one folder, 'raw'") as refused:
        listed(folder)
    (found,) = commands(refused)
    assert (found.classes, len(found)) == (["cat", "dog"], 4)
    assert names(listed(folder, inside="raw")) == names(found)
    write(folder, "README.md", content=b"# Animals")
    with pytest.raises(SourceError, match="all images lie below one folder"):
        listed(folder)


def test_a_deep_way_to_the_classes_or_splits_is_named_whole(tmp_path):
    split_folders(tmp_path / "repo" / "data" / "images", "train", "val")
    with pytest.raises(SourceError) as refused:
        listed(tmp_path / "repo")
    assert [len(found) for found in commands(refused)] == [4, 4]
    write(tmp_path / "dogs", *(f"train/train/{name}/0.jpg" for name in ("husky", "pug")))
    with pytest.raises(SourceError) as refused:
        listed(tmp_path / "dogs")
    assert [found.classes for found in commands(refused)] == [["husky", "pug"]]


def test_several_copies_of_the_same_classes_are_refused(tmp_path):
    classes = ("apple", "grape", "peach", "plum")
    folder = write(
        tmp_path / "a", *(f"{top}/{name}/0.jpg" for top in ("color", "gray", "segmented") for name in classes)
    )
    with pytest.raises(SourceError, match=r"have the same folders in them \('apple', 'grape', 'peach'") as refused:
        listed(folder)
    assert [found.classes for found in commands(refused)] == [list(classes)] * 3
    for tops, below in ((("a", "b", "c"), ("left", "right")), (("a", "b", "c"), ("images",))):
        own = write(tmp_path / below[0], *(f"{top}/{name}/0.jpg" for top in tops for name in below))
        assert listed(own).classes == list(tops)  # folders inside of classes are theirs


def test_domains_with_the_same_classes_below_another_folder_are_refused(tmp_path):
    classes = ("bag", "bike", "mug")
    folder = write(tmp_path, *(f"{top}/images/{name}/0.jpg" for top in ("amazon", "dslr") for name in classes))
    with pytest.raises(SourceError, match="have the same folders in them") as refused:
        listed(folder)
    assert [found.classes for found in commands(refused)] == [list(classes)] * 2


def test_splits_inside_of_each_class_are_refused_with_links_that_work(tmp_path):
    folder = write(
        tmp_path / "mvtec",
        *(
            f"{top}/{below}/{k}.png"
            for top in ("bottle", "cable")
            for below in ("train/good", "test/cut")
            for k in (0, 1)
        ),
    )
    with pytest.raises(SourceError, match="each of its folders holds splits") as refused:
        listed(folder)
    line = next(line for line in str(refused.value).splitlines() if line.startswith("  mkdir"))
    subprocess.run(line, shell=True, check=True)
    assert [(each.classes, len(each)) for each in commands(refused)] == [(["bottle", "cable"], 4)]


def test_many_folders_above_the_classes_are_said(tmp_path, messages):
    letters = "abcdefghijklmnopqrstuvwx"
    listed(write(tmp_path, *(f"{letter}/{letter}{k}/0.jpg" for letter in letters for k in range(2))))
    assert "if those are the classes, this is a level above them" in messages()


@pytest.mark.parametrize(
    ("files", "texts", "expected"),
    [
        (  # CelebA at Kaggle
            ["img_align/img_align/01.jpg", "img_align/img_align/02.jpg"],
            {"attr.csv": "image_id,species\n01.jpg,a\n02.jpg,b\n"},
            [2],
        ),
        (  # HAM10000: ids, in parts
            ["images_part_1/ISIC_01.jpg", "images_part_2/ISIC_02.jpg", "images_part_1/ISIC_03.jpg",
             "images_part_2/ISIC_04.jpg"],
            {"meta.csv": "image_id,diagnosis\n" + "".join(f"ISIC_0{k},x{k % 2}\n" for k in (1, 2, 3, 4))},
            [4],
        ),
        (  # Open Images
            ["train/00a1.jpg", "train/00a2.jpg", "test/00b1.jpg", "test/00b2.jpg"],
            {"train-labels.csv": "ImageID,Source,LabelName\n00a1,x,/m/1\n00a2,x,/m/2\n",
             "test-labels.csv": "ImageID,Source,LabelName\n00b1,x,/m/1\n00b2,x,/m/2\n"},
            [2, 2],
        ),
        (  # Tiny ImageNet's validation images
            ["images/val_0.JPEG", "images/val_1.JPEG"],
            {"val_annotations.txt": "val_0.JPEG\tn01\t0\t0\t1\t1\nval_1.JPEG\tn02\t0\t0\t1\t1\n"},
            [2],
        ),
        (  # ImageNet at Kaggle
            [*(f"ILSVRC/Data/CLS-LOC/train/{name}/{name}_1.JPEG" for name in ("n01", "n02")),
             *(f"ILSVRC/Data/CLS-LOC/val/val_0{k}.JPEG" for k in (1, 2))],
            {"LOC_val_solution.csv": "ImageId,PredictionString\nval_01,n01 1 2 3 4\nval_02,n02 1 1 1 1\n",
             "ILSVRC/Annotations/CLS-LOC/val/val_01.xml": "x"},
            [2, 2],
        ),
    ],
)  # fmt: skip
def test_known_data_sets_are_refused_with_commands_that_work(tmp_path, files, texts, expected):
    folder = write(tmp_path, *files)
    for name, text in texts.items():
        write(folder, name, content=text.encode())
    with pytest.raises(SourceError) as refused:
        listed(folder)
    assert [len(found) for found in commands(refused)] == expected


def test_data_below_a_repository_is_found(tmp_path):
    write(tmp_path / "hub", "README.md", ".git/config", content=b"x")
    write(tmp_path / "hub", "assets/banner.png")
    folder = shards(tmp_path / "hub" / "data", "train-0.tar", "test-0.tar")
    with pytest.raises(SourceError, match="tars or tables lie in sub-folders: 'data' has 2") as refused:
        listed(tmp_path / "hub")
    assert [len(found) for found in commands(refused)] == [2, 2]
    (folder / "test-0.tar").unlink()
    with pytest.raises(SourceError) as refused:
        listed(tmp_path / "hub")
    assert [len(found) for found in commands(refused)] == [2]


def test_inside_goes_with_truth_and_labels(tmp_path):
    folder = write(tmp_path / "data", *(f"val/{k}.jpg" for k in range(4)), "train/cat/0.jpg")
    (tmp_path / "truth.txt").write_text("cat\ndog\ncat\nbird\n")
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(f"{k}.jpg,{'ab'[k % 2]}\n" for k in range(4)))
    for source in (folder, packed(folder, tmp_path / "data.tar"), packed(folder, tmp_path / "data.tar.gz")):
        for given in ({"inside": "val"}, {"split": "validation"}):
            found = listed(source, truth=tmp_path / "truth.txt", **given)
            assert names(found) == ["bird/3.jpg", "cat/0.jpg", "cat/2.jpg", "dog/1.jpg"]
    assert listed(folder, inside="val", labels=tmp_path / "labels.csv").classes == ["a", "b"]
    with pytest.raises(SourceError, match=r"inside = 'vals': .* no such folder with anything in it: 'train', 'val'"):
        listed(folder, inside="vals")
    with pytest.raises(ValueError, match="leads out of the folder"):
        listed(folder, inside="../data")


def test_inside_goes_with_split_and_with_shards(tmp_path):
    folder = split_folders(tmp_path / "repo" / "data", "train", "val").parent
    for source in (folder, packed(folder, tmp_path / "repo.tar")):
        assert len(listed(source, inside="data", split="val")) == 4
    deep = tar_of(tmp_path / "deep.tar", {f"a/b/{split}/c/0.jpg": IMAGE for split in ("train", "val")})
    assert names(listed(deep, split="val")) == names(listed(deep, inside="train")) == ["c/0.jpg"]
    members = {f"{top}/{k}.{suffix}": IMAGE if suffix == "jpg" else b"1" for top in "ab" for k in (0, 1)
               for suffix in ("jpg", "cls")}  # fmt: skip
    tar = tar_of(tmp_path / "shards" / "0.tar", members)
    for source in (tar, tar.parent / "*.tar"):
        assert names(listed(source, inside="b")) == ["0.tar/b/0.jpg", "0.tar/b/1.jpg"]
        with pytest.raises(SourceError, match=r"inside = 'c': no sample .* like '0\.tar/a/0\.jpg'"):
            listed(source, inside="c")


def test_a_folder_of_other_files_is_no_class(tmp_path, messages):
    folder = write(tmp_path, "cat/0.jpg", "dog/0.jpg", "annotations/0.xml", "annotations/1.xml")
    (folder / "bird").mkdir()
    assert listed(folder).classes == ["bird", "cat", "dog"]
    assert "left out: annotations in" in messages()
    with pytest.raises(SourceError, match=r"no images in its 1 sub-folders, but 2 other files such as 'raw/..cr2'"):
        listed(write(tmp_path / "raw_only", "raw/0.cr2", "raw/1.cr2"))


# --------------------------------------------------------------------------------------- what lies beside the images


@pytest.mark.parametrize(
    ("folder", "file", "row", "given"),
    [
        ("train_images", "train.csv", "{name},{label}", "path,label"),
        ("images", "annotations/labels.csv", "{name},{label}", "filename,class"),
        ("train", "metadata.csv", "train/{name},{label}", "file_name,label"),
        ("img", "data.csv", "img/{name},{label}", "file_path,label"),
        ("images", "aptos.csv", "{name},{label}", "what,diagnosis"),
    ],
)
def test_one_folder_beside_a_table_is_no_class(tmp_path, folder, file, row, given):
    source = write(tmp_path, *(f"{folder}/{number:04d}.jpg" for number in range(4)), f"{folder}/.DS_Store")
    rows = [row.format(name=f"{number:04d}.jpg", label="ab"[number % 2]) for number in range(4)]
    write(tmp_path, file, content="\n".join([given, *rows]).encode())
    write(tmp_path, "sample_submission.csv", content="\n".join(["id,label", *rows]).encode())
    if file == "metadata.csv":  # whose name says what it is
        found = [listed(source)]
    else:
        with pytest.raises(SourceError, match=f"one folder, '{folder}', which would be their only class") as refused:
            listed(source)
        found = commands(refused)[:1]
    assert [(each.classes, len(each)) for each in found] == [(["a", "b"], 4)]
    with pytest.raises(SourceError, match=r"unpack|tar -xf|one folder"):
        listed(packed(source, tmp_path / "all.tar"))


def test_a_competition_is_refused_with_the_table_of_each_split(tmp_path):
    """As Kaggle lays them out: train.csv and test.csv, the latter without labels."""
    folder = write(tmp_path / "kg", *(f"{top}_images/{top[1]}{k}.jpg" for top in ("train", "test") for k in range(3)))
    (folder / "train.csv").write_text("id_code,diagnosis\n" + "".join(f"r{k},x{k % 2}\n" for k in range(3)))
    (folder / "test.csv").write_text("id_code\n" + "".join(f"e{k}\n" for k in range(3)))
    with pytest.raises(SourceError, match="are splits and no classes") as refused:
        listed(folder)
    first = str(refused.value).splitlines()[1]
    assert first.endswith(f"{folder}/train_images DESTINATION labels={folder}/train.csv")
    assert "test.csv" not in str(refused.value)
    assert listed(folder / "train_images", labels=folder / "train.csv").classes == ["x0", "x1"]
    with pytest.raises(SourceError, match=r"tar -xf .*labels=FOLDER/train\.csv"):
        listed(packed(folder, tmp_path / "kg.tar.gz"))
    with pytest.raises(SourceError, match=r"labels=.*/train\.csv"):
        listed(folder / "train_images")


def test_a_table_in_the_folder_of_its_images_is_named_or_read(tmp_path):
    write(tmp_path, *(f"{k}.jpg" for k in range(4)))
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(f"{k}.jpg,{'ab'[k % 2]}\n" for k in range(4)))
    with pytest.raises(SourceError, match="in no sub-folders; 'labels") as refused:
        listed(tmp_path)
    assert [each.classes for each in commands(refused)] == [["a", "b"]]
    (tmp_path / "labels.csv").rename(tmp_path / "metadata.csv")
    assert listed(tmp_path).classes == ["a", "b"]
    lines = [json.dumps({"file_name": f"{k}.jpg", "label": "xy"[k % 2]}) for k in range(4)]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert listed(tmp_path).classes == ["x", "y"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["JPEGImages/2007_1.jpg", "Annotations/2007_1.xml", "ImageSets/Main/train.txt"],
            "has XML beside them .*Pascal VOC",
        ),
        (["images/im01.jpg", "annotations.xml"], "XML beside them .*CVAT"),
        (["images/im01.jpg", "labels/im01.txt", "data.yaml"], "a text file for each .YOLO"),
        (["images/im01.jpg", "masks/im01.png"], "images of the same names .masks"),
        (["images/im01.jpg"], "'images', which would be their only class"),
        (["train/cat.0.jpg", "train/dog.0.jpg"], "'train', which would be their only class"),
        (["0.jpg", "small/0.jpg"], "'small', which would be their only class; 1 others lie directly"),
    ],
)
def test_images_in_one_folder_without_a_table_are_refused(tmp_path, files, message):
    with pytest.raises(SourceError, match=message):
        listed(write(tmp_path, *files))


def test_one_class_alone_is_one_where_nothing_speaks_against_it(tmp_path):
    assert listed(write(tmp_path, "husky/0.jpg", "README.md", "LICENSE")).classes == ["husky"]


# ------------------------------------------------------------------------------------------------------- img2dataset


def test_tars_beside_a_table_of_addresses_are_read(tmp_path, messages):
    folder = shards(tmp_path / "wds", "00000.tar", "00001.tar", label="json")
    for part in ("00000", "00001"):
        rows = [{"url": f"http://127.0.0.1:9/{k}.jpg", "label": k, "key": f"{part}{k}"} for k in range(2)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet")
        (folder / f"{part}_stats.json").write_text('{"count": 2}')
    assert names(listed(folder))[0] == "00000.tar/0000.jpg"
    with pytest.raises(SourceError, match=r"nothing is fetched unless .* fetch=true it would be 2 images of 1 hosts: "
                                          r"'127.0.0.1:9' \(2\)"):  # fmt: skip
        listed(folder / "00000.parquet")
    assert len(listed(folder / "00000.parquet", fetch=True)) == 2
    assert "fetching 2 images of 1 hosts" in messages()
    (tmp_path / "table.csv").write_text("url,label\nhttps://a.example/0.jpg,x\nHTTP://b.example:80/1.jpg,x\n")
    with pytest.raises(SourceError, match="2 images of 2 hosts"):
        listed(tmp_path / "table.csv")


def test_what_tars_lack_is_said(tmp_path):
    folder = shards(tmp_path / "captions", "00000.tar", label="txt")
    pq.write_table(pa.table({"url": ["http://127.0.0.1:9/0.jpg"], "label": [1]}), folder / "00000.parquet")
    with pytest.raises(SourceError, match=r"no label beside its images, neither .cls nor .json: .* of .jpg, .txt"):
        listed(folder)
    tar_of(tmp_path / "keys" / "0.tar", {"0.jpg": IMAGE, "0.json": b'{"url": "x", "caption": "y"}'})
    with pytest.raises(SourceError, match=r"no sample of .* has a label: 1 x .json has no label"):
        listed(tmp_path / "keys")


def test_the_parts_of_img2dataset_are_no_classes(tmp_path):
    for part in ("00000", "00001"):
        write(tmp_path / "files", *(f"{part}/{part}{k}.jpg" for k in range(2)))
        for k in range(2):
            write(tmp_path / "files", f"{part}/{part}{k}.json", content=b'{"label": %d}' % k)
    with pytest.raises(SourceError, match="parts and no classes") as refused:
        listed(tmp_path / "files")
    line = next(line for line in str(refused.value).splitlines() if line.startswith("  mkdir"))
    subprocess.run(line, shell=True, check=True)
    assert [(each.classes, len(each)) for each in commands(refused)] == [(["0", "1"], 4)]
    numbered = write(tmp_path / "numbers", *(f"{number:05d}/0.jpg" for number in range(3)))
    assert len(listed(numbered).classes) == 3


# ------------------------------------------------------------------------------------------------ tars with faults


def test_an_empty_or_cut_first_tar_hides_nothing(tmp_path, messages):
    folder = shards(tmp_path, "a.tar", "b.tar", "c.tar")
    (folder / "a.tar").write_bytes(b"")
    assert len(listed(folder)) == 4
    assert "a.tar is empty" in messages()
    whole = (folder / "b.tar").read_bytes()
    (folder / "a.tar").write_bytes(whole[:700])
    with pytest.raises(SourceError, match=r"a\.tar is cut short"):
        listed(folder)
    for name in ("a.tar", "b.tar", "c.tar"):
        (folder / name).write_bytes(b"")
    with pytest.raises(SourceError, match=r"a\.tar is empty, and so are 2 more"):
        listed(folder, kind="webdataset")


def test_an_empty_or_cut_first_tar_is_no_reason_to_index_nothing(tmp_path, messages):
    folder = shards(tmp_path, "a.tar", "b.tar", "c.tar", label="json")
    (folder / "a.tar").write_bytes(b"")
    (folder / "b.tar").write_bytes((folder / "c.tar").read_bytes()[:700])
    tars = list_tars(str(folder), None)
    assert [tar.name for tar in tars] == ["b.tar", "c.tar"]
    assert "left out: 1 empty tars, for example" in messages()
    assert label_extension_of(tars) == "json"
    with pytest.raises(SourceError, match=r"b\.tar is cut short"):
        label_extension_of(tars[:1])
    shards(tmp_path, "train-0.tar", "val-0.tar")
    with pytest.raises(SourceError, match=r"data_prep/index\.py .* split=train"):
        list_tars(str(folder), None)
    assert [tar.name for tar in list_tars(str(folder), "train")] == ["train-0.tar"]
    with pytest.raises(SourceError, match=r"train \(1: 'train-0.tar'\); validation"):
        list_tars(f"{folder}/*-0.tar", None)


def test_compressed_shards_are_named_for_what_they_are(tmp_path):
    members = {"0.jpg": IMAGE, "0.cls": b"0", "1.jpg": IMAGE, "1.cls": b"1"}
    packed_shard = tar_of(tmp_path / "shards" / "train-000.tar.gz", members)
    for source in (packed_shard, packed_shard.parent, f"{packed_shard.parent}/*.tar.gz"):
        with pytest.raises(SourceError, match="gunzip") as refused:
            listed(source)
        assert "tar of class tars itself" not in str(refused.value)


def test_compressed_shards_with_folders_in_them_hold_no_classes(tmp_path):
    members = {
        f"part-0/{k}.{suffix}": IMAGE if suffix == "jpg" else b"0" for k in range(2) for suffix in ("jpg", "cls")
    }
    with pytest.raises(SourceError, match=r"as WebDataset shards do: .*gunzip"):
        listed(tar_of(tmp_path / "shard.tar.gz", members))


def test_tables_two_levels_down_are_found(tmp_path):
    rows = [{"path": "a.jpg", "label": "x"}]
    for split in ("train", "test"):
        (tmp_path / "default" / split).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "default" / split / "0000.parquet")
        write(tmp_path, f"default/{split}/a.jpg", content=IMAGE)
        (tmp_path / "default" / split / "a.jpg").rename(tmp_path / "default" / split / "a")  # no image's name
    with pytest.raises(SourceError, match="tars or tables lie in sub-folders") as refused:
        listed(tmp_path)
    assert re.findall(r"DESTINATION (.*)", str(refused.value)) == ["split=train", "split=test"]


def test_the_reasons_of_samples_without_labels_are_given(tmp_path):
    members = {f"{k}.jpg": IMAGE for k in range(3)} | {f"{k}.cls": b"99999999" for k in range(3)}
    tar_of(tmp_path / "0.tar", dict(sorted(members.items())))
    with pytest.raises(SourceError, match=r"no sample of .* has a label: 3 x .*99999999"):
        listed(tmp_path)


# ---------------------------------------------------------------------------------------------- formats of others


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["imagenet-train.tfrecord-00000-of-00010"], "TFRecord files .*tf.data.TFRecordDataset"),
        (["train-00000-of-01024", "validation-00000-of-00128"], "TFRecord"),
        (["train/0.tfrec", "val/0.tfrec"], "TFRecord"),
        (["train.beton"], "FFCV .*ffcv.loader"),
        (["index.json", "shard.00000.mds"], "MosaicML's MDS .*streaming.StreamingDataset"),
        (["train/index.json", "train/shard.00000.mds.zstd", "val/index.json"], "MosaicML's MDS"),
        (["index.json", "chunk-0-0.bin"], "litData's chunks"),
        (["birds.lance/_versions/1.manifest", "birds.lance/data/0.lance"], "a Lance data set"),
        (["data.mdb", "lock.mdb"], "an LMDB database"),
        (["train_lmdb/data.mdb", "train_lmdb/lock.mdb"], "an LMDB database"),
        (["images.h5"], "an HDF5 file"),
        (["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"], "CIFAR as pickles"),
        (["data_batch_1", "test_batch"], "CIFAR as pickles"),
        (["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"], "MNIST's idx files"),
        (["x_train.npy", "y_train.npy"], "NumPy arrays"),
        (["digits.npz"], "NumPy arrays"),
        (["train_32x32.mat"], "a MATLAB file"),
        (["data/archive.zip"], "a zip archive.*unzip"),
        (["train.rec", "train.idx"], "RecordIO"),
        (["state.json", "dataset_info.json", "data-00000-of-00001.arrow"], "save_to_disk"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path, files, message):
    folder = write(tmp_path / "set", *files, content=b"x" * 100)
    with pytest.raises(SourceError, match=message):
        listed(folder)
    single = folder / files[0]
    if single.suffix in (".beton", ".h5", ".npy", ".npz", ".mat", ".zip", ".rec"):
        with pytest.raises(SourceError, match=message):
            listed(single)
    write(folder, "cat/0.jpg", "dog/0.jpg")
    if "/" not in files[0]:
        assert listed(folder).classes == ["cat", "dog"]  # a file beside class folders changes nothing


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PK\x03\x04rest", "zip archive"), (b"\x89HDF\r\n\x1a\n", "HDF5"), (b"\x93NUMPY\x01", "NumPy"),
     (b"ARROW1\0\0", "Arrow file")],
)  # fmt: skip
def test_formats_are_told_by_their_beginning_too(tmp_path, content, message):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        listed(tmp_path / "data")


def test_the_way_from_save_to_disk_works_as_printed(tmp_path, monkeypatch):
    import datasets

    images = [{"bytes": encoded(k, (16, 12)), "path": None} for k in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "dict"))
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "dict"):
        with pytest.raises(SourceError, match="save_to_disk wrote") as refused:
            listed(tmp_path / folder)
        way = re.search(r"datasets\.load_from_disk.*to_parquet\('train.parquet'\)", str(refused.value))
        assert way is not None
        eval(way[0])
        assert pq.read_table(tmp_path / "train.parquet").num_rows == 4
        with pytest.raises(SourceError, match="only be listed while sharding"):  # a table that is read
            listed(tmp_path / "train.parquet")


@pytest.mark.parametrize("name", ["train-00000-of-00001.parquet", "0.tar", "0.tar.gz", "train.csv"])
def test_what_is_not_there_yet_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    sources = [tmp_path / name, *([] if name.endswith("gz") else [tmp_path])]
    for source in sources:
        with pytest.raises(SourceError, match=r"a pointer of Git LFS, .*git lfs pull"):
            listed(source)
    (tmp_path / name).write_text("<!DOCTYPE html><title>Sign in</title>")
    for source in sources:
        with pytest.raises(SourceError, match="is a web page"):
            listed(source)


def test_pickles_and_arrays_in_a_tar_are_named(tmp_path):
    batch = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]})
    members = {f"cifar-10-batches-py/{name}": batch for name in ("data_batch_1", "test_batch", "batches.meta")}
    with pytest.raises(SourceError, match="CIFAR as pickles"):
        listed(tar_of(tmp_path / "cifar-10-python.tar.gz", members))
