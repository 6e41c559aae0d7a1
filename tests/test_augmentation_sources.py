"""Augmentations against their sources, which tests/reference_augmentations.py has anew in NumPy and Pillow."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from cluster.settings import load_recipe
from data_prep import counter_rng
from pipeline import augment, operations, pixels
from pipeline.config import RECIPES
from pipeline.data_config import AugmentSettings, DataSettings, RandAugmentSettings
from pipeline.spaces import Space, space_of
from tests import reference_augmentations as reference
from tests.reference_augmentations import Pixels

SIDE = 224


@cache
def photographs(count: int = 12) -> NDArray[np.uint8]:
    """[count, SIDE, SIDE, 3]: light and dark, smooth and grained, with edges of objects, as photographs have them."""
    generator = np.random.default_rng(7)
    made = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        image = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(6):
            x, y, width, height = generator.integers(0, SIDE, 4).tolist()
            shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
            shape((x, y, x + width // 2, y + height // 2), fill=tuple(generator.integers(0, 256, 3).tolist()))
        grain = generator.normal(0, generator.uniform(0, 12), (SIDE, SIDE, 1))
        contrast, light = 0.3 + 0.7 * number / count, generator.uniform(60, 190)
        made.append(np.clip((np.asarray(image) - 128.0 + grain) * contrast + light, 0, 255).astype(np.uint8))
    return np.stack(made)


def as_tensor(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def as_images(tensor: torch.Tensor) -> NDArray[np.int64]:
    return tensor.permute(0, 2, 3, 1).numpy().astype(np.int64)


class Told(random.Random):
    """Gives the reference what our own generator drew, in the order in which it asks."""

    def __init__(self, *values: float, order: tuple[int, ...] = ()) -> None:
        self.values, self.order = list(values), order

    def random(self) -> float:
        return self.values.pop(0)

    def uniform(self, a: float, b: float) -> float:
        return self.values.pop(0)

    def randrange(self, stop: int) -> int:  # type: ignore[override]
        return int(self.values.pop(0) * stop)

    def shuffle(self, x: list[Any]) -> None:  # type: ignore[override]
        x[:] = [x[place] for place in self.order]


BIG_VISION = AugmentSettings(randaugment=RandAugmentSettings(kind="big_vision"))
TORCHVISION = AugmentSettings(randaugment=RandAugmentSettings(kind="torchvision"))
TRIVIAL = AugmentSettings(trivialaugment=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(
    "settings",
    [BIG_VISION, TORCHVISION, TRIVIAL, AugmentSettings(randaugment_layers=2), AugmentSettings(color_jitter=0.4)],
    ids=["big_vision", "torchvision", "trivial", "the old keys", "jitter"],
)
def test_a_gpu_makes_the_same_pixels_as_a_cpu(settings):
    data = DataSettings(corpus="", image_size=SIDE, augment=settings, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    ids, epochs = np.arange(96), np.zeros(96, np.int64)
    images = as_tensor(photographs()).repeat(8, 1, 1, 1).float()
    found = [pixels.finish(images.to(device), data, 0, epochs, ids).cpu() for device in ("cpu", "cuda")]
    assert torch.equal(*found)


def the_source(settings: AugmentSettings, magnitude: int) -> dict[str, Callable[[Pixels, random.Random], Pixels]]:
    if settings.trivialaugment:
        return reference.trivial_operations(magnitude)
    if settings.randaugment.kind == "torchvision":
        return reference.torchvision_operations(magnitude, SIDE)
    return reference.big_vision_operations(magnitude, settings.randaugment.solarize_wraps)


def by_the_source(
    settings: AugmentSettings, name: str, image: Pixels, magnitude: int, sign: int, centre: list[float]
) -> Pixels:
    # The sources write down where a pixel comes from, we where it goes.
    negative = sign == (not name.startswith(("Shear", "Translate")))
    told = Told(*centre) if name == "Cutout" else Told(0.9 if negative else 0.1)
    return the_source(settings, magnitude)[name](image, told)


def space(settings: AugmentSettings) -> Space:
    found = space_of(settings, SIDE)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("settings", "magnitudes"),
    [(BIG_VISION, (0, 5, 10, 15, 20)), (TORCHVISION, (0, 9, 30)), (TRIVIAL, (1, 17, 30))],
    ids=["big_vision", "torchvision", "trivial"],
)
def test_each_operation_is_its_sources(settings, magnitudes):
    """Exactly, but where a coordinate lies half-way between two pixels (at most a quarter of a level on average)."""
    image, ours = photographs()[7:8], space(settings)
    centre = np.array([[0.3, 0.9]])
    assert {operation.name for operation in ours.operations} == set(the_source(settings, 5))
    for magnitude in magnitudes:
        for number, operation in enumerate(ours.operations):
            for sign in (0, 1):
                wanted = by_the_source(settings, operation.name, image[0], magnitude, sign, [0.3, 0.9]).astype(int)
                chosen = np.array([number], np.int32)
                parameters = ours.parameters(chosen, np.array([magnitude], np.int32), np.array([sign], np.int32))
                found = operations.apply(as_tensor(image), ours, chosen, parameters, centre)
                apart = np.abs(as_images(found)[0] - wanted).mean()
                warped = operation.name in ("Rotate", "ShearX", "ShearY")
                assert apart <= (0.25 if warped else 0), (operation.name, magnitude, sign, apart)


S16 = load_recipe(RECIPES / "pretrain" / "vit-s16-imagenet1k.yaml")["data"]["augment"]


def randaugment(kind: str, magnitude: int, **more: bool) -> AugmentSettings:
    return AugmentSettings.model_validate({"randaugment": {"kind": kind, "magnitude": magnitude, **more}})


@pytest.mark.parametrize(
    "settings",
    [
        AugmentSettings.model_validate({"randaugment": S16["randaugment"]}),
        randaugment("big_vision", 0),
        randaugment("big_vision", 15),
        randaugment("big_vision", 20, solarize_wraps=True),
        randaugment("torchvision", 9),
        TRIVIAL,
        AugmentSettings(three_augment=True),
        AugmentSettings(color_jitter=0.4),
        AugmentSettings(three_augment=True, color_jitter=0.3),
    ],
    ids=[
        "S/16's",
        "light1",
        "medium",
        "strong, wrapped",
        "torchvision",
        "trivial",
        "3-Augment",
        "jitter",
        "DeiT III's",
    ],
)
def test_an_augmentation_changes_photographs_as_much_as_its_source(settings):
    """Within 3 %, under the same chances; and those are drawn as evenly as they should be (below)."""
    samples = 72
    images = photographs()[np.arange(samples) % len(photographs())]
    data = DataSettings(corpus="", image_size=SIDE, augment=settings, mean=(0.0,) * 3, std=(1 / 255,) * 3, decode="cpu")
    ids, epochs = np.arange(samples), np.zeros(samples, np.int64)
    ours = as_images(pixels.finish(as_tensor(images).float(), data, 0, epochs, ids))
    theirs = np.stack([of_the_source(settings, image, row) for row, image in enumerate(images)]).astype(int)
    changed, wanted = (np.abs(result - images).mean() for result in (ours, theirs))
    assert changed == pytest.approx(wanted, rel=0.03)
    # And it is not another image that is changed as much.
    assert np.abs(ours - theirs).mean() < 0.04 * wanted


def of_the_source(settings: AugmentSettings, image: Pixels, sample: int) -> Pixels:
    """A sample (of seed 0 and epoch 0) as the reference makes it of the numbers that were drawn for it."""
    row = np.zeros(1, np.int64), np.array([sample])
    if draws := augment.draw_operations(settings, 0, *row):
        names = [space(settings).operations[number].name for number in draws.operations[0]]
        for name, magnitude, sign, centre in zip(
            names, draws.magnitudes[0].tolist(), draws.signs[0].tolist(), draws.centres[0].tolist(), strict=True
        ):
            image = by_the_source(settings, name, image, magnitude, sign, centre)
    if colors := augment.draw_colors(settings, 0, *row):
        if colors.three is not None:
            image = reference.three_augmented(image, Told(colors.three[0] / 3 + 0.1, float(colors.sigma[0])))
        if colors.jitter is not None and colors.order is not None:
            factors, order = colors.jitter[0].tolist(), tuple(colors.order[0].tolist())
            image = reference.color_jittered(
                image, settings.color_jitter, Told(*(factors[kind] for kind in order), order=order)
            )
    return image


@pytest.mark.parametrize("settings", [BIG_VISION, TORCHVISION, TRIVIAL], ids=["big_vision", "torchvision", "trivial"])
def test_operations_signs_and_centres_are_drawn_evenly(settings):
    count = 6000
    draws = augment.draw_operations(settings, 3, np.zeros(count, np.int64), np.arange(count))
    assert draws is not None
    for layer in range(draws.operations.shape[1]):
        found = np.bincount(draws.operations[:, layer], minlength=len(space(settings).operations))
        assert scipy.stats.chisquare(found).pvalue > 1e-3
        assert draws.signs[:, layer].mean() == pytest.approx(0.5, abs=0.03)
        if settings.randaugment.kind == "big_vision":
            for way in range(2):
                assert scipy.stats.kstest(draws.centres[:, layer, way], "uniform").pvalue > 1e-3


def test_the_end_of_a_scale_is_its_sources():
    """Figures of the sources: big_vision's 10 and 20, torchvision's 30 bins, TrivialAugment's wide ones."""

    def at(settings: AugmentSettings, magnitude: int) -> dict[str, float]:
        ours = space(settings)
        numbers = np.arange(len(ours.operations), dtype=np.int32)
        found = ours.parameters(numbers, np.full_like(numbers, magnitude), np.zeros_like(numbers))
        return {operation.name: value for operation, value in zip(ours.operations, found.tolist(), strict=True)}

    ten, twenty = at(BIG_VISION, 10), at(BIG_VISION, 20)
    names = ("Rotate", "ShearX", "TranslateY", "Cutout", "SolarizeAdd", "Posterize", "Solarize", "Color", "Sharpness")
    assert [ten[name] for name in names] == pytest.approx([30, 0.3, 100, 40, 110, 4, 256, 1.9, 1.9])
    assert [twenty[name] for name in names] == pytest.approx([60, 0.6, 200, 80, 220, 8, 512, 3.7, 3.7])
    assert at(randaugment("big_vision", 10, solarize_wraps=True), 10)["Solarize"] == 0
    assert "Identity" not in ten
    fewer = ("Rotate", "ShearX", "TranslateY", "Posterize", "Solarize", "Color", "Sharpness")
    thirty, wide = at(TORCHVISION, 30), at(TRIVIAL, 30)
    assert [thirty[name] for name in fewer] == pytest.approx([30, 0.3, 101, 4, 0, 1.9, 1.9])
    assert [wide[name] for name in fewer] == pytest.approx([135, 0.99, 32, 2, 0, 1.99, 1.99])


