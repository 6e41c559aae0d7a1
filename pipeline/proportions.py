"""Settings that make no sense together, refused before a run begins. One that has begun goes on with what it has."""

import os
from pathlib import Path

from cluster.command import absolute_path, log
from cluster.settings import SettingsError
from pipeline.config import PretrainSettings, RunSettings, StageSettings

_LARGEST_RESIZE = 2
"""Of eval_resize to image_size: the centre crop sees a quarter of a square picture then. Recipes have 1 to 1.34."""
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
    """Whether a run of this name may be there already, as far as is seen without asking a server."""
    home = run.home or os.environ.get("VITFORGE_HOME", "") or "~/vitforge"
    return "://" in home or os.path.lexists(Path(absolute_path(home, "run.home")) / "runs" / run.name)


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
