"""Fine-tune a registered model on another corpus, usually for a few epochs at a higher resolution.

The parent's weights get a new head (zero, one linear layer) for the corpus's classes, and a position embedding
resized to the new resolution. The result is a new version in the registry. Started again, the same command goes
on from the newest checkpoint, with the parent it began with.

example:
  python pipeline/finetune.py vit-paper parent=models:/vit-b16@champion data.corpus=/data/pets registry.name=pets
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds

import dataclasses
from typing import TYPE_CHECKING

from cluster.command import log, run_command
from cluster.settings import SettingsError, parse_command
from pipeline.config import RECIPES, FinetuneSettings
from pipeline.proportions import check_model_size, check_proportions, may_have_begun
from pipeline.registry_names import check_names

if TYPE_CHECKING:
    from data_prep.mixture import Mixture
    from models.vit import VitConfig
    from pipeline.packages import Package
    from pipeline.stage import Colors


def architecture(settings: FinetuneSettings, parent: "VitConfig", num_classes: int) -> "VitConfig":
    """The parent's architecture with a new head and at the new resolution.

    Raises:
        SettingsError: the resolution does not fit the parent's patches.
    """
    try:
        return dataclasses.replace(
            parent,
            image_size=settings.data.image_size,
            num_classes=num_classes,
            representation_size=None,
            head_bias=-10.0 if settings.loss.kind == "sigmoid" else 0.0,
            dropout=settings.dropout,
            drop_path=settings.drop_path,
        )
    except ValueError as error:
        raise SettingsError(f"data.image_size = {settings.data.image_size} with the parent's model: {error}") from None


def _prepared(
    settings: FinetuneSettings, corpus: "Mixture", heldout: "Mixture | None", colors: tuple["Colors", "Colors"]
) -> FinetuneSettings:
    """The settings with absolute paths, and the parent's mean and deviation where they name none."""
    from pipeline.corpora import with_places

    data = with_places(settings.data, corpus, heldout).model_copy(
        update={"mean": settings.data.mean or colors[0], "std": settings.data.std or colors[1]}
    )
    return settings.model_copy(update={"data": data})


def _say_changes(parent: "Package", config: "VitConfig", corpus: "Mixture") -> None:
    if list(parent.classes) != corpus.names:
        log.info("new head: the parent knows %d classes, the corpus has %d", len(parent.classes), len(corpus.classes))
    log.info(
        "fine-tuning %s at %d px (its own: %d px, grid %d to %d)",
        parent.uri,
        config.image_size,
        parent.config.image_size,
        parent.config.grid,
        config.grid,
    )


def _same_weights(one: "VitConfig", other: "VitConfig") -> bool:
    """Whether a parent's weights become the same initial ones for both."""
    names = ("image_size", "num_classes", "head_bias")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def main() -> None:
    """Read the command line and run the stage."""
    settings = parse_command(
        FinetuneSettings, prog="pipeline/finetune.py", description=__doc__ or "", recipes=RECIPES / "finetune"
    )
    # Checked before torch and the others are imported: a mistyped key is refused in the first second.
    check_names(settings.run.name, settings.registry.name, settings.registry.alias)
    if not may_have_begun(settings.run):
        check_proportions(settings)
    from models.weights import adapt_for_finetuning
    from pipeline import packages, tracking
    from pipeline.corpora import checks_of, open_corpora
    from pipeline.parents import choose_parent
    from pipeline.scratch import temporary_files
    from pipeline.stage import (
        Start,
        check_stage,
        home_folder,
        print_result,
        resumed_settings,
        run_folder,
        run_stage,
    )

    settings = resumed_settings(settings)
    corpus, heldout = open_corpora(settings.data)
    check_stage(settings, corpus)
    tracking.connect(home_folder(settings.run.home))
    checks = checks_of(corpus, heldout)
    chosen = choose_parent(settings, run_folder(settings.run))
    settings = chosen.settings
    begun = chosen.architecture
    config = None if begun is None else architecture(settings, begun, len(corpus.classes))
    if begun is not None and config is not None and (chosen.has_checkpoint or _same_weights(config, begun)):
        assert chosen.colors is not None
        settings = _prepared(settings, corpus, heldout, chosen.colors)
        start = Start(config, {}, chosen.uri, chosen.run, chosen.colors, checks)  # the run's folder has the weights
    else:
        with temporary_files(settings.checkpoint.scratch, "parent"):
            parent = packages.load_package(chosen.uri)
        colors = (parent.preprocessing.mean, parent.preprocessing.std)
        settings = _prepared(settings, corpus, heldout, colors)
        config = architecture(settings, parent.config, len(corpus.classes))
        check_model_size(config)
        _say_changes(parent, config, corpus)
        weights = adapt_for_finetuning(
            parent.state,
            parent.config,
            config,
            interpolation=settings.position_interpolation,
            antialias=settings.position_antialias,
        )
        start = Start(config, weights, parent.uri, parent.tags.get("vitforge.mlflow_run"), colors, checks)
    print_result(run_stage("finetune", settings, start, corpus, heldout))


if __name__ == "__main__":
    run_command(main)
