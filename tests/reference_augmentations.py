"""Augmentations in plain NumPy and Pillow, one image at a time, written from what their sources define.

The yardstick of tests/test_augmentation_sources.py: no line is shared with pipeline/. Images are uint8 [H, W, 3].

- big_vision: RandAugment of its `pp/autoaugment.py` (TensorFlow; also AugReg's), with its pixels of TensorFlow Addons.
- torchvision: `RandAugment` and `TrivialAugmentWide` at their defaults and `ColorJitter`, on Pillow images.
- DeiT III (arXiv 2204.07118): 3-Augment on Pillow images.
- crops: TensorFlow's `sample_distorted_bounding_box` and torchvision's `RandomResizedCrop.get_params`.
"""

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Pixels = NDArray[np.uint8]
FILL = 128


def truncated(values: NDArray[np.floating]) -> Pixels:
    return np.clip(values, 0, 255).astype(np.uint8)


def projected(image: Pixels, matrix: tuple[float, ...], fill: int) -> Pixels:
    """TensorFlow Addons' `transform`, nearest: output (x, y) is input (a x + b y + c, d x + e y + f), rounded."""
    height, width = image.shape[:2]
    out = np.full_like(image, fill)
    a, b, c, d, e, f = matrix
    y, x = np.mgrid[:height, :width].astype(np.float64)
    from_x, from_y = (np.floor(value + 0.5).astype(int) for value in (a * x + b * y + c, d * x + e * y + f))
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    out[inside] = image[from_y[inside], from_x[inside]]
    return out


def blended(degenerate: NDArray[np.floating], image: Pixels, factor: float) -> Pixels:
    degenerate = degenerate.astype(np.float32)
    return truncated(degenerate + np.float32(factor) * (image.astype(np.float32) - degenerate))


def tensorflow_gray(image: Pixels) -> NDArray[np.float64]:
    gray = (image / 255.0) @ np.array([0.2989, 0.587, 0.114])
    return np.floor(gray * 255.5)[..., None].repeat(3, 2)


def sharpened(image: Pixels, factor: float) -> Pixels:
    smooth = image.astype(np.float64)
    total = 4 * smooth
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        total = total + np.roll(smooth, (dy, dx), (0, 1))
    smooth[1:-1, 1:-1] = np.floor(total[1:-1, 1:-1] / 13 + 1e-9)
    return blended(smooth, image, factor)


def cut_out(image: Pixels, half: int, y: int, x: int) -> Pixels:
    out = image.copy()
    out[max(0, y - half) : y + half, max(0, x - half) : x + half] = FILL
    return out


def rotation(image: Pixels, degrees: float) -> tuple[float, ...]:
    height, width = image.shape[:2]
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    x = ((width - 1) - (cos * (width - 1) - sin * (height - 1))) / 2
    y = ((height - 1) - (sin * (width - 1) + cos * (height - 1))) / 2
    return cos, -sin, x, sin, cos, y


def big_vision_operations(level: float, wraps: bool = False) -> dict[str, Callable[[Pixels, random.Random], Pixels]]:
    """Of its RandAugment at a level; `wraps` compares the threshold of Solarize in 8 bits, as TensorFlow does."""
    share = level / 10
    enhance = share * 1.8 + 0.1
    bits = int(share * 4)
    threshold = int(share * 256) % 256 if wraps else int(share * 256)
    addition = int(share * 110)

    def sign(draws: random.Random) -> int:
        return 1 if draws.random() < 0.5 else -1

    def pillows(operation: Callable[[Image.Image], Image.Image]) -> Callable[[Pixels, random.Random], Pixels]:
        return lambda image, draws: np.asarray(operation(Image.fromarray(image)))

    def posterized(image: Pixels, draws: random.Random) -> Pixels:
        shift = min(8 - min(bits, 8), 7)  # TensorFlow shifts 8 bits by 7 at most
        return ((image >> shift) << shift).astype(np.uint8)

    def contrasted(image: Pixels, draws: random.Random) -> Pixels:
        # What it calls the mean is the number of pixels over 256, at most 255.
        mean = math.floor(min(image.shape[0] * image.shape[1] / 256, 255))
        return blended(np.full(image.shape, mean), image, enhance)

    def added(image: Pixels, draws: random.Random) -> Pixels:
        return np.where(image < 128, np.minimum(image.astype(int) + addition, 255), image).astype(np.uint8)

    def warped(matrix_of: Callable[[Pixels, int], tuple[float, ...]]) -> Callable[[Pixels, random.Random], Pixels]:
        return lambda image, draws: projected(image, matrix_of(image, sign(draws)), FILL)

    return {
        "AutoContrast": pillows(ImageOps.autocontrast),
        "Equalize": pillows(ImageOps.equalize),
        "Invert": lambda image, draws: 255 - image,
        "Rotate": warped(lambda image, sign: rotation(image, sign * share * 30)),
        "Posterize": posterized,
        "Solarize": lambda image, draws: np.where(image < threshold, image, 255 - image),
        "Color": lambda image, draws: blended(tensorflow_gray(image), image, enhance),
        "Contrast": contrasted,
        "Brightness": lambda image, draws: blended(np.zeros(image.shape), image, enhance),
        "Sharpness": lambda image, draws: sharpened(image, enhance),
        "ShearX": warped(lambda image, sign: (1, sign * share * 0.3, 0, 0, 1, 0)),
        "ShearY": warped(lambda image, sign: (1, 0, 0, sign * share * 0.3, 1, 0)),
        "TranslateX": warped(lambda image, sign: (1, 0, sign * share * 100, 0, 1, 0)),
        "TranslateY": warped(lambda image, sign: (1, 0, 0, 0, 1, sign * share * 100)),
        "Cutout": lambda image, draws: cut_out(
            image, int(share * 40), draws.randrange(image.shape[0]), draws.randrange(image.shape[1])
        ),
        "SolarizeAdd": added,
    }


