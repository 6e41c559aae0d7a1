"""Pre-train a Vision Transformer on a corpus and register it.

The recipe says what is trained and how; any of its values can be set on the command line. Started again, the
same command goes on from the newest checkpoint. With RAY_ADDRESS set, or under `ray job submit`, the ranks run
on that cluster; otherwise on this machine. `torchrun pipeline/pretrain.py ...` runs them without Ray.

example:
  python pipeline/pretrain.py vit-s16-imagenet1k data.corpus=/data/imagenet1k run.workers=8
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds

import dataclasses
from typing import TYPE_CHECKING

from cluster.command import run_command
from cluster.settings import SettingsError, parse_command
from pipeline.config import RECIPES, PretrainSettings
from pipeline.proportions import check_model_size, check_proportions, may_have_begun, say_few_patches
from pipeline.registry_names import check_names

if TYPE_CHECKING:
    from models.vit import VitConfig


def architecture(settings: PretrainSettings, num_classes: int) -> "VitConfig":
    """The model that the settings describe, for a number of classes.

    Raises:
        SettingsError: no such model, or values that make none.
    """
    from models.presets import vit_config

    model = settings.model
    bias = model.head_bias
    if bias is None:
        bias = -10.0 if settings.loss.kind == "sigmoid" else 0.0
    try:
        config = vit_config(
            model.name,
            image_size=settings.data.image_size,
            num_classes=num_classes,
            pool=model.pool,
            dropout=model.dropout,
            drop_path=model.drop_path,
            head_bias=bias,
        )
        changes = {key: getattr(model, key) for key in ("width", "depth", "mlp_dim", "heads")}
        config = dataclasses.replace(config, **{key: value for key, value in changes.items() if value is not None})
        if model.position_init == "big_vision":
            config = dataclasses.replace(config, position_std=config.width**-0.5)
        if model.representation:
            config = dataclasses.replace(config, representation_size=config.width)
    except ValueError as error:
        raise SettingsError(
            f"model.name = {model.name!r}, data.image_size = {settings.data.image_size}: {error}"
        ) from None
    return config


def main() -> None:
    """Read the command line and run the stage."""
    settings = parse_command(
        PretrainSettings, prog="pipeline/pretrain.py", description=__doc__ or "", recipes=RECIPES / "pretrain"
    )
    # Checked before torch and the others are imported: a mistyped key is refused in the first second.
    check_names(settings.run.name, settings.registry.name, settings.registry.alias)
    if not may_have_begun(settings.run):
        check_proportions(settings)
    from pipeline.corpora import checks_of, open_corpora, with_places
    from pipeline.stage import Start, check_stage, print_result, resumed_settings, run_stage

    settings = resumed_settings(settings)
    model = architecture(settings, num_classes=2)  # what is wrong with the model does not need the corpus to show
    check_model_size(model)
    say_few_patches(model.image_size, model.patch_size)
    corpus, heldout = open_corpora(settings.data)
    data = with_places(settings.data, corpus, heldout).model_copy(
        update={"mean": settings.data.mean or (0.5, 0.5, 0.5), "std": settings.data.std or (0.5, 0.5, 0.5)}
    )
    settings = settings.model_copy(update={"data": data})
    check_stage(settings, corpus)
    start = Start(architecture(settings, len(corpus.classes)), None, checks=checks_of(corpus, heldout))
    print_result(run_stage("pretrain", settings, start, corpus, heldout))


if __name__ == "__main__":
    run_command(main)
