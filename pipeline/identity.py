"""What makes a run the same run, whatever it runs on."""

from collections.abc import Mapping
from typing import Any, TypeVar

from cluster.settings import keep_followed, keep_saved
from data_prep.mixture import Mixture
from models.vit import VitConfig
from pipeline.config import StageSettings
from pipeline.corpora import shuffle_windows

Stage = TypeVar("Stage", bound=StageSettings)


def identity_of(settings: StageSettings, config: VitConfig, corpus: Mixture) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint, whatever it runs on."""
    decide = settings_that_decide(settings)
    decide["data"]["shuffle_window"] = shuffle_windows(corpus, settings.data)
    return {"architecture": config.to_json(), "corpus_hash": corpus.corpus_hash, "settings": decide}


def as_begun(settings: Stage, state: Mapping[str, Any]) -> Stage:
    """The settings of a run that goes on: what nobody gave is as it was when it began, where it came to the settings
    later or follows from others.

    Args:
        state: of a checkpoint.
    """
    saved = state.get("settings")
    saved = saved if isinstance(saved, Mapping) else {}
    return keep_followed(keep_saved(settings, saved), saved)


def settings_that_decide(settings: StageSettings) -> dict[str, Any]:
    """The settings that change what a run computes; a run continues only with the same ones."""
    values = settings.model_dump(mode="json")
    for section in ("checkpoint", "evaluation", "early_stopping", "health", "log", "run", "registry"):
        del values[section]
    for key in (
        "corpus",
        "mixture",
        "mixture_classes",
        "heldout",
        "cache_gb",
        "max_bad_share",
        "decode",
        "hw_decoder_load",
        "decode_threads",
    ):
        del values["data"][key]
    for key in ("micro_batch", "zero_stage", "precision", "compile", "recompute"):
        del values["training"][key]  # the layout, and the precision, which is compared as it was settled
    return values