@pytest.mark.parametrize("width", [500, 375, 2000])
@pytest.mark.parametrize("kind", ["tensorflow", "torchvision", "inception"])
def test_crops_have_the_density_of_their_source(kind, width):
    """Kolmogorov and Smirnov's test of area, aspect ratio and place against the source's algorithm, one by one."""
    count, height = 6000, 375
    settings = AugmentSettings(crop=kind, crop_aspect=(0.75, 1.33 if kind == "tensorflow" else 4 / 3))
    ids, sizes = np.arange(count), (np.full(count, width), np.full(count, height))
    drawn = augment.draw(settings, 5, np.zeros(count, np.int64), ids, *sizes)
    assert (drawn.anchor >= 0).all()
    assert (drawn.anchor + drawn.shape <= (height, width)).all()
    source = reference.tensorflow_crop if kind == "tensorflow" else reference.torchvision_crop
    generator = random.Random(1)
    expected = np.array([source(width, height, generator) for _ in range(count)])
    found = np.concatenate([drawn.anchor, drawn.shape], axis=1)

    def quantities(boxes: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        top, left, high, wide = boxes.T
        return [high * wide / (height * width), wide / high, top / height, left / width]

    for ours, theirs in zip(quantities(found), quantities(expected), strict=True):
        assert scipy.stats.ks_2samp(ours, theirs).pvalue > 1e-3
    if width == 500:
        area = quantities(found)[0]
        mean, small = (0.345, 0.34) if kind == "tensorflow" else (0.4185, 0.21)
        assert area.mean() == pytest.approx(mean, abs=0.01)
        assert (area < 0.2).mean() == pytest.approx(small, abs=0.02)


def test_a_tensorflow_crop_that_never_fits_is_the_whole_image():
    sizes = np.array([4000, 3]), np.array([3, 3])
    settings = AugmentSettings(crop="tensorflow", crop_area=(0.9, 1.0))
    drawn = augment.draw(settings, 0, np.zeros(2, np.int64), np.arange(2), *sizes)
    assert drawn.shape[0].tolist() == [3, 4000]
    alone = augment.draw(settings, 0, np.zeros(1, np.int64), np.array([1]), sizes[0][1:], sizes[1][1:])
    assert drawn.shape[1].tolist() == alone.shape[0].tolist()
    assert drawn.anchor[1].tolist() == alone.anchor[0].tolist()


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.8, 1.0, 8.0])
def test_beta_is_the_beta_distribution(alpha):
    uniforms = np.random.default_rng(0).random((4000, counter_rng.FOR_BETA))
    found = np.array([counter_rng.beta(alpha, row) for row in uniforms])
    assert ((found >= 0) & (found <= 1)).all()
    # By halves: of a small alpha much lies nearer to 1 than 64 bits tell, though not to 0.
    lower = found[found <= 0.5]
    assert len(lower) / 4000 == pytest.approx(0.5, abs=0.03)
    assert scipy.stats.kstest(lower, lambda x: 2 * scipy.stats.beta(alpha, alpha).cdf(x)).pvalue > 1e-3


