"""Names of splits, as the field writes them."""

import pytest

from data_prep.split_names import are_splits, split_of_file, split_of_folder


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("train2017", "train"),
        ("train_images", "train"),
        ("TestSet", "test"),
        ("images_val", "validation"),
        ("valid", "validation"),
        ("imagenet21k_val", None),
        ("test_tube", None),
        ("steam train", None),
        ("2017", None),
        ("", None),
    ],
)
def test_folders_that_are_splits(name, split):
    assert split_of_folder(name) == split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/imagenet1k-validation-0063.tar", "validation"),
        ("imagenet-val-000.tar", "validation"),
        ("CUB_test.csv", "test"),
        ("birdsTrain.csv", "train"),
        ("train/00000.tar", None),
        ("trains-000.tar", None),
        ("restraint_0.tar", None),
    ],
)
def test_files_that_are_of_a_split(name, split):
    assert split_of_file(name) == split


def test_classes_that_are_splits():
    assert are_splits(["Train", "valid"])
    assert not are_splits(["train"])  # CIFAR-100 and COCO have a class of that name
    assert not are_splits(["bus", "train"])
