"""Folders that hold two things at once, or lead back into themselves: refused, with commands that work as printed."""

import shlex
import subprocess

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from data_prep.listing import SourceError
from tests.layouts import IMAGE, commands, listed, names, shards, tar_of, write


def test_energons_splits_are_told_apart(tmp_path):
    folder = shards(tmp_path, "shard_0.tar", "shard_1.tar", "shard_2.tar")
    (folder / ".nv-meta").mkdir()
    split = folder / ".nv-meta/split.yaml"
    split.write_text("exclude: []\nsplit_parts:\n  train:\n  - shard_{0..1}.tar\n  val:\n  - shard_2.tar\n  test: []\n")
    with pytest.raises(SourceError, match=r"train \(2: 'shard_0.tar', .*validation \(1: 'shard_2.tar'\)") as refused:
        listed(folder)
    assert [len(each) for each in commands(refused)] == [4, 2, 6]
    split.write_text("split_parts: [&a [*a]]")
    assert len(listed(folder)) == 6


def test_tars_beside_class_folders_are_not_chosen_from_in_silence(tmp_path):
    folder = write(shards(tmp_path, "a.tar"), "cat/0.jpg", "dog/1.jpg", "dog/2.jpg")
    with pytest.raises(
        SourceError, match=r"1 WebDataset tars \('a.tar'\) and 2 folders of images \('cat'\)"
    ) as refused:
        listed(folder)
    assert [len(each) for each in commands(refused)] == [2, 3]


def test_a_folder_of_class_tars_is_packed_as_printed(tmp_path):
    folder = tmp_path / "train set"
    for name, count in (("n01440764", 2), ("n01443537", 3)):
        tar_of(folder / f"{name}.tar", {f"{name}_{number}.JPEG": IMAGE for number in range(count)})
    with pytest.raises(SourceError, match="tars of one class each") as refused:
        listed(folder)
    packing, command = str(refused.value).splitlines()[-1].split("; ")
    subprocess.run(packing, shell=True, check=True)
    listing = listed(shlex.split(command)[2])
    assert (listing.classes, len(listing)) == (["n01440764", "n01443537"], 5)


def test_a_link_that_leads_back_is_not_followed(tmp_path, messages):
    write(tmp_path, "cat/0.jpg", "dog/1.jpg")
    (tmp_path / "linked").symlink_to(tmp_path / "dog")
    (tmp_path / "cat/all").symlink_to(tmp_path)
    assert names(listed(tmp_path)) == ["cat/0.jpg", "dog/1.jpg", "linked/1.jpg"]
    assert "the link 'cat/all'" in messages()


def test_truth_of_images_in_a_folder_below_is_refused(tmp_path):
    write(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG")
    truth = tmp_path / "val/val_annotations.txt"
    truth.write_text("val_0.JPEG\tn02\t0\t0\nval_1.JPEG\tn01\t0\t0\n")
    with pytest.raises(SourceError, match=r"no image directly in it.*inside="):
        listed(tmp_path / "val", truth=truth)
    assert listed(tmp_path / "val", truth=truth, inside="images").classes == ["n01", "n02"]


def test_the_labels_of_one_split_are_not_offered_for_another(tmp_path):
    """The images of both have the same names."""
    write(tmp_path, *(f"{split}/{number:03d}.jpg" for split in ("train", "val") for number in range(3)))
    for split in ("train", "val"):
        rows = "".join(f"{number:03d}.jpg,{split}-{number % 2}\n" for number in range(3))
        (tmp_path / f"{split}.csv").write_text(f"file_name,label\n{rows}")
    with pytest.raises(SourceError, match="are splits and no classes") as refused:
        listed(tmp_path)
    assert [each.classes for each in commands(refused)] == [["train-0", "train-1"], ["val-0", "val-1"]]
    with pytest.raises(SourceError) as refused:
        listed(tmp_path / "val")
    assert [each.classes for each in commands(refused)] == [["val-0", "val-1"]]


def test_copies_of_two_classes_beside_masks_are_refused(tmp_path):
    write(tmp_path, *(f"{kind}/{name}/0.png" for kind in ("images", "segmentations") for name in ("cat", "dog")))
    with pytest.raises(SourceError, match=r"have the same folders in them \('cat', 'dog'") as refused:
        listed(tmp_path)
    assert [each.classes for each in commands(refused)] == [["cat", "dog"], ["cat", "dog"]]


def test_folders_below_classes_are_said(tmp_path, messages):
    write(tmp_path, "animal/cat/0.jpg", "animal/dog/1.jpg", "plant/rose/2.jpg")
    assert listed(tmp_path).classes == ["animal", "plant"]
    assert "if those are the classes, this is a level above them" in messages()


def test_images_in_one_folder_of_a_tar_are_unpacked_for_a_table(tmp_path):
    tar = tar_of(tmp_path / "a.tar", {f"img/{number}.jpg": IMAGE for number in range(3)})
    with pytest.raises(SourceError, match=r"tar -xf \S+ -C FOLDER; python data_prep/shard.py FOLDER/img .* labels="):
        listed(tar)


@pytest.mark.parametrize("name", ["t.arrow", "t.feather"])
def test_the_way_from_an_arrow_file_works_as_printed(tmp_path, monkeypatch, name):
    write(tmp_path, "0.jpg", "1.jpg")
    table = pa.table({"path": ["0.jpg", "1.jpg"], "label": ["a", "b"]})
    pa.feather.write_feather(table, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="is an Arrow file") as refused:
        listed(tmp_path / name)
    exec(str(refused.value).partition("which is read: ")[2], {"pyarrow": pa})
    assert pq.read_table(tmp_path / "train.parquet").equals(table)
    assert names(listed(tmp_path / "train.parquet")) == ["0.jpg", "1.jpg"]


def test_partial_splits_of_hugging_faces_conversion_are_found(tmp_path):
    for split in ("partial-train", "partial-test"):
        place = tmp_path / f"default/{split}"
        place.mkdir(parents=True)
        pq.write_table(pa.table({"image": [IMAGE], "label": [0]}), place / "0000.parquet")
    with pytest.raises(SourceError, match=r"split=train\n.*split=test"):
        listed(tmp_path)
