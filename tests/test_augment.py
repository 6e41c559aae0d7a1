"""Augmentation: the same pixels wherever a sample stands, the published formulas, what is refused."""

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image, ImageEnhance, ImageOps

from data_prep.corpus import Corpus
from models.preprocess import decode
from pipeline import augment, decoding, pixels
from pipeline.data_config import AugmentSettings, DataSettings
from tests.corpora import image_folder, make_corpus

SIDE = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("augment")
    return make_corpus(image_folder(root / "images", classes=2, images=12), root / "corpus")


@pytest.fixture(scope="module")
def plain(corpus) -> dict[int, torch.Tensor]:
    return prepared(corpus, list(range(24)), 8, settings())


def settings(mean=0.5, std=0.5, side=SIDE, **chosen) -> DataSettings:
    return DataSettings(
        corpus="", image_size=side, augment=AugmentSettings(**chosen), mean=(mean,) * 3, std=(std,) * 3, decode="cpu"
    )


def prepared(corpus: Corpus, ids: list[int], batch: int, data: DataSettings) -> dict[int, torch.Tensor]:
    """Samples by id, in batches of the given size and order, as training sees them."""
    groups = [np.array(ids[at : at + batch]) for at in range(0, len(ids), batch)]
    epochs = np.full(batch, 3)

    def source(number):
        if number == len(groups):
            raise StopIteration
        chosen = groups[number]
        rows = corpus.index[chosen]
        sizes = (rows[side].astype(np.int64) for side in ("width", "height"))
        return decoding.train_inputs(
            corpus.read(chosen), augment.draw(data.augment, 1, epochs[: len(chosen)], chosen, *sizes)
        )

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
        {"three_augment": True},
        {"color_jitter": 0.4},
        {"erasing": 0.7},
        {"trivialaugment": True, "color_jitter": 0.3, "erasing": 0.5},
    ],
    ids=lambda chosen: "+".join(chosen) or "crop and flip",
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
        crop = Image.fromarray(decode(data.tobytes())[top : top + height, left : left + width])
        expected = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        assert np.abs(found[int(sample)].numpy().transpose(1, 2, 0) * 255 - expected).max() < 1.01


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


def test_color_jitter_is_that_of_pillow_in_any_order():
    steps = [(ImageEnhance.Brightness, 1.2), (ImageEnhance.Contrast, 0.7), (ImageEnhance.Color, 1.4)]
    images = picture(low=70, high=160)
    pixels.color_jitter(images, np.array([[factor for _, factor in steps]], np.float32))
    for order in itertools.permutations(steps):
        wanted = as_pillow(picture(low=70, high=160))
        for enhance, factor in order:
            wanted = enhance(wanted).enhance(factor)
        # Pillow cuts off what is behind the point after each of the three.
        difference = images[0].permute(1, 2, 0).numpy() - np.asarray(wanted)
        assert np.abs(difference).max() < 5
        assert difference.mean() < 2
    pixels.color_jitter(images, np.array([[5, 1, 1]], np.float32))
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
    sizes = np.full(2000, 100), np.full(2000, 80)
    wide = augment.draw(AugmentSettings(trivialaugment=True), 0, epochs, ids, *sizes)
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
    assert decoding.probe("cpu", chosen) is None


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_probe_survives_a_path_that_does_not_work():
    assert decoding.probe("gpu-slice", settings(side=64))
    with pytest.raises(ValueError, match="this rank has no GPU"):
        decoding.choose_backend(DataSettings(corpus="", decode="gpu"), gpu=False)
