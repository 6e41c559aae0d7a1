"""Writes what other tools read beside a corpus: `python data_prep/card.py CORPUS`."""

import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds

from cluster.command import absolute_path, log, run_command
from cluster.settings import Settings, parse_command
from data_prep.card_text import (
    card,
    endings_in_words,
    info,
    is_readable_by_others,
    names_of,
    said_in,
    whose_card,
    whose_info,
)
from data_prep.corpus import Corpus
from data_prep.corpus_jobs import held
from data_prep.manifest import read_manifest
from data_prep.sample_table import TABLE, Members, check_table, read_facts, write_table

CARD = "README.md"
INFO = "_info.json"

DESCRIPTION = """
Write beside a corpus what other tools read. The commands that make corpora do it themselves; this is for corpora that
older versions made, and for files that were removed. Nothing is overwritten that a person wrote or changed.

  README.md        a dataset card: datasets.load_dataset(FOLDER) finds the tars and the class names by it
  _info.json       for timm's reader of WebDataset tars
  samples.parquet  key, shard, label, class, width, height and origin of every image, for DuckDB, pandas, polars

example:
  python data_prep/card.py /data/corpora/in21k
"""


class CardSettings(Settings):
    """Settings of writing the dataset card."""

    corpus: str
    """Folder of the corpus, or of a part; may be on S3 (s3://BUCKET/FOLDER)."""


def main() -> None:
    """The command."""
    settings = parse_command(CardSettings, prog="data_prep/card.py", description=DESCRIPTION, positionals=("corpus",))
    corpus = Corpus.open(absolute_path(settings.corpus, "corpus"))
    with held(corpus.folder):
        write_card(corpus)
    log.info("%s has %s", corpus, ", ".join(name for name in (CARD, INFO, TABLE) if corpus.folder.size(name)))


def write_card(corpus: Corpus) -> None:
    """Write the files that are missing or not of this version of a corpus; those of a person stay.

    Args:
        corpus: in a folder that the caller holds; of an older version nothing is written.

    Raises:
        CorpusError: the files beside the shards are damaged.
        StorageError: the folder cannot be written.
    """
    if not _is_newest(corpus):
        return
    facts = read_facts(corpus.folder)
    if facts is not None and facts.manifest_hash == corpus.manifest["corpus_hash"]:
        members = facts.members
    elif facts is None and corpus.folder.size(TABLE) is not None:
        log.warning("%s/%s stays as it is: it was not written by Vitforge", corpus, TABLE)
        return
    else:
        members = write_table(corpus)
        if len(members.images) > 1 and is_readable_by_others(corpus):
            log.info("endings of the images: %s", endings_in_words(members))
    for name, content in _files(corpus, members).items():
        there = _content(corpus, name)
        if there == content:
            continue
        whose = "ours" if there is None else (whose_card if name == CARD else whose_info)(there)
        if whose == "ours":
            corpus.folder.write_bytes(name, content)
        else:
            log.info(
                "%s/%s stays as it is: it was %s",
                corpus, name, "changed by hand" if whose == "edited" else "not written by Vitforge",
            )  # fmt: skip


def check_card(corpus: Corpus) -> Iterator[str]:
    """What of the files beside a corpus is not of it: one line a problem. Corpora may be without them."""
    if not _is_newest(corpus):
        return
    again = f"`python data_prep/card.py {corpus}` writes it anew"
    repair = f"{again} once it is removed"
    facts = read_facts(corpus.folder)
    if facts is None:
        if corpus.folder.size(TABLE) is not None:
            log.warning("%s/%s was not written by Vitforge, and is not looked at", corpus, TABLE)
        members = None
    elif facts.manifest_hash != corpus.manifest["corpus_hash"]:
        yield f"{corpus}/{TABLE} is of another version of the corpus: {again}"
        return
    else:
        yield from (f"{problem}; {repair}" for problem in check_table(corpus))
        members = facts.members
    files = _files(corpus, members) if members is not None else {}
    if (
        (there := _content(corpus, INFO)) is not None
        and whose_info(there) != "other"
        and there != files.get(INFO, there)
    ):
        yield f"{corpus}/{INFO} is not of this corpus; {repair}"
    if (there := _content(corpus, CARD)) is None:
        return
    if whose_card(there) == "ours" and there != files.get(CARD, there):
        yield f"{corpus}/{CARD} is not of this corpus; {repair}"
    elif whose_card(there) == "edited":
        images, names = said_in(there)
        if images not in (None, len(corpus)):
            yield f"{corpus}/{CARD} says that there are {images:,} images, the corpus has {len(corpus):,}; {repair}"
        if names is not None and names != names_of(corpus):
            yield f"{corpus}/{CARD} names other classes than the corpus; {repair}"


def _files(corpus: Corpus, members: Members) -> dict[str, bytes]:
    files = {CARD: card(corpus, members)}
    return files | ({INFO: info(corpus)} if is_readable_by_others(corpus) else {})


def _content(corpus: Corpus, name: str) -> bytes | None:
    return corpus.folder.read_bytes(name) if corpus.folder.size(name) is not None else None


def _is_newest(corpus: Corpus) -> bool:
    return bool(read_manifest(corpus.folder)["corpus_hash"] == corpus.manifest["corpus_hash"])


if __name__ == "__main__":
    run_command(main)
