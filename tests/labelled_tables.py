"""Small tables of images with labels, and what sharding makes of them, listed in this process."""

from pathlib import Path
from typing import Any

import pandas

from cluster.folders import LocalFolder
from cluster.settings import parse_command
from data_prep import embedded_images
from data_prep.columns import Labels
from data_prep.listing import Listing
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.table_files import ColumnNames, class_names_of, columns_of, table_files
from data_prep.table_labels import LabelOptions
from tests.corpora import encoded


def image_files(root: Path) -> Path:
    """Writes a/0.jpg to a/11.jpg."""
    (root / "a").mkdir()
    for number in range(12):
        (root / "a" / f"{number}.jpg").write_bytes(encoded(number, (16, 16)))
    return root


def listed(source: Path, *words: str) -> Listing:
    """As a command line says it."""
    settings = parse_command(
        SourceSettings, prog="x", description="", positionals=("source",), argv=[str(source), *words]
    )
    return list_source(settings)


def labels_of(listing: Listing) -> dict[str, list[str]]:
    """Names of the labels of each image."""
    found = {}
    for row in range(len(listing)):
        numbers = listing.labels[row]["class"] if isinstance(listing.labels, Labels) else [listing.labels[row]]
        found[listing.names[row].decode()] = [listing.classes[int(number)] for number in numbers]
    return found


def csv(folder: Path, *labels: str, column: str = "label") -> Path:
    """A table of a/0.jpg, a/1.jpg, ..., each with its label."""
    path = folder / "table.csv"
    rows = [[f"a/{number}.jpg", label] for number, label in enumerate(labels)]
    path.write_text(pandas.DataFrame(rows, columns=["path", column]).to_csv(index=False))
    return path


def images(folder: Path, form: str, paths: list[str]) -> dict[str, Any]:
    """A column of images, where these stand in the table."""
    return {"image": [(folder / path).read_bytes() for path in paths]} if form == "images" else {}


def embedded(folder: Path, *words: str) -> Listing:
    """What sharding makes of table.parquet, in this process."""
    settings = parse_command(SourceSettings, prog="x", description="", positionals=("source",), argv=["x", *words])
    (file,) = table_files(LocalFolder(folder), "table.parquet")
    columns = columns_of([file], ColumnNames(indicators=settings.label_columns, unset=settings.no_label))
    laid_down = LocalFolder(folder / "laid")
    embedded_images._lay_down_file(embedded_images._FileTask(file, laid_down, "0", columns, ""))
    options = LabelOptions(settings.labels_per_image, no_label=settings.no_label, weight_scale=settings.weight_scale)
    return embedded_images.list_laid_down(laid_down, ["0"], str(file), columns, class_names_of(file, columns), options)
