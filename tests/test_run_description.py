"""The line that a stage begins with, and its warnings."""

import pytest

from data_prep.mixture import Mixture
from models.presets import vit_config
from pipeline.config import FinetuneSettings, PretrainSettings
from pipeline.run_description import MOST_EPOCHS, describe, tell
from tests.corpora import image_folder, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return Mixture.of(make_corpus(image_folder(folder / "images", classes=3, images=20), folder / "corpus"))


def settings(duration, *, kind=PretrainSettings, batch=16, **data):
    values = {
        "data": {"corpus": "/corpus", **data},
        "optimizer": {},
        "training": {"duration": duration, "global_batch": batch},
        "run": {"name": "a"},
    }
    return kind(**values, **({"parent": "models:/a/1"} if kind is FinetuneSettings else {}))


def test_the_line_says_what_is_trained_on_what_for_how_long(corpus):
    named = vit_config("S/16", num_classes=1000)
    line = describe(settings("8 epochs"), named, corpus)
    # arXiv 2010.11929's S/16 has 22.05 M parameters and 4.6 G multiply-adds; a FLOP is half of one.
    assert line == (
        "ViT-S/16 at 224 px: 22.1 M parameters, 9.2 GFLOPs an image (27.6 GFLOPs to train on it); "
        "3 classes, 60 images, 8 epochs of 3.8 steps: 30 steps of 16 images"
    )
    assert "1 step of 16 images: 0.27 of an epoch" in describe(settings("1 steps"), named, corpus)
    other = vit_config("Ti/4", image_size=32, num_classes=10)
    assert "ViT-Ti/4 at 32 px" in describe(settings("1 epochs"), other, corpus)


@pytest.mark.parametrize(("kind", "stage"), [(PretrainSettings, "pretrain"), (FinetuneSettings, "finetune")])
def test_more_passes_than_any_published_one_are_warned_of(corpus, messages, kind, stage):
    model, most = vit_config("Ti/16", image_size=32), MOST_EPOCHS[stage][0]
    tell(stage, settings(f"{most} epochs", kind=kind, heldout="/heldout"), model, corpus)
    assert "passes over" not in messages()
    tell(stage, settings("2780 epochs", kind=kind, heldout="/heldout"), model, corpus)
    assert f"is 2,780 passes over the 60 images of {corpus}" in messages()
    assert f'training.duration="{most} epochs" would be as many' in messages()
    assert "held out" not in messages()


def test_nothing_held_out_is_said_with_the_command_that_makes_a_split(corpus, messages):
    tell("pretrain", settings("1 epochs"), vit_config("Ti/16", image_size=32), corpus)
    assert "python data_prep/subset.py /corpus DESTINATION holdout=0.1" in messages()
