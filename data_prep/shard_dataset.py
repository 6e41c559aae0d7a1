"""Shards a Ray Dataset: what Ray Data reads, or a program makes, becomes a corpus."""

from dataclasses import replace
from typing import Any

from cluster.command import absolute_path, log
from cluster.folders import folder_at
from cluster.ray_runtime import ray_session
from data_prep.corpus import Corpus
from data_prep.corpus_format import MANIFEST, CorpusError
from data_prep.corpus_jobs import LAID_DOWN, LAID_DOWN_FILES, check_working_folders, held
from data_prep.embedded_images import lay_down_dataset, list_laid_down
from data_prep.listing import Listing, SourceError
from data_prep.shard import ShardSettings, check_settings, shard_listing
from data_prep.source_settings import label_options
from data_prep.table_format import Columns


def shard_dataset(
    dataset: Any,
    destination: str,
    *,
    image: str = "image",
    label: str = "label",
    weight: str | None = None,
    name: str | None = None,
    classes: list[str] | None = None,
    **settings: Any,
) -> Corpus:
    """Shard a Ray Dataset into a corpus, or finish doing so; returns it opened.

    The images are copied to DESTINATION/images first, as a dataset cannot be read at random places. Called again after
    an interruption, it goes on from there: it does not look whether the dataset is still the same one. What a
    SourceError has refused is copied again.

    Args:
        dataset: a ray.data.Dataset.
        destination: folder of the corpus.
        image: column with the encoded images, binary or a struct that has `bytes`.
        label: column with a label, text or a number, or a list of labels.
        weight: column with the weight of the label, or a list of weights.
        name: column that tells one image from another, for `origin`; without it the checksum of the content does.
        classes: names, where the labels are numbers.
        settings: of ShardSettings, such as shard_mb, seed, max_failures.

    Raises:
        SourceError: a column is not there or of another type, or there is no image.
        CorpusError: the destination holds something else, or has too little room.
        SettingsError: a setting that nothing reads, or that does not go with another.
        LeaseError: another job works in the destination.
    """
    folder = folder_at(absolute_path(destination, "destination"), "destination")
    laid_down = folder.child(LAID_DOWN)
    chosen = ShardSettings(source="a Ray Dataset", destination=destination, **settings)
    check_settings(chosen)

    def listed() -> Listing:
        options = label_options(chosen)
        if weight:
            options = replace(options, labels_per_image="many")
        one = "" if chosen.label_columns else label
        columns = Columns(name, one, weight, image, chosen.label_columns, options.cells, options.no_label)
        parts = lay_down_dataset(dataset, columns, laid_down)
        return list_laid_down(laid_down, parts, chosen.source, columns, classes, options)

    with held(folder):
        check_working_folders(folder)
        if folder.size(MANIFEST) is not None and not chosen.append:
            corpus = Corpus.open(folder)
            if corpus.manifest["created_by"]["source"] != chosen.source:
                raise CorpusError(f"destination {folder} holds another corpus: give another folder, or remove that one")
            log.info("%s is finished already (%s images): nothing to do", folder, f"{corpus.num_samples:,}")
            return corpus
        with ray_session():
            try:
                return shard_listing(listed, folder, chosen)
            except SourceError:  # what comes next may be another dataset, in which that is repaired
                laid_down.remove_tree(LAID_DOWN_FILES)
                raise