def pillow_operations(
    share: float, shear: float, translate: tuple[float, float], rotate: float, enhance: float, bits: float
) -> dict[str, Callable[[Pixels, random.Random], Pixels]]:
    """torchvision's: every operation at `share` (0 to 1) of the largest strength that is given."""

    def sign(draws: random.Random) -> int:
        return 1 if draws.random() < 0.5 else -1

    def enhanced(how: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Pixels, random.Random], Pixels]:
        return lambda image, draws: np.asarray(how(Image.fromarray(image)).enhance(1 + sign(draws) * share * enhance))

    def affine(matrix_of: Callable[[int], tuple[float, ...]]) -> Callable[[Pixels, random.Random], Pixels]:
        def apply(image: Pixels, draws: random.Random) -> Pixels:
            matrix = matrix_of(sign(draws))
            size = (image.shape[1], image.shape[0])
            return np.asarray(Image.fromarray(image).transform(size, Image.Transform.AFFINE, matrix))

        return apply

    def plain(operation: Callable[[Image.Image], Image.Image]) -> Callable[[Pixels, random.Random], Pixels]:
        return lambda image, draws: np.asarray(operation(Image.fromarray(image)))

    keep = 8 - round(share * bits)
    return {
        "Identity": lambda image, draws: image,
        "ShearX": affine(lambda sign: (1, sign * share * shear, 0, 0, 1, 0)),
        "ShearY": affine(lambda sign: (1, 0, 0, sign * share * shear, 1, 0)),
        "TranslateX": affine(lambda sign: (1, 0, sign * int(share * translate[0]), 0, 1, 0)),
        "TranslateY": affine(lambda sign: (1, 0, 0, 0, 1, sign * int(share * translate[1]))),
        "Rotate": lambda image, draws: np.asarray(Image.fromarray(image).rotate(sign(draws) * share * rotate)),
        "Brightness": enhanced(ImageEnhance.Brightness),
        "Color": enhanced(ImageEnhance.Color),
        "Contrast": enhanced(ImageEnhance.Contrast),
        "Sharpness": enhanced(ImageEnhance.Sharpness),
        "Posterize": plain(lambda image: ImageOps.posterize(image, keep)),
        "Solarize": plain(lambda image: ImageOps.solarize(image, math.ceil(255 * (1 - share)))),
        "AutoContrast": plain(ImageOps.autocontrast),
        "Equalize": plain(ImageOps.equalize),
    }


def torchvision_operations(magnitude: int, side: int) -> dict[str, Callable[[Pixels, random.Random], Pixels]]:
    """Of its RandAugment, 31 bins."""
    return pillow_operations(magnitude / 30, 0.3, (150 / 331 * side, 150 / 331 * side), 30, 0.9, 4)


def trivial_operations(magnitude: int) -> dict[str, Callable[[Pixels, random.Random], Pixels]]:
    """Of its TrivialAugmentWide, 31 bins."""
    return pillow_operations(magnitude / 30, 0.99, (32, 32), 135, 0.99, 6)


def color_jittered(image: Pixels, strength: float, draws: random.Random) -> Pixels:
    """torchvision's ColorJitter(strength, strength, strength): three factors, in random order."""
    enhancements = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    draws.shuffle(enhancements)
    result = Image.fromarray(image)
    for enhance in enhancements:
        result = enhance(result).enhance(draws.uniform(max(0, 1 - strength), 1 + strength))
    return np.asarray(result)


def three_augmented(image: Pixels, draws: random.Random) -> Pixels:
    """DeiT III: gray, solarised or blurred."""
    kind, picture = draws.randrange(3), Image.fromarray(image)
    if kind == 0:
        picture = ImageOps.grayscale(picture).convert("RGB")
    elif kind == 1:
        picture = ImageOps.solarize(picture)
    else:
        picture = picture.filter(ImageFilter.GaussianBlur(draws.uniform(0.1, 2.0)))
    return np.asarray(picture)


def tensorflow_crop(width: int, height: int, draws: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height and width by `sample_distorted_bounding_box(area_range=(0.05, 1), min_object_covered=0)`."""
    for _ in range(100):
        aspect = draws.uniform(0.75, 1.33)
        least, most = 0.05 * width * height, 1.0 * width * height
        high, tallest = round(math.sqrt(least / aspect)), round(math.sqrt(most / aspect))
        if round(tallest * aspect) > width:
            tallest = int((width + 0.5 - 1e-7) / aspect)
            tallest -= round(tallest * aspect) > width
        tallest = min(tallest, height)
        high = min(high, tallest)
        if high < tallest:
            high += draws.randrange(tallest - high + 1)
        wide = round(high * aspect)
        if wide * high < least:
            high += 1
            wide = round(high * aspect)
        if wide * high > most:
            high -= 1
            wide = round(high * aspect)
        if not (least <= wide * high <= most and 0 < wide <= width and 0 < high <= height):
            continue
        top = draws.randrange(height - high) if high < height else 0
        left = draws.randrange(width - wide) if wide < width else 0
        return top, left, high, wide
    return 0, 0, height, width


def torchvision_crop(width: int, height: int, draws: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height and width by `RandomResizedCrop(scale=(0.05, 1))`."""
    for _ in range(10):
        area = width * height * draws.uniform(0.05, 1.0)
        aspect = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            return draws.randrange(height - high + 1), draws.randrange(width - wide + 1), high, wide
    wide, high = width, height
    if width / height < 3 / 4:
        high = round(width / (3 / 4))
    elif width / height > 4 / 3:
        wide = round(height * (4 / 3))
    return (height - high) // 2, (width - wide) // 2, high, wide
