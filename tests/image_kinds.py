"""The kinds of image files that there are: format, mode, marker, orientation. A table of what becomes of each.

    python -m tests.image_kinds [PART OF A NAME]

prints sharding's verdict for each and, where it takes the image, how far DALI's pixels in training and in evaluation
are from a consumer's: mean difference in levels of 255 over the image, and over its outermost ring.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.image_check import ImageFacts, UnusableImage, check_image
from models.preprocess import ImageError, Preprocessing
from pipeline import augment, decoding
from pipeline.data_config import AugmentSettings, DataSettings
from tests import jpeg_kinds, other_kinds, png_kinds

SIZE, SHORTER = 48, 56
"""Pixels of what training and evaluation get, and of the shorter side that its centre is cut from."""
LIMIT = 1.0
"""Levels of 255."""


@dataclass(frozen=True)
class Row:
    """What becomes of a kind.

    Attributes:
        facts: sharding takes it; else the reason.
        differences: by path, from the consumer's pixels: mean over the image, mean over its outermost ring. Or why
            there is none.
    """

    name: str
    facts: ImageFacts | str
    differences: dict[str, tuple[float, float]] | str

    @property
    def holds(self) -> bool:
        """Whether it is refused, or the same everywhere."""
        if isinstance(self.facts, str):
            return True
        return not isinstance(self.differences, str) and max(map(max, self.differences.values())) <= LIMIT

    def __str__(self) -> str:
        if isinstance(self.facts, str):
            return f"{self.name:55} left out: {self.facts}"
        facts = f"{self.facts.width} x {self.facts.height}"
        if isinstance(self.differences, str):
            return f"{self.name:55} {facts:9} FAILS: {self.differences}"
        shown = "  ".join(f"{path} {mean:.2f} {ring:.2f}" for path, (mean, ring) in self.differences.items())
        return f"{self.name:55} {facts:9} {shown}{'' if self.holds else '  DIFFERS'}"


@cache
def all_kinds() -> dict[str, bytes]:
    """A file of each kind, by name."""
    kinds: dict[str, bytes] = {}
    for some in (
        jpeg_kinds.colours(), jpeg_kinds.orientations(), jpeg_kinds.exif_blocks(), png_kinds.modes(),
        png_kinds.chunks(), other_kinds.webp_files(), other_kinds.bmp_files(), other_kinds.tiff_files(),
        other_kinds.others(),
    ):  # fmt: skip
        for name, data in some:
            assert name not in kinds, name
            kinds[name] = data
    return kinds


def table(kinds: dict[str, bytes]) -> list[Row]:
    """What becomes of each."""
    facts: dict[str, ImageFacts | str] = {}
    for name, data in kinds.items():
        try:
            facts[name] = check_image(data)
        except UnusableImage as reason:
            facts[name] = str(reason)
    taken = {name: fact for name, fact in facts.items() if isinstance(fact, ImageFacts)}
    names, differences = list(taken), dict[str, Any]()
    for start in range(0, len(names), 32):
        some = names[start : start + 32]
        differences |= zip(some, compare([kinds[n] for n in some], [taken[n] for n in some]), strict=True)
    return [Row(name, fact, differences.get(name, {})) for name, fact in facts.items()]


def compare(images: Sequence[bytes], facts: Sequence[ImageFacts]) -> list[dict[str, tuple[float, float]] | str]:
    """Differences of each image as Row has them."""
    try:
        return _compared(images, facts)
    except (RuntimeError, ImageError) as error:  # one of them, and DALI does not say which
        if len(images) == 1:
            return [str(error)]
        return [compare([image], [fact])[0] for image, fact in zip(images, facts, strict=True)]


def _compared(images: Sequence[bytes], facts: Sequence[ImageFacts]) -> list[dict[str, tuple[float, float]] | str]:
    count, encoded = len(images), [np.frombuffer(image, np.uint8) for image in images]
    squashed = DataSettings(
        corpus="none", image_size=SIZE, augment=AugmentSettings(crop="squash", flip=False), mean=(0, 0, 0),
        std=(1, 1, 1), decode="cpu",
    )  # fmt: skip
    centre = squashed.model_copy(update={"eval_resize": SHORTER})
    widths, heights = (np.array([getattr(fact, side) for fact in facts]) for side in ("width", "height"))
    numbers = np.arange(count)
    draws = augment.draw(squashed.augment, 0, np.zeros(count, np.int64), numbers, widths, heights)
    training = decoding.train_graph(
        lambda _: decoding.train_inputs(encoded, draws), count, squashed, "cpu", threads=1, device_id=None
    )
    graphs = {"training": training}
    whole, cut = decoding.preprocessing_of(squashed), decoding.preprocessing_of(centre)
    for name, prepared in (("evaluation", whole), ("centre", cut)):
        graphs[name] = _evaluation(decoding.eval_inputs(encoded, prepared, widths, heights), squashed, prepared)
    consumed = {"training": whole(images), "evaluation": whole(images), "centre": cut(images)}
    found: list[dict[str, tuple[float, float]]] = [{} for _ in images]
    for path, graph in graphs.items():
        shown = torch.from_dlpack(graph.run()[0].as_tensor()).clone()
        levels = ((shown - consumed[path]).abs() * 255).numpy()
        for row, level in enumerate(levels):
            found[row][path] = float(level.mean()), ring_mean(level)
    return list(found)


def _evaluation(inputs: tuple[Any, ...], settings: DataSettings, prepared: Preprocessing) -> Any:
    return decoding.eval_graph(lambda _: inputs, len(inputs[0]), settings, prepared, "cpu", threads=1, device_id=None)


def ring_mean(values: NDArray[np.float32]) -> float:
    """The mean of the outermost pixels of [C, H, W]."""
    inner = values[:, 1:-1, 1:-1]
    return float((values.sum() - inner.sum()) / (values.size - inner.size))


def main() -> None:
    """Print the table; exit 1 if a kind is taken that is not the same everywhere."""
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    rows = table({name: data for name, data in all_kinds().items() if part in name})
    print(*rows, sep="\n")
    failing = [row.name for row in rows if not row.holds]
    taken = [row for row in rows if isinstance(row.facts, ImageFacts)]
    print(f"{len(rows)} kinds, {len(taken)} taken, {len(failing)} of them not the same everywhere")
    sys.exit(bool(failing))


if __name__ == "__main__":
    main()
