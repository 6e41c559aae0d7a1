"""The watch over losses and gradients: what a restart remembers, what a report says."""

import json

import numpy as np
import pytest
import torch

from cluster.folders import LocalFolder
from data_prep.mixture import Mixture
from pipeline.config import HealthSettings
from pipeline.health import Health, NonFiniteError, Taken
from pipeline.workers import Worker
from tests.corpora import image_folder, make_corpus

SETTINGS = HealthSettings(spike_factor=2.0, spike="stop")


def watch(health, step, loss, ids=(0,)):
    """What all ranks say of a step."""
    health.took(step, step, np.array(ids), torch.tensor(loss), torch.tensor(0.0))
    return health.judge(health.tell(everything=True))


def test_a_restart_measures_a_spike_against_the_same_losses():
    health = Health(SETTINGS, Worker())
    assert [watch(health, step, 1.0 + step / 8) for step in range(1, 31)] == [None] * 30
    saved = json.loads(json.dumps(health.usual))
    assert saved == [1.0 + step / 8 for step in range(1, 31)]
    troubles = []
    for again in (health, Health(SETTINGS, Worker(), saved)):
        assert watch(again, 31, 5.8) is None  # the median is 2.9375
        troubles.append(watch(again, 32, 6.5))
    assert troubles[0] == troubles[1]
    assert troubles[0].what == "the loss jumped to 6.5, 2.2 times its usual value"
    # A checkpoint of before has none: nothing is a spike until there are enough.
    assert watch(Health(SETTINGS, Worker()), 31, 600.0) is None


def test_on_a_gpu_a_spike_is_found_at_its_step_when_everything_is_asked_for():
    """Values come a step late there; a save asks for the step before and for the last one, and not for both at once."""
    health = Health(SETTINGS, Worker(gpu_index=0))
    troubles = []
    for step in range(1, 42):
        loss = 2.5 if step == 40 else 1.0
        # as `took` leaves it, whose copies to the host need a device
        health._waiting.append(Taken(step, step, np.array([0]), torch.tensor(loss), torch.tensor(0.0), None))
        sums = [health.tell()]
        if step % 10 == 0:
            sums.append(health.tell(everything=True))
        troubles += [health.judge(each) for each in sums]
    assert [trouble.step for trouble in troubles if trouble is not None] == [40]


def test_steps_that_are_taken_back_count_for_nothing():
    health = Health(SETTINGS, Worker())
    for step in range(1, 31):
        watch(health, step, 1.0)
    saved = health.usual
    for step in range(31, 101):
        watch(health, step, 1.9)
    health.begin_again(saved)
    assert health.usual == saved
    assert watch(health, 31, 2.1) is not None


@pytest.mark.parametrize(("images", "stored"), [(20, 60), (30, 64)])
def test_a_report_says_how_many_of_its_images_it_holds(tmp_path, images, stored):
    corpus = Mixture.of(make_corpus(image_folder(tmp_path / "images", classes=3, images=images), tmp_path / "corpus"))
    health = Health(HealthSettings(), Worker())
    trouble = watch(health, 7, float("nan"), ids=[*range(3 * images), 0])  # one image twice
    folder = LocalFolder(tmp_path / "run")
    with pytest.raises(NonFiniteError, match="at step 7"):
        health.handle(trouble, [], folder, corpus)
    report = folder.read_json("reports/step-00000007.json")
    assert report["images_stored"] == f"{stored} of {3 * images}"
    assert len(report["images"]) == stored
    assert len(report["origins"]) == 3 * images
