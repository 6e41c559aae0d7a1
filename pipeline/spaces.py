"""Which operations RandAugment and TrivialAugment choose from, and what a magnitude means for each: by source.

RandAugment has no common scale: 10 is the end of big_vision's (and AugReg's), a third of torchvision's, and other
operations take part. Each source is a `Space` of its own; pipeline/operations.py carries them out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data_config import AugmentSettings

Values = NDArray[np.float64]

MAGNITUDES = 31
"""Strengths that TrivialAugment draws from, 0 to 30, as published."""
ENHANCEMENTS = ("Brightness", "Contrast", "Color", "Sharpness")
"""Their parameter is a factor: 1 is the image itself, 0 nothing of it but black, its mean, its gray, its blur."""


@dataclass(frozen=True)
class Operation:
    """One operation and its parameter at magnitude 0 and at the end of the scale; linear in between and beyond."""

    name: str
    low: float = 0.0
    high: float = 0.0
    signed: bool = False
    """Whether the parameter is negated for half of the images."""
    rounded: Callable[[Values], Values] | None = None
    """What makes the parameter a whole number."""


@dataclass(frozen=True)
class Space:
    """The operations of one source, equally likely each, and how it treats pixels."""

    operations: tuple[Operation, ...]
    scale: int
    """The magnitude at which a parameter is `Operation.high`."""
    library: Literal["tensorflow", "pillow"]
    """Whose operations they are: gray, mean, rounding and the origin of a shear differ."""
    fill: int
    """Level of what comes from outside the image."""
    bilinear: bool = False
    """How warped pixels are read: else the nearest."""

    def parameters(
        self, operations: NDArray[np.int32], magnitudes: NDArray[np.int32], signs: NDArray[np.int32]
    ) -> Values:
        """Parameters of operations, all arguments of one shape; a sign of 1 negates where there is a direction.

        Their units: degrees, pixels, share of a side's length (shear), factor, bits, level from 0 to 255.
        """
        found = np.zeros(operations.shape)
        for number, operation in enumerate(self.operations):
            chosen = operations == number
            values = operation.low + magnitudes[chosen] / self.scale * (operation.high - operation.low)
            if operation.rounded:
                values = operation.rounded(values)
            if operation.signed:
                values = np.where(signs[chosen] == 1, -values, values)
            if operation.name in ENHANCEMENTS and operation.signed:
                values = 1 + values
            found[chosen] = values
        return found


def space_of(settings: AugmentSettings, side: int) -> Space | None:
    """The space that the settings choose for images of side x side pixels; None without such an augmentation."""
    if settings.randaugment.kind == "big_vision":
        return _big_vision(settings.randaugment.solarize_wraps)
    if settings.randaugment.kind == "torchvision":
        return _pillow(shear=0.3, translate=150 / 331 * side, rotate=30, enhance=0.9, bits=4)
    if settings.randaugment_layers:
        return _dali(side)
    if settings.trivialaugment:
        return _pillow(shear=0.99, translate=32, rotate=135, enhance=0.99, bits=6)
    return None


def _big_vision(solarize_wraps: bool) -> Space:
    """`distort_image_with_randaugment` of big_vision's pp/autoaugment.py.

    Pixels are those of its images at any size: 100 for translations, 40 for half a side of Cutout. Enhancements have no
    sign: the factor is 0.1 at 0, 1 at 5, 1.9 at 10. Posterize keeps more bits and Solarize inverts less the higher the
    magnitude: pixels from the threshold upwards are inverted.
    """

    def threshold(values: Values) -> Values:
        # TensorFlow compares in 8 bits, where 256 is 0: everything is inverted instead of nothing.
        return np.trunc(values) % 256 if solarize_wraps else np.trunc(values)

    def bits(values: Values) -> Values:
        # TensorFlow shifts 8 bits by at most 7 places, so that one bit is always left.
        return np.clip(np.trunc(values), 1, 8)

    return Space(
        (
            Operation("AutoContrast"),
            Operation("Equalize"),
            Operation("Invert"),
            Operation("Rotate", 0, 30, signed=True),
            Operation("Posterize", 0, 4, rounded=bits),
            Operation("Solarize", 0, 256, rounded=threshold),
            Operation("Color", 0.1, 1.9),
            Operation("Contrast", 0.1, 1.9),
            Operation("Brightness", 0.1, 1.9),
            Operation("Sharpness", 0.1, 1.9),
            Operation("ShearX", 0, 0.3, signed=True),
            Operation("ShearY", 0, 0.3, signed=True),
            Operation("TranslateX", 0, 100, signed=True),
            Operation("TranslateY", 0, 100, signed=True),
            Operation("Cutout", 0, 40, rounded=np.trunc),
            Operation("SolarizeAdd", 0, 110, rounded=np.trunc),
        ),
        scale=10,
        library="tensorflow",
        fill=128,
    )


def _pillow(*, shear: float, translate: float, rotate: float, enhance: float, bits: int) -> Space:
    """torchvision's RandAugment and TrivialAugmentWide at their defaults: 31 bins, nearest pixels, black outside.

    Args:
        shear, rotate: largest, share of a side and degrees.
        translate: largest, pixels; whole ones are taken.
        enhance: how far a factor lies from 1 at most.
        bits: how many Posterize takes away at most.
    """
    return Space(
        (
            Operation("TranslateX", 0, translate, signed=True, rounded=np.trunc),
            Operation("TranslateY", 0, translate, signed=True, rounded=np.trunc),
            Operation("ShearX", 0, shear, signed=True),
            Operation("ShearY", 0, shear, signed=True),
            Operation("Rotate", 0, rotate, signed=True),
            *(Operation(name, 0, enhance, signed=True) for name in ENHANCEMENTS),
            Operation("Posterize", 8, 8 - bits, rounded=np.rint),
            Operation("Solarize", 255, 0),
            Operation("Equalize"),
            Operation("AutoContrast"),
            Operation("Identity"),
        ),
        scale=30,
        library="pillow",
        fill=0,
    )


def _dali(side: int) -> Space:
    """What randaugment_layers has always meant: DALI's suite, gray outside, bilinear, 100 of 224 pixels.

    Its operations are Pillow's here: DALI's own Equalize is OpenCV's, five levels off. Runs under the old rules have
    DALI's (pipeline/decoding.py), in this order.
    """
    moved = round(side * 100 / 224)
    base = _pillow(shear=0.3, translate=moved, rotate=30, enhance=0.9, bits=4)
    replaced = {
        "TranslateX": Operation("TranslateX", 0, moved, signed=True),
        "TranslateY": Operation("TranslateY", 0, moved, signed=True),
        "Solarize": Operation("Solarize", 256, 0),
    }
    operations = tuple(replaced.get(operation.name, operation) for operation in base.operations)
    return replace(base, operations=operations, fill=128, bilinear=True)
