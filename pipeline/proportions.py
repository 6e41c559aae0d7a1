"""Settings that make no sense together, refused before a run begins. One that has begun goes on with what it has."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.command import absolute_path, check_folder, in_unpacked_job, log
from cluster.launch_environment import under_torchrun
from cluster.settings import SettingsError
from pipeline.config import PretrainSettings, RunSettings, StageSettings

if TYPE_CHECKING:
    from models.vit import VitConfig

_LARGEST_RESIZE = 2
"""Of eval_resize to image_size: the centre crop sees a quarter of a square picture then. Recipes have 1 to 1.34."""
_MOST_PARAMETERS, _MOST_MACS = 250e9, 1e15
"""Of a model, and of its forward pass for an image: ten and a hundred times those of the largest (arXiv 2302.05442)."""
_FEWEST_PATCHES = 4
"""Along a side; below, hardly anything of a picture's layout is left for attention to work with."""


def check_proportions(settings: StageSettings) -> None:
    """Refuse values that each could be, but not beside each other.

    Raises:
        SettingsError: naming both, and what would do.
    """
    size, resize = settings.data.image_size, settings.data.eval_resize
    if resize is not None and resize > _LARGEST_RESIZE * size:
        share = 100 * (size / resize) ** 2
        raise SettingsError(
            f"data.eval_resize = {resize} is {resize / size:.3g} times data.image_size = {size}: evaluation and "
            f"consumers of the model would see {share:.2g} % of a picture. Take it out (data.eval_resize=null shows all"
            f" of it), or set {round(size * 8 / 7)}, the usual ratio"
        )
    for key in ("mean", "std"):
        values = getattr(settings.data, key)
        if values is not None and max(values) > 2:
            raise SettingsError(
                f"data.{key} = {list(values)} is of pixels from 0 to 255: they are scaled to 0 to 1 here, so that "
                f"[{', '.join(f'{value / 255:.3g}' for value in values)}] would do"
            )
    if not isinstance(settings, PretrainSettings):
        return
    width, heads = settings.model.width, settings.model.heads
    if width and heads and width % heads:
        near = [number for number in range(1, width + 1) if width % number == 0] if width < 1 << 17 else [1]
        few = sorted(sorted(near, key=lambda number: abs(number - heads))[:4])
        raise SettingsError(
            f"model.width = {width} does not split into model.heads = {heads} heads of equal width: take model.heads "
            f"out, which follows then, or set it to {' or '.join(map(str, few))}"
        )


def may_have_begun(run: RunSettings) -> bool:
    """Whether a run of this name may be there already, as far as is seen without asking a server.

    Raises:
        ValueError: run.home cannot be a folder.
    """
    key, home = "run.home", run.home
    if not home:
        key, home = "VITFORGE_HOME", os.environ.get("VITFORGE_HOME", "") or "~/vitforge"
    if "://" in home:
        return True
    folder = Path(absolute_path(home, key))
    check_folder(folder, key)
    return os.path.lexists(folder / "runs" / run.name)


def check_model_size(config: "VitConfig") -> None:
    """Refuse a model that nobody could train, before anything is built of it.

    Raises:
        SettingsError: saying how large it is, and what would do.
    """
    import psutil

    from models.presets import count_parameters, forward_macs

    parameters, macs = count_parameters(config), forward_macs(config)
    if parameters > _MOST_PARAMETERS or macs > _MOST_MACS:
        raise SettingsError(
            f"a model of {parameters:.3g} parameters that takes {2 * macs:.3g} floating point operations an image is "
            f"beyond what can be trained here (at most {_MOST_PARAMETERS:.3g} and {2 * _MOST_MACS:.3g}): make "
            f"model.width ({config.width}), model.depth ({config.depth}), model.mlp_dim ({config.mlp_dim}) or "
            f"data.image_size ({config.image_size} pixels, {config.tokens:,} tokens) smaller"
        )
    on_others = os.environ.get("RAY_ADDRESS") or in_unpacked_job() or under_torchrun()
    memory = psutil.virtual_memory().total
    if 4 * parameters > memory and not on_others:
        raise SettingsError(
            f"the model has {parameters:.3g} parameters: its weights alone take {4 * parameters / 2**30:,.0f} GiB, and"
            f" this machine has {memory / 2**30:,.0f} GiB. Take a smaller one (model.name), or a cluster (RAY_ADDRESS)"
        )


def say_few_patches(image_size: int, patch_size: int) -> None:
    """Warn of a picture that is hardly cut up."""
    grid = image_size // patch_size
    if grid < _FEWEST_PATCHES:
        finer = [patch for patch in (2, 4, 7, 8, 14, 16) if image_size % patch == 0 and image_size // patch >= 7]
        advice = f": model.name=SIZE/{finer[-1]} makes patches of {finer[-1]} pixels" if finer else ""
        log.warning(
            "pictures of %d pixels in patches of %d are %d patches each, few to learn from%s",
            image_size,
            patch_size,
            grid * grid,
            advice,
        )
