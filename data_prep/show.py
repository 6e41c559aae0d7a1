"""What is in a corpus, in words and pictures: `python data_prep/show.py CORPUS [KEY=VALUE ...]`."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds

import numpy as np
from pydantic import Field

from cluster import storage
from cluster.command import absolute_path, home_path, log, run_command
from cluster.redact import printable
from cluster.settings import Settings, parse_command
from data_prep.contact_sheet import draw_contact_sheet, draw_histograms
from data_prep.corpus import Corpus
from data_prep.corpus_format import QUARANTINE
from data_prep.distributions import Bar, Distribution, measure
from data_prep.order import Permutation
from data_prep.removed import REMOVED, removed_in_words

DESCRIPTION = """
Show what is in a corpus: classes and how many images each has, sizes and resolutions, shards, what was left out and
why. Draws a contact sheet of randomly chosen images with their classes, OUTPUT/NAME-images.png, and the histograms,
OUTPUT/NAME-histograms.png, where NAME is that of the corpus's folder. Nothing is written into the corpus.

example:
  python data_prep/show.py /data/corpora/in21k output=/tmp/looks images=96
"""

_BAR = 40
"""Characters of the longest bar."""
_REASONS = 10


class ShowSettings(Settings):
    """Settings of showing a corpus."""

    corpus: str
    """Folder of the corpus; may be on S3 (s3://BUCKET/FOLDER)."""
    output: str = ""
    """Folder for the pictures; made if it is not there. Empty: show/NAME-HASH in $VITFORGE_HOME, else in ~/vitforge,
    with the beginning of the corpus's hash, so that no other corpus writes there."""
    images: int = Field(48, ge=1, le=1000)
    """Images on the contact sheet."""
    classes: int = Field(10, ge=1)
    """How many of the classes with the most images, and of those with the fewest, are listed."""
    seed: int = Field(0, ge=0)
    """Of the choice of images for the contact sheet."""


def main() -> None:
    """The command."""
    settings = parse_command(ShowSettings, prog="data_prep/show.py", description=DESCRIPTION, positionals=("corpus",))
    wanted = absolute_path(settings.output, "output") if settings.output else home_path()
    folder = storage.local_path(wanted, "output" if settings.output else "VITFORGE_HOME")
    corpus = Corpus.open(absolute_path(settings.corpus, "corpus"))
    output = folder if settings.output else folder / "show" / f"{corpus.name}-{corpus.corpus_hash[:8]}"
    distributions = measure(corpus)
    for line in describe(corpus, distributions, settings.classes):
        print(printable(line))
    sys.stdout.flush()
    for path in draw(corpus, distributions, output, settings.images, settings.seed):
        print(printable(f"drew {path}"))


def draw(corpus: Corpus, distributions: Sequence[Distribution], output: Path, images: int, seed: int) -> list[Path]:
    """Draw the contact sheet and the histograms into a folder; returns their paths.

    Raises:
        CorpusError: a chosen image is damaged.
        StorageError: the folder cannot be written.
    """
    name = corpus.name
    sheet, histograms = output / f"{name}-images.png", output / f"{name}-histograms.png"
    count = min(images, corpus.num_samples)
    chosen = Permutation(corpus.num_samples, seed)(np.arange(count))
    ids = chosen[np.lexsort((chosen, corpus.index["label"][chosen]))]  # images of a class beside each other
    title = f"{name}: {count} of {corpus.num_samples:,} images, seed {seed}, corpus hash {corpus.corpus_hash[:12]}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        for failure in draw_contact_sheet(corpus, ids, title, sheet):
            log.warning("cannot be decoded: %s", failure)
        draw_histograms(corpus, distributions, histograms)
    except OSError as error:
        raise storage.StorageError(f"output {output} cannot be written: {error}") from error
    return [sheet, histograms]


def describe(corpus: Corpus, distributions: Sequence[Distribution], classes: int) -> Iterator[str]:
    """What is in a corpus, line by line; `classes` of the largest and as many of the smallest classes are listed."""
    manifest = corpus.manifest
    kind = "one class an image" if corpus.label_kind == "single" else "many weighted labels an image"
    yield f"{corpus}: {corpus.num_samples:,} images of {len(corpus.classes):,} classes ({kind})"
    sizes = [shard["bytes"] for shard in manifest["shards"]]
    yield (
        f"{len(sizes):,} shards, {_size(sum(sizes))} ({_size(min(sizes))} to {_size(max(sizes))} each), "
        f"of which {_size(int(corpus.index['length'].sum(dtype=np.int64)))} are images"
    )
    yield f"made from: {manifest['source']['kind']} {manifest['created_by'].get('source', '')}".rstrip()
    yield f"corpus hash: {corpus.corpus_hash}"
    yield from _left_out(corpus)
    if "removed" in manifest:
        yield f"{removed_in_words(manifest['removed'])}; listed in {corpus}/{corpus.file_name(REMOVED)}"
    yield ""
    yield from _classes(corpus, classes)
    for distribution in distributions:
        low, middle, high = (_number(distribution, distribution.quantile(share)) for share in (0, 0.5, 1))
        unit = f" {distribution.unit}" if distribution.unit else ""
        yield ""
        yield f"{distribution.name}: {low} to {high}{unit}, median {middle}"
        bars = distribution.bars()
        yield from _bars([_range(distribution, bar) for bar in bars], [bar.images for bar in bars])


def _left_out(corpus: Corpus) -> Iterator[str]:
    count = corpus.manifest["quarantined"]
    yield f"left out: {count:,} images" + (f", listed in {corpus}/{corpus.file_name(QUARANTINE)}" if count else "")
    if count:
        reasons = Counter(entry["reason"] for entry in corpus.quarantined())
        for reason, number in reasons.most_common(_REASONS):
            yield f"  {number:,} x {reason}"
        if len(reasons) > _REASONS:
            rest = sum(number for _, number in reasons.most_common()[_REASONS:])
            yield f"  {rest:,} for {len(reasons) - _REASONS} other reasons"


def _classes(corpus: Corpus, shown: int) -> Iterator[str]:
    counts = np.array(corpus.class_counts)
    order = np.argsort(-counts, kind="stable")
    yield (
        f"images of a class: {counts.min():,} to {counts.max():,}, median {np.median(counts):,.0f}; "
        f"{np.count_nonzero(counts == 0):,} classes without any"
    )
    names = corpus.classes
    if corpus.class_descriptions is not None:
        pairs = zip(names, corpus.class_descriptions, strict=True)
        names = [name if name == text else f"{name} {text}" for name, text in pairs]
    if len(order) <= 2 * shown:
        yield from _bars([names[number] for number in order], counts[order].tolist())
        return
    texts = [names[number] for number in (*order[:shown], *order[-shown:])]
    lines = list(_bars(texts, counts[[*order[:shown], *order[-shown:]]].tolist()))
    yield from lines[:shown]
    yield f"  ... {len(order) - 2 * shown:,} more classes ..."
    yield from lines[shown:]


def _bars(texts: Sequence[str], counts: Sequence[int]) -> Iterator[str]:
    texts = [text if len(text) <= 36 else text[:35] + "…" for text in texts]
    width, digits = max(map(len, texts)), len(f"{max(counts):,}")
    for text, count in zip(texts, counts, strict=True):
        length = round(_BAR * count / max(*counts, 1))
        bar = "█" * max(length, 1) if count else ""
        yield f"  {text:<{width}}  {count:>{digits},}  {bar}".rstrip()


def _range(distribution: Distribution, bar: Bar) -> str:
    low, high = _number(distribution, bar.low), _number(distribution, bar.high)
    if bar.low == bar.high:
        return low
    if bar.high == float("inf"):
        return f"{low} and more"
    return f"below {high}" if bar.low == 0 else f"{low} to {high}"


def _number(distribution: Distribution, value: float) -> str:
    decimals = {1: 0, 0.1: 1, 0.01: 2}[distribution.step]
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_command(main)
