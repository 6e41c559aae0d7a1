"""Pictures of a corpus: a contact sheet of some of its images, and its histograms."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cluster import storage
from cluster.redact import printable
from data_prep.corpus import Corpus
from data_prep.distributions import Distribution
from data_prep.image_pixels import open_upright
from data_prep.mixture import Mixture

_CELL = 160
"""Pixels of a thumbnail's longer side."""
_GAP, _LINE, _TITLE = 10, 15, 30
_INK, _PAPER, _ALARM = "#202020", "#ffffff", "#b00020"


def draw_contact_sheet(corpus: Corpus | Mixture, ids: ArrayLike, title: str, path: Path) -> list[str]:
    """Draw samples (int64 [B], at least one) with class, size and sample id under each, as a PNG written atomically.

    Returns:
        What could not be decoded: "sample 17 (its origin): reason" each. Its place on the sheet says so too.

    Raises:
        CorpusError: the bytes of an image are not those that were written.
    """
    which = np.asarray(ids, np.int64).reshape(-1)
    columns = min(len(which), max(4, math.ceil(math.sqrt(1.3 * len(which)))))
    rows = -(-len(which) // columns)
    height = _TITLE + rows * (_CELL + 2 * _LINE + _GAP)
    sheet = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, height), _PAPER)
    draw, font, small = ImageDraw.Draw(sheet), _font(12), _font(10)
    draw.text((_GAP, 8), _fitting(title, font, sheet.width - 2 * _GAP), _INK, font)
    failures = []
    mixture = Mixture.of(corpus)
    columns_of = zip(which.tolist(), _class_names(mixture, which), *mixture.image_sizes(which), strict=True)
    for place, (sample, label, width, high) in enumerate(columns_of):
        left = _GAP + place % columns * (_CELL + _GAP)
        top = _TITLE + place // columns * (_CELL + 2 * _LINE + _GAP)
        content = mixture.read([sample])[0].tobytes()
        try:
            picture = _thumbnail(content)
            sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            failures.append(f"sample {sample} ({mixture.origin(sample)}): {error}")
            draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), outline=_ALARM)
            draw.text((left + 8, top + _CELL // 2 - 6), "cannot be decoded", _ALARM, font)
        draw.text((left, top + _CELL + 1), _fitting(label, font, _CELL), _INK, font)
        facts = f"#{sample}  {width}x{high}  {len(content) / 1000:,.1f} kB"
        draw.text((left, top + _CELL + _LINE + 1), _fitting(facts, small, _CELL), "#707070", small)
    _write_png(sheet, path)
    return failures


def draw_histograms(corpus: Corpus, distributions: Sequence[Distribution], path: Path) -> None:
    """Draw how the images are spread over classes, and each distribution, as a PNG written atomically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 1 + len(distributions), figsize=(4.2 * (1 + len(distributions)), 3.4))
    counts = np.sort(corpus.class_counts)[::-1]
    axes[0].fill_between(np.arange(len(counts) + 1), np.append(counts, counts[-1]), step="post", linewidth=0)
    axes[0].set_title("images of each class", fontsize=10)
    axes[0].set_xlabel("classes, the largest first", fontsize=9)
    if counts[0] > 20 * max(counts[-1], 1):
        axes[0].set_yscale("log")
        axes[0].set_ylim(0.7, 1.5 * counts[0])  # classes without an image lie below
    else:
        axes[0].set_ylim(0, 1.05 * counts[0])
    for axis, distribution in zip(axes[1:], distributions, strict=True):
        bars = distribution.bars(most=40)
        unit = distribution.unit
        if bars[0].low == bars[0].high:  # single values
            axis.bar([f"{bar.low:g}" for bar in bars], [bar.images for bar in bars])
        else:
            width = distribution.bar_width(most=40)
            lows = [bars[0].high - width, *(bar.low for bar in bars[1:])]
            axis.bar(lows, [bar.images for bar in bars], width, align="edge")
            unit += " (the outermost bars hold the rest)"
        axis.set_title(distribution.name, fontsize=10)
        axis.set_xlabel(unit.strip(), fontsize=9)
        axis.set_ylabel("images", fontsize=9)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, axis="y")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    pyplot.close(figure)
    storage.write_bytes(path, buffer.getvalue())


def _class_names(corpus: Mixture, ids: np.ndarray) -> list[str]:
    """The (heaviest) class of each sample as people call it, and how many more it has."""
    rows, classes, weights = corpus.labels_of(ids)
    found = []
    for place in range(len(ids)):
        own = np.flatnonzero((rows == place) & (classes >= 0))
        if len(own) == 0:
            found.append("no label")
            continue
        heaviest = corpus.names[classes[own[np.argmax(weights[own])]]]
        found.append(heaviest + (f" +{len(own) - 1}" if len(own) > 1 else ""))
    return found


def _thumbnail(data: bytes) -> Image.Image:
    # a JPEG of many megapixels is decoded at a fraction of its size
    shown = open_upright(data, shrink_to=2 * _CELL)
    return ImageOps.contain(shown.convert("RGB"), (_CELL, _CELL), Image.Resampling.BICUBIC)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has Latin, Greek and Cyrillic letters."""
    import matplotlib

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of a text as fits in a width, in pixels."""
    text = printable(" ".join(text.split()))
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip(" ,") + "…"


def _write_png(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    storage.write_bytes(path, buffer.getvalue())
