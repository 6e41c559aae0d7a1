"""Augmentation: the same pixels wherever a sample stands, the published formulas, what is refused."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image, ImageEnhance, ImageOps

from data_prep.corpus import Corpus
from models.preprocess import decode
from pipeline import augment, decoder_choice, decoding, operations, pixels
from pipeline.data_config import AugmentSettings, DataSettings, RandAugmentSettings
from pipeline.spaces import space_of
from tests.corpora import image_folder, make_corpus

SIDE = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("augment")
    return make_corpus(image_folder(root / "images", classes=2, images=12), root / "corpus")


@pytest.fixture(scope="module")
def plain(corpus) -> dict[int, torch.Tensor]:
    return prepared(corpus, list(range(24)), 8, settings())


def settings(mean=0.5, std=0.5, side=SIDE, rules=2, **chosen) -> DataSettings:
    return DataSettings(
        corpus="", image_size=side, augment=AugmentSettings(**chosen), mean=(mean,) * 3, std=(std,) * 3, decode="cpu",
        rules=rules,
    )  # fmt: skip


def prepared(corpus: Corpus, ids: list[int], batch: int, data: DataSettings) -> dict[int, torch.Tensor]:
    """Samples by id, in batches of the given size and order, as training sees them."""
    groups = [np.array(ids[at : at + batch]) for at in range(0, len(ids), batch)]
    epochs = np.full(batch, 3)

    def source(number):
        if number == len(groups):
            raise StopIteration
        chosen = groups[number]
        rows = corpus.index[chosen]
        wide, high = (rows[side].astype(np.int64) for side in ("width", "height"))
        draws = augment.draw(data.augment, 1, epochs[: len(chosen)], chosen, wide, high, data.rules)
        return decoding.train_inputs(corpus.read(chosen), draws)

    graph = decoding.train_graph(source, batch, data, "cpu", threads=2, device_id=None)
    found: dict[int, torch.Tensor] = {}
    for chosen in groups:
        images = torch.from_dlpack(graph.run()[0].as_tensor()).clone()
        images = pixels.finish(images, data, 1, epochs[: len(chosen)], chosen)
        found |= dict(zip(chosen.tolist(), images, strict=True))
    return found


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"randaugment_layers": 1, "randaugment_magnitude": 15},
        {"randaugment_layers": 1, "randaugment_magnitude": 15, "rules": 1},
        {"randaugment": RandAugmentSettings(kind="big_vision")},
        {"randaugment": RandAugmentSettings(kind="torchvision", magnitude=20)},
        {"crop": "tensorflow"},
        {"three_augment": True},
        {"color_jitter": 0.4},
        {"color_jitter": 0.4, "rules": 1},
        {"erasing": 0.7},
        {"trivialaugment": True, "color_jitter": 0.3, "erasing": 0.5},
    ],
    ids=lambda chosen: "+".join(chosen) + chosen.get("randaugment", RandAugmentSettings()).kind,
)
def test_a_sample_becomes_the_same_in_any_slot_of_any_batch(corpus, plain, chosen):
    ids = list(range(24))
    expected = prepared(corpus, ids, 8, settings(**chosen))
    for batch, order in ((1, ids), (3, ids[::-1]), (8, np.random.default_rng(0).permutation(ids).tolist())):
        found = prepared(corpus, order, batch, settings(**chosen))
        assert all(torch.equal(found[sample], expected[sample]) for sample in ids)
    if chosen:
        assert sum(not torch.equal(plain[sample], expected[sample]) for sample in ids) > 10


def test_crops_are_pillows_within_a_level(corpus):
    ids = np.arange(24)
    rows = corpus.index[ids]
    found = prepared(corpus, ids.tolist(), 8, settings(flip=False, mean=0.0, std=1.0))
    sizes = (rows[side].astype(np.int64) for side in ("width", "height"))
    draws = augment.draw(AugmentSettings(flip=False), 1, np.full(24, 3), ids, *sizes)
    for sample, data, (top, left), (height, width) in zip(
        ids, corpus.read(ids), draws.anchor, draws.shape, strict=True
    ):
        crop = decode(data.tobytes())[top : top + height, left : left + width]
        # Pillow's, of a crop that is continued by its outermost pixels.
        padded = Image.fromarray(np.pad(crop, ((8, 8), (8, 8), (0, 0)), mode="edge"))
        box = (8, 8, 8 + width, 8 + height)
        expected = np.asarray(padded.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box))
        assert np.abs(found[int(sample)].numpy().transpose(1, 2, 0) * 255 - expected).max() < 1.01


@pytest.mark.parametrize("magnitude", [10, 30])
def test_the_old_randaugment_keys_mean_what_they_meant_but_for_equalize(corpus, magnitude):
    """DALI did the operations, OpenCV's Equalize among them; now they are Pillow's: the same within a level."""
    side, levels = 96, {"mean": 0.0, "std": 1 / 255, "flip": False}
    keys = {"randaugment_layers": 1, "randaugment_magnitude": magnitude}
    space = space_of(AugmentSettings(**keys), side)
    assert space is not None
    count = len(space.operations)
    ids, epochs, numbers = np.arange(count), np.full(count, 3), np.arange(count, dtype=np.int32)
    wide, high = (corpus.index[ids][key].astype(np.int64) for key in ("width", "height"))
    plain = prepared(corpus, ids.tolist(), count, settings(side=side, **levels))
    images = torch.stack([plain[sample] for sample in ids.tolist()]).round().byte()
    old = settings(side=side, rules=1, **levels, **keys)

    def source(sign):
        draws = augment.draw(old.augment, 1, epochs, ids, wide, high, old.rules)
        assert draws.operations is not None
        told = replace(draws.operations, operations=numbers[:, None], signs=np.full((count, 1), sign, np.int32))
        return decoding.train_inputs(corpus.read(ids), replace(draws, operations=told))

    graph = decoding.train_graph(source, count, old, "cpu", threads=2, device_id=None)
    for sign in (0, 1):
        before = torch.from_dlpack(graph.run()[0].as_tensor()).clone()
        parameters = space.parameters(numbers, np.full_like(numbers, magnitude), np.full_like(numbers, sign))
        now = operations.apply(images.clone(), space, numbers, parameters, np.zeros((count, 2)))
        for operation, apart in zip(space.operations, (before - now.float()).abs().mean((1, 2, 3)), strict=True):
            assert apart < (8 if operation.name == "Equalize" else 1), (operation.name, sign)


def picture(height=40, width=56, low=0, high=256) -> torch.Tensor:
    noise = np.random.default_rng(0).integers(low, high, (height, width, 3))
    return torch.from_numpy(noise).permute(2, 0, 1)[None].float()


def as_pillow(images: torch.Tensor) -> Image.Image:
    return Image.fromarray(images[0].permute(1, 2, 0).byte().numpy())


def test_3_augment_does_what_pillow_and_scipy_do():
    images = picture().repeat(3, 1, 1, 1)
    sigma = np.array([1, 1, 1.3], np.float32)
    pixels.three_augment(images, np.array([augment.GRAY, augment.SOLARISE, augment.BLUR]), sigma)
    for row, expected in enumerate((ImageOps.grayscale, ImageOps.solarize)):
        wanted = np.asarray(expected(as_pillow(picture())).convert("RGB")).transpose(2, 0, 1)
        assert np.abs(images[row].numpy() - wanted).max() <= 0.51 * (row == 0)
    wanted = scipy.ndimage.gaussian_filter(picture()[0].numpy(), (0, 1.3, 1.3), mode="nearest", radius=(0, 4, 4))
    np.testing.assert_allclose(images[2].numpy(), wanted, atol=1e-3)


def test_color_jitter_is_pillows_in_every_order():
    """Levels that each of the three cuts off, and what it drops behind the point."""
    steps = [(ImageEnhance.Brightness, 1.7), (ImageEnhance.Contrast, 0.6), (ImageEnhance.Color, 1.8)]
    factors = np.array([[factor for _, factor in steps]] * 6, np.float32)
    orders = np.array(list(itertools.permutations(range(3))))
    images = picture().repeat(6, 1, 1, 1)
    pixels.color_jitter(images, factors, orders)
    found = []
    for image, order in zip(images, orders, strict=True):
        wanted = as_pillow(picture())
        for kind in order:
            enhance, factor = steps[kind]
            wanted = enhance(wanted).enhance(factor)
        found.append(np.asarray(wanted))
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), found[-1])
    assert min(np.abs(one - other.astype(int)).mean() for one, other in itertools.combinations(found, 2)) > 1


def test_color_jitter_of_the_old_rules_is_one_map():
    steps = [(ImageEnhance.Brightness, 1.2), (ImageEnhance.Contrast, 0.7), (ImageEnhance.Color, 1.4)]
    images = picture(low=70, high=160)
    pixels.color_jitter_at_once(images, np.array([[factor for _, factor in steps]], np.float32))
    for order in itertools.permutations(steps):
        wanted = as_pillow(picture(low=70, high=160))
        for enhance, factor in order:
            wanted = enhance(wanted).enhance(factor)
        # Pillow cuts off what is behind the point after each of the three.
        difference = images[0].permute(1, 2, 0).numpy() - np.asarray(wanted)
        assert np.abs(difference).max() < 5
        assert difference.mean() < 2
    pixels.color_jitter_at_once(images, np.array([[5, 1, 1]], np.float32))
    assert images.max() == 255


def test_color_draws_cover_their_ranges():
    ids, epochs = np.arange(2000), np.zeros(2000, np.int64)
    colors = augment.draw_colors(AugmentSettings(three_augment=True, color_jitter=0.3), 0, epochs, ids)
    assert colors is not None
    assert colors.three is not None
    assert colors.jitter is not None
    assert np.bincount(colors.three) / 2000 == pytest.approx([1 / 3] * 3, abs=0.05)
    assert (colors.sigma.min(), colors.sigma.max()) == pytest.approx(augment.BLUR_SIGMA, abs=0.01)
    assert colors.jitter.min(0) == pytest.approx([0.7] * 3, abs=0.01)
    assert colors.jitter.max(0) == pytest.approx([1.3] * 3, abs=0.01)
    assert augment.draw_colors(AugmentSettings(), 0, epochs, ids) is None
    assert colors.order is not None
    assert np.unique(colors.order, axis=0, return_counts=True)[1] / 2000 == pytest.approx([1 / 6] * 6, abs=0.03)
    wide = augment.draw_operations(AugmentSettings(trivialaugment=True), 0, epochs, ids)
    assert wide is not None
    assert [np.unique(v).tolist() for v in (wide.operations, wide.magnitudes, wide.signs)] == [
        list(range(14)), list(range(31)), [0, 1]
    ]  # fmt: skip


def test_erased_rectangles_are_as_published():
    ids, epochs, side = np.arange(2000), np.zeros(2000, np.int64), 224
    chosen = AugmentSettings(erasing=0.25)
    erasures = augment.draw_erasures(chosen, 0, epochs, ids, side)
    assert len(erasures) / 2000 == pytest.approx(0.25, abs=0.04)
    for erasure in erasures:
        at = erasure.where
        assert 0 <= at.top <= side - at.height
        assert 0 <= at.left <= side - at.width
        assert 0.019 < at.height * at.width / side**2 < 0.41
        assert 0.28 < at.height / at.width < 3.5
    tall = np.mean([erasure.where.height > erasure.where.width for erasure in erasures])
    assert tall == pytest.approx(0.5, abs=0.08)
    noise = np.concatenate([erasure.noise.ravel() for erasure in erasures[:20]])
    assert noise.mean() == pytest.approx(127.5, abs=1)
    alone = augment.draw_erasures(chosen, 0, epochs[:1], ids[[erasures[5].row]], side)[0]
    np.testing.assert_array_equal(alone.noise, erasures[5].noise)


def test_pairs_mix_the_same_whatever_the_micro_batch():
    images, targets = torch.rand(8, 3, 16, 16), torch.eye(8)
    for chosen in (AugmentSettings(mixup=0.8), AugmentSettings(cutmix=1.0)):
        for window in range(20):
            mixing = augment.draw_mixing(chosen, 0, window, 16)
            assert mixing is not None
            mixed, labels = pixels.mix(images, targets, mixing)
            halves = [pixels.mix(images[at : at + 4], targets[at : at + 4], mixing) for at in (0, 4)]
            assert torch.equal(mixed, torch.cat([half[0] for half in halves]))
            assert torch.equal(labels, torch.cat([half[1] for half in halves]))
            # An image's label is the share of its own pixels.
            own = ((mixed - images[[1, 0, 3, 2, 5, 4, 7, 6]]) / (images - images[[1, 0, 3, 2, 5, 4, 7, 6]])).mean(
                (1, 2, 3)
            )
            torch.testing.assert_close(labels.diagonal(), own, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(labels.sum(1), torch.ones(8))


def test_mixup_and_cutmix_take_turns():
    chosen = AugmentSettings(mixup=0.8, cutmix=1.0)
    found = [augment.draw_mixing(chosen, 0, window, 224) for window in range(1000)]
    assert np.mean([mixing is not None and mixing.box is None for mixing in found]) == pytest.approx(0.5, abs=0.05)
    assert found == [augment.draw_mixing(chosen, 0, window, 224) for window in range(1000)]
    assert augment.draw_mixing(AugmentSettings(), 0, 0, 224) is None
    # Beta(1, 1) is uniform: the side of the uncut box is the square root of a uniform share.
    whole = [augment.cutmix_box(kept, 0.5, 0.5, 224) for kept in np.linspace(0, 1, 101)]
    assert np.mean([box.height * box.width for box in whole]) / 224**2 == pytest.approx(0.5, abs=0.02)
    assert augment.cutmix_box(0.75, 0.0, 0.99, 224) == augment.Rectangle(165, 0, 59, 56)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"erasing_area": (0.1, 0.2)}, "erasing_area has no effect with data.augment.erasing = 0.0"),
        ({"erasing": 0.5, "erasing_area": (0.1, 1.2)}, r"erasing_area = \[0.1, 1.2\] must be two numbers .* <= 1"),
        ({"trivialaugment": True, "three_augment": True}, "trivialaugment and data.augment.three_augment are alternat"),
        ({"randaugment_layers": 2, "trivialaugment": True}, "are alternatives: keep one"),
        (
            {"randaugment": RandAugmentSettings(kind="big_vision"), "randaugment_layers": 2},
            "data.augment.randaugment and data.augment.randaugment_layers are alternatives: keep one",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        AugmentSettings(**chosen)


def test_the_hardware_decoders_share_needs_a_gpu():
    with pytest.raises(ValueError, match=r"hw_decoder_load has no effect with data.decode = 'cpu'"):
        DataSettings(corpus="", decode="cpu", hw_decoder_load=0.9)
    assert DataSettings(corpus="", hw_decoder_load=0.9).hw_decoder_load == 0.9


@pytest.mark.slow
def test_the_probe_runs_what_the_run_would():
    chosen = settings(side=64, trivialaugment=True, color_jitter=0.3, erasing=0.5)
    assert decoder_choice.probe("cpu", chosen) is None


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_probe_survives_a_path_that_does_not_work():
    assert decoder_choice.probe("gpu-slice", settings(side=64))
    with pytest.raises(ValueError, match="this rank has no GPU"):
        decoder_choice.choose_backend(DataSettings(corpus="", decode="gpu"), gpu=False)
