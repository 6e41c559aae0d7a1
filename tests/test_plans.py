"""Learning-rate schedules, layout on the ranks, augmentation parameters: pure functions of the settings."""

import math
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.settings import SettingsError
from models.presets import vit_config
from pipeline.augment import draw, draw_operations, mixup_weight
from pipeline.config import OptimizerSettings
from pipeline.crops import inception_crop
from pipeline.data_config import AugmentSettings
from pipeline.layout import Machine, activation_bytes, check_batch, settle, state_bytes
from pipeline.schedules import Schedule
from tests.test_settings import demo


def rates(total=100, **values):
    settings = OptimizerSettings(learning_rate=1.0, **values)
    schedule = Schedule(settings, total, global_batch=10, num_samples=100)
    return [schedule(step) for step in range(total)]


def test_linear_and_cosine_rise_to_the_peak_and_end_on_the_final_rate():
    for kind in ("linear", "cosine"):
        values = rates(schedule=kind, warmup="10 steps", final_learning_rate=1e-3)
        assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert 1e-3 < values[-1] < 0.02
        assert all(after < before for before, after in pairwise(values[10:]))
    middle = rates(total=100, schedule="cosine")[50]
    assert middle == pytest.approx(0.5)


def test_reciprocal_square_root_with_cooldown():
    values = rates(schedule="rsqrt", warmup="1 epochs", timescale="30 steps", cooldown="20 steps")
    assert values[40] == pytest.approx(1 / math.sqrt(2))  # timescale after the warm-up of 10
    assert values[81] == pytest.approx(1 / math.sqrt(1 + 71 / 30) * 19 / 20)
    assert values[-1] == pytest.approx(1 / math.sqrt(1 + 89 / 30) / 20)


