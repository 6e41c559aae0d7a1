"""Training, evaluation and consumers resize alike: every filter, border and crop; torchvision's rule from outside."""

import itertools
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.preprocess import Preprocessing
from pipeline import augment, decoding
from pipeline.data_config import AugmentSettings, DataSettings
from tests.running import REPOSITORY
from tests.test_preprocess import encoded, scene

SIZES = [(375, 500), (500, 333), (768, 1024), (64, 64), (33, 91), (500, 359), (224, 225), (151, 40)]
IMAGES = [scene(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
FILES = [np.frombuffer(encoded(image, "PNG"), np.uint8) for image in IMAGES]
HEIGHTS, WIDTHS = np.array(SIZES).T
FILTERS = list(itertools.product(("bilinear", "bicubic"), (True, False)))
UNIT = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)


def settings(size: int, **values) -> DataSettings:
    plain = AugmentSettings(crop="squash", flip=False)
    return DataSettings(corpus="x", image_size=size, augment=plain, mean=UNIT[0], std=UNIT[1], **values)


def trained_on(data: DataSettings) -> npt.NDArray[np.float32]:
    """What the training graph makes of the images, the whole of each as one crop: [B, S, S, 3], 0 to 255."""
    ids = np.arange(len(FILES))
    draws = augment.draw(data.augment, 0, np.zeros_like(ids), ids, WIDTHS, HEIGHTS)
    graph = decoding.train_graph(lambda _: decoding.train_inputs(FILES, draws), len(FILES), data, "cpu", 2, None)
    return taken(graph)


def evaluated_on(prepared: Preprocessing) -> npt.NDArray[np.float32]:
    inputs = decoding.eval_inputs(FILES, prepared, WIDTHS, HEIGHTS)
    graph = decoding.eval_graph(lambda _: inputs, len(FILES), settings(16), prepared, "cpu", 2, None)
    return taken(graph)


def taken(graph) -> npt.NDArray[np.float32]:
    return torch.from_dlpack(graph.run()[0].as_tensor()).permute(0, 2, 3, 1).numpy().copy()


def consumed(prepared: Preprocessing) -> npt.NDArray[np.float32]:
    return np.stack([prepared.resized(np.asarray(image)) for image in IMAGES]).astype(np.float32)


def assert_alike(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> None:
    """At most one level of 255, for every image and for its outermost ring."""
    difference = np.abs(one - other)
    ring = np.ones(one.shape[1:3], bool)
    ring[1:-1, 1:-1] = False
    assert difference.mean(axis=(1, 2, 3)).max() < 0.6
    assert difference[:, ring].mean(axis=(1, 2)).max() < 0.8


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize(("interpolation", "antialias"), FILTERS)
def test_training_and_consumers_resize_alike_up_to_the_border(interpolation, antialias, size):
    data = settings(
        size, train_interpolation=interpolation, train_antialias=antialias,
        eval_interpolation=interpolation, eval_antialias=antialias,
    )  # fmt: skip
    prepared = decoding.preprocessing_of(data)
    assert (prepared.interpolation, prepared.antialias) == (interpolation, antialias)
    shown = consumed(prepared)
    assert_alike(trained_on(data), shown)
    if size == 64:
        assert_alike(evaluated_on(prepared), shown)


def test_a_run_of_the_old_rules_keeps_its_pixels():
    found = trained_on(settings(64, rules=1))
    for image, ours in zip(IMAGES, found, strict=True):
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
        expected = F.interpolate(pixels, size=[64, 64], mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ours.astype(np.uint8), expected)
    ring = np.abs(found - consumed(decoding.preprocessing_of(settings(64))))[:, 0]
    assert ring.max() > 8  # which is why there are others


def torchvision_crop(image: Image.Image, resize: int, size: int, filter: Image.Resampling) -> npt.NDArray[np.uint8]:
    """torchvision.transforms.Resize(resize) and CenterCrop(size) of a PIL image, written from its documentation."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    longer = int(resize * long / short)
    wide, tall = (resize, longer) if width <= height else (longer, resize)
    top, left = int(round((tall - size) / 2.0)), int(round((wide - size) / 2.0))  # noqa: RUF046
    return np.asarray(image.resize((wide, tall), filter).crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(("resize", "size"), [(256, 224), (73, 64), (235, 224), (256, 225)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_centre_crop_is_torchvisions(interpolation, resize, size):
    data = settings(size, eval_resize=resize, eval_interpolation=interpolation)
    prepared = decoding.preprocessing_of(data)
    assert prepared.crop == "torchvision"
    reference = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    expected = np.stack([torchvision_crop(image, resize, size, reference) for image in IMAGES]).astype(np.float32)
    # Here the filter does not reach the border, beyond which Pillow leaves out what we and DALI continue.
    difference = np.abs(consumed(prepared) - expected)
    # Pillow rounds to 8 bits between its two passes, whose order depends on the size: bicubic may overshoot there.
    assert difference.max() <= (1 if interpolation == "bilinear" else 12)
    assert difference.mean() < 0.2
    assert_alike(evaluated_on(prepared), consumed(prepared))
    old = decoding.preprocessing_of(settings(size, eval_resize=resize, eval_interpolation=interpolation, rules=1))
    assert np.abs(consumed(old) - expected).mean() > 1


@pytest.mark.parametrize(("interpolation", "antialias"), FILTERS)
def test_evaluation_and_consumers_crop_alike(interpolation, antialias):
    for crop in ("exact", "torchvision"):
        for resize, size in ((256, 224), (64, 64)):
            prepared = Preprocessing(size, "shorter", resize, interpolation, antialias, crop, *UNIT)
            assert_alike(evaluated_on(prepared), consumed(prepared))


def test_a_package_without_the_new_fields_means_what_it_meant():
    old = Preprocessing.from_json({"size": 64, "resize": "shorter", "resize_to": 73, "interpolation": "bilinear"})
    assert (old.crop, old.antialias) == ("exact", True)
    assert Preprocessing.from_json(old.to_json()) == old


LONG = """
import io, resource, sys
import numpy as np
from PIL import Image
from models.preprocess import Preprocessing
from pipeline import decoding
from pipeline.data_config import DataSettings
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 20000, 3), np.uint8))
file = io.BytesIO()
image.save(file, "PNG")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for antialias in (True, False):
    prepared = Preprocessing(224, "shorter", 256, antialias=antialias, crop="torchvision")
    content = np.frombuffer(file.getvalue(), np.uint8)
    inputs = decoding.eval_inputs([content], prepared, np.array([20000]), np.array([2]))
    graph = decoding.eval_graph(lambda _: inputs, 1, DataSettings(corpus="x"), prepared, "cpu", 1, None)
    evaluated, consumed = np.array(graph.run()[0].at(0)), prepared([file.getvalue()]).numpy()[0]
    assert np.abs(evaluated - consumed).mean() * 127.5 < 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_long_image_takes_no_more_memory_than_it_is_worth():
    done = subprocess.run([sys.executable, "-c", LONG], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) < 200_000  # kB; resized as a whole it would be 2 GB