def test_mixing_weights_are_the_same_for_ever():
    """Of numbers that no version of numpy decides. Runs under the old rules keep numpy's."""
    pinned = [0.9966060563178143, 0.5613409995044971, 0.99713937098935]
    assert [augment.mixup_weight(0.2, 7, window) for window in range(3)] == pytest.approx(pinned, rel=1e-12)
    box = augment.draw_mixing(AugmentSettings(cutmix=1.0), 7, 2, 224)
    assert box is not None
    assert box.box == augment.Rectangle(top=0, left=131, height=50, width=93)
    old = augment.mixup_weight(0.2, 7, 0, rules=1)
    bits = counter_rng.uniform(7, 0, np.array([0]), 3, 2)[0]
    numpys = np.random.Generator(np.random.Philox(key=[int(value * 2**53) for value in bits])).beta(0.2, 0.2)
    assert old == max(numpys, 1 - numpys)


def test_auto_contrast_is_pillows_for_every_range_of_levels():
    ranges = [(low, high) for low in range(0, 256, 5) for high in range(low, 256)]
    ramps = np.stack([np.clip(np.arange(256), *levels) for levels in ranges]).astype(np.uint8).reshape(-1, 16, 16)
    expected = np.stack([np.asarray(ImageOps.autocontrast(Image.fromarray(ramp))) for ramp in ramps])
    space = space_of(TORCHVISION, 16)
    assert space is not None
    number = [operation.name for operation in space.operations].index("AutoContrast")
    count = len(ramps)
    images = torch.from_numpy(ramps)[:, None].repeat(1, 3, 1, 1)
    none = np.zeros(count), np.zeros((count, 2))
    found = operations.apply(images, space, np.full(count, number, np.int32), *none)
    np.testing.assert_array_equal(found[:, 0].numpy(), expected)