def test_a_warmup_and_a_cooldown_as_shares_of_any_run():
    for total in (10, 200):
        values = rates(total=total, schedule="constant", warmup="10 %", cooldown="20 %")
        assert values[: total // 10 + 1] == pytest.approx([*np.arange(1, total // 10 + 1) / (total // 10), 1.0])
        assert values[-total // 5] == pytest.approx(1.0)
        assert values[-1] == pytest.approx(1 / (total / 5))
    with pytest.raises(SettingsError, match=r"do not fit.*\"5 %\""):
        rates(warmup="60 %", schedule="constant", cooldown="50 steps")


@pytest.mark.parametrize("text", ["101 %", "5%%", "% 5", "-5 %", "five %", "1e1 %"])
def test_what_is_no_share_of_a_run(text):
    with pytest.raises(ValidationError, match=r"is no share of a run: write \"5 %\""):
        OptimizerSettings(warmup=text)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(SettingsError, match=r"optimizer\.warmup.*do not fit"):
        rates(total=10, warmup="11 steps")


def test_batches_that_do_not_split_are_refused_with_what_would_do():
    check_batch(96, 8, 4, pairs=True)
    with pytest.raises(SettingsError, match=r"96 does not split over 5 ranks.*4, 6"):
        check_batch(96, None, 5, pairs=False)
    with pytest.raises(SettingsError, match=r"micro_batch = 7 .* 24 images.*6, 8"):
        check_batch(96, 7, 4, pairs=False)
    with pytest.raises(SettingsError, match=r"pairs for data\.augment\.mixup"):
        check_batch(96, 3, 4, pairs=True)


def machine(memory):
    return Machine(gpu=False, memory=memory, bf16=False)


def test_auto_takes_the_least_sharding_that_fits():
    config = vit_config("B/16", num_classes=1000)
    settings = demo("training.zero_stage=auto", "training.micro_batch=1", "data.augment.mixup=0.0")
    needs = [state_bytes(config, "fp32", stage, 4) for stage in range(4)]
    assert needs == sorted(needs, reverse=True)
    images = activation_bytes(config, "fp32", recompute=False)
    for stage in range(4):
        memory = int((needs[stage] + images) / 0.85) + 1000
        assert settle(settings, config, 4, machine(memory)).zero_stage == stage
    with pytest.raises(SettingsError, match="at the highest ZeRO stage"):
        settle(settings, config, 4, machine(int(needs[3])))
    plenty = machine(int(needs[0] * 9))
    assert (
        settle(settings, config, 4, plenty, {"zero_stage": 2, "precision": "fp32", "micro_batch": 4}).micro_batch == 1
    )
    assert settle(settings, config, 4, plenty, {"zero_stage": 2, "precision": "fp32"}).zero_stage == 2


def test_a_resumed_run_keeps_the_layout_it_was_saved_with():
    config = vit_config("Ti/16")
    settings = demo("training.zero_stage=auto", "training.micro_batch=null", "training.precision=auto")
    saved = {"zero_stage": 3, "precision": "fp32", "micro_batch": 4}
    plan = settle(settings, config, 2, Machine(False, 2**34, True), saved)
    assert (plan.zero_stage, plan.precision, plan.micro_batch, plan.accumulation) == (3, "fp32", 4, 8)


def test_on_other_ranks_a_resumed_run_keeps_what_still_fits():
    config = vit_config("B/16", num_classes=1000)
    words = ("training.zero_stage=auto", "training.micro_batch=null", "training.precision=auto")
    settings = demo(*words, "data.augment.mixup=0.0", "training.global_batch=96")
    saved = {"zero_stage": 1, "precision": "fp32", "micro_batch": 16, "world_size": 2}
    images = activation_bytes(config, "fp32", recompute=False)

    def plan(ranks, memory, given=settings):
        settled = settle(given, config, ranks, machine(int(memory / 0.85) + 1000), saved)
        return settled.zero_stage, settled.micro_batch, settled.accumulation

    plenty = 9 * state_bytes(config, "fp32", 0, 1)
    assert plan(2, plenty) == (1, 16, 3)
    assert plan(6, plenty) == (1, 16, 1)
    assert plan(8, plenty) == (1, 12, 1)  # 16 does not split 12
    # Six times the ranks leave room that one rank has not: a smaller micro-batch, then other stages.
    assert plan(1, state_bytes(config, "fp32", 1, 1) + 8.5 * images) == (1, 8, 12)
    assert plan(4, state_bytes(config, "fp32", 3, 4) + images) == (3, 1, 24)
    averaged = demo(*words, "data.augment.mixup=0.0", "training.global_batch=96", "training.ema=0.9")
    assert plan(4, state_bytes(config, "fp32", 1, 4) + images, averaged)[0] == 2


def test_bf16_is_given_stages_that_keep_master_weights():
    config = vit_config("Ti/16")
    many = Machine(True, 2**36, True)
    settings = demo("training.zero_stage=auto", "training.precision=auto")
    assert settle(settings, config, 1, many).zero_stage == 1
    accumulated = demo("training.zero_stage=auto", "training.precision=auto", "training.micro_batch=8")
    assert settle(accumulated, config, 1, many).zero_stage == 2
    with pytest.raises(SettingsError, match=r"zero_stage = 0 keeps no fp32 master weights"):
        settle(demo("training.zero_stage=0", "training.precision=bf16"), config, 1, many)
    with pytest.raises(SettingsError, match=r"zero_stage = 1 with bf16 and 8 micro-batches"):
        settle(demo("training.zero_stage=1", "training.precision=bf16", "training.micro_batch=8"), config, 1, many)


def test_state_bytes_are_those_of_the_zero_paper():
    config = vit_config("H/14", num_classes=21843)
    assert state_bytes(config, "bf16", 0, 8) / 658.75e6 == pytest.approx(18, rel=1e-3)
    assert state_bytes(config, "bf16", 3, 8) / 658.75e6 == pytest.approx(18 / 8, rel=1e-3)


def test_crops_lie_inside_the_image_and_follow_their_distribution():
    generator = np.random.default_rng(0)
    wide, high = generator.integers(20, 500, 4000), generator.integers(20, 500, 4000)
    uniforms = generator.random((4000, 40))
    anchor, shape = inception_crop(uniforms, wide, high, (0.08, 1.0), (3 / 4, 4 / 3))
    assert (anchor >= 0).all()
    assert (shape >= 1).all()
    assert (anchor + shape <= np.stack([high, wide], 1)).all()
    square = np.full(4000, 1000)
    anchor, shape = inception_crop(uniforms, square, square, (0.08, 0.5), (3 / 4, 4 / 3))
    area = shape.prod(1) / 1e6
    assert 0.079 < area.min() < area.max() < 0.501
    assert area.mean() == pytest.approx(0.29, abs=0.01)  # uniform in area
    ratio = np.log(shape[:, 1] / shape[:, 0])
    assert abs(ratio.mean()) < 0.01
    assert ratio.max() == pytest.approx(np.log(4 / 3), abs=0.01)


def test_an_image_of_extreme_shape_still_gets_a_crop():
    wide, high = np.array([1000, 3]), np.array([3, 1000])
    _, shape = inception_crop(np.full((2, 40), 0.99), wide, high, (0.5, 1.0), (3 / 4, 4 / 3))
    assert shape.tolist() == [[3, 4], [4, 3]]


def test_a_sample_gets_the_same_augmentation_in_any_batch():
    settings = AugmentSettings(randaugment_layers=2)
    ids = np.arange(50)
    sizes = np.full(50, 300), np.full(50, 200)
    whole = draw(settings, 1, np.zeros(50, np.int64), ids, *sizes)
    some = np.array([40, 3, 17])
    few = draw(settings, 1, np.zeros(3, np.int64), some, np.full(3, 300), np.full(3, 200))
    for name in ("anchor", "shape", "mirror"):
        np.testing.assert_array_equal(getattr(whole, name)[some], getattr(few, name))
    operations = draw_operations(settings, 1, np.zeros(50, np.int64), ids)
    few_operations = draw_operations(settings, 1, np.zeros(3, np.int64), some)
    assert operations is not None
    for name in ("operations", "magnitudes", "signs", "centres"):
        np.testing.assert_array_equal(getattr(operations, name)[some], getattr(few_operations, name))
    other_epoch = draw(settings, 1, np.ones(50, np.int64), ids, *sizes)
    assert (other_epoch.anchor != whole.anchor).any(1).mean() > 0.9
    assert 0.2 < whole.mirror.mean() < 0.8
    assert set(np.unique(operations.operations)) <= set(range(14))


def test_mixing_weights_are_those_of_the_folded_beta_distribution():
    weights = np.array([mixup_weight(0.2, 0, step) for step in range(3000)])
    assert ((weights >= 0.5) & (weights <= 1)).all()
    draws = np.random.default_rng(0).beta(0.2, 0.2, 100_000)
    assert weights.mean() == pytest.approx(np.maximum(draws, 1 - draws).mean(), abs=0.01)
    assert mixup_weight(0.2, 0, 7) == mixup_weight(0.2, 0, 7) != mixup_weight(0.2, 1, 7)
