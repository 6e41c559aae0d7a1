"""The `model` section of pre-training's settings: the architecture, and what in it follows from what."""

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from cluster.settings import Settings
from models.sizes import split_name

Probability = Annotated[float, Field(ge=0, lt=1)]
_PARTS = ("width", "depth", "mlp_dim", "heads")
"""What a size decides."""
_WIDEST = 1 << 16


class ModelSettings(Settings):
    """The architecture. A name such as S/16 gives all of it; single values can be set beside it."""

    name: str = "S/16"
    """Size and patch of the paper and its descendants: Ti, S, B, L, H, g or G, a slash, the patch in pixels."""
    width: PositiveInt | None = None
    """Width of the tokens, instead of the size's own."""
    depth: PositiveInt | None = None
    """Number of blocks, instead of the size's own."""
    mlp_dim: PositiveInt | None = None
    """Hidden width of the MLPs. Follows the width as in the recipe or the size; null in a file is the size's own."""
    heads: PositiveInt | None = None
    """Number of attention heads. Follows the width likewise: heads of about the same width."""
    pool: Literal["cls", "gap"] = "cls"
    """What the head reads: a class token, or the global average of the patch tokens."""
    representation: bool = True
    """Pre-training head with a hidden tanh layer of the model's width. Fine-tuning always drops it."""
    dropout: Probability = 0.0
    """Dropout after every dense layer except qkv, and after adding the position embedding."""
    drop_path: Probability = 0.0
    """Stochastic depth: chance of skipping the last block, growing linearly from 0 at the first."""
    position_init: Literal["paper", "big_vision"] = "paper"
    """Standard deviation of the initial position embedding: 0.02 (paper), or 1 / sqrt(width) (big_vision)."""
    head_bias: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    """Initial bias of the head. Null: 0 with softmax, -10 with sigmoid, as ImageNet-21k wants."""

    @classmethod
    def follow(cls, recipe: Mapping[str, Any], values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
        """See `Settings.follow`.

        Another size named on the command line is that size, without the width and the like that the recipe sets beside
        its own. Where the width is another than that of the recipe or the size, MLPs are as many times wider, and
        heads as many more, as far as the width splits.
        """
        sizes = [split_name(str(section.get("name", cls.model_fields["name"].default))) for section in (recipe, values)]
        before, now = sizes
        if now is None:
            return {}  # and is refused
        size = now[0]
        changes: dict[str, Any] = {}
        if "name" in given and before is not None and before[0] != size:
            changes = {key: None for key in _PARTS if key in recipe and key not in given}
            recipe = {key: value for key, value in recipe.items() if key not in _PARTS}
        for key in ("mlp_dim", "heads"):
            if key in given and values.get(key) is not None:
                continue
            own = {} if key in given else recipe  # KEY=null takes the recipe's out
            if "width" not in given and key in own:
                continue  # as it stands in the recipe; null there is the size's own
            was = (own.get("width") if key in own else None) or size.width
            width = values.get("width") if "width" not in changes else None
            width = size.width if width is None else width
            if not all(type(number) is int and 0 < number <= _WIDEST for number in (was, width)) or width == was:
                continue
            number = own.get(key) or getattr(size, key)
            if type(number) is int and 0 < number <= _WIDEST * 16:
                wanted = number * width / was
                changes[key] = max(1, round(wanted)) if key == "mlp_dim" else _nearest_divisor(width, wanted)
        return changes


def _nearest_divisor(number: int, wanted: float) -> int:
    """The divisor of a number that is nearest in ratio to what is wanted."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return min(low + [number // divisor for divisor in low], key=lambda divisor: abs(math.log(divisor / wanted)))
