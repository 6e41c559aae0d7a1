"""Score a registered model on a corpus: top-1, top-5 and loss over every image, each exactly once.

The images are prepared as the model's package says, as any consumer prepares them. The scores are printed, and
written to the MLflow run that made the model as metrics named after the corpus.

example:
  python pipeline/evaluate.py models:/vit-b16@champion /data/imagenet1k-val
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds

import os
import time

import torch

from cluster.command import absolute_path, counted, log, run_command, set_up_logging
from cluster.folders import Folder
from cluster.launch_environment import leads
from cluster.marked_folders import temporary_folder
from cluster.settings import SettingsError, parse_command
from cluster.storage import read_json, write_json
from data_prep.checked_rows import Checks
from data_prep.corpus import Corpus
from data_prep.mixture import Mixture
from data_prep.target_weights import check_weights
from data_prep.tasks import Work, takes_ray
from models.presets import train_flops
from models.vit import VisionTransformer
from models.weights import load_into
from pipeline import decoder_choice, packages, tracking, workers
from pipeline.config import EvaluateSettings
from pipeline.crew import Terms
from pipeline.data_config import DataSettings
from pipeline.launch import run_ranks
from pipeline.loader import EvalLoader, check_bad
from pipeline.scoring import score
from pipeline.stage import home_folder
from pipeline.stopping import Control

_CPU_FLOPS, _GPU_FLOPS = 50e9, 20e12
"""FLOP/s that a forward pass reaches at least."""
_SMALL_S = 20.0
"""Seconds of computing that are less than the start of Ray and of a rank on two busy cores."""


@dataclass(frozen=True)
class Job:
    """What the ranks are told."""

    settings: EvaluateSettings
    model: str
    """The model with its alias resolved."""
    corpora: tuple[Folder, ...]
    """Where the images are. With a folder travels what opens an object store."""
    checks: Checks
    """Of the index of the corpus as the driver saw it."""
    result: str
    """File that rank 0 writes the scores to."""
    tracking_home: str
    tracking_uri: str


def evaluate(job: Job, control: Control) -> bool:
    """Score the model on this rank's share of the corpus; rank 0 writes the scores of all."""
    settings = job.settings
    set_up_logging()
    worker = workers.join(600, settings.interface)
    if not worker.leads:
        log.setLevel("ERROR")
    cache_bytes = round(settings.cache_gb * 1e9)
    corpus = Corpus.open(settings.corpus, check="sizes", cache_bytes=cache_bytes, checks=job.checks)
    tracking.connect(Path(job.tracking_home), job.tracking_uri)
    package = packages.load_package(job.model, quiet=True)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    model = VisionTransformer(package.config)
    load_into(model, package.state)
    model.to(worker.device, dtype)
    data = data_settings(package, settings)
    verdict = decoder_choice.Verdict.for_all(workers.from_all(decoder_choice.choose_backend(data, worker.gpu)))
    backend = verdict.backend
    loader = EvalLoader(corpus, data, worker, settings.batch, backend, package.preprocessing)
    log.info(
        "scoring %s on %s, decoding on %s", counted(corpus.num_samples, "image"), counted(worker.world_size, "rank"),
        backend,
    )  # fmt: skip
    began = time.perf_counter()
    scores = score(model, loader, package.activation, dtype)
    assert scores is not None
    if bad := check_bad(loader, corpus.num_samples, data.max_bad_share):
        what = f"{counted(bad, 'image')} cannot be read or decoded and {'was' if bad == 1 else 'were'} left out"
        log.warning("%s: %s", what, "; ".join(loader.bad.described))
    if worker.leads:
        rate = scores.images / (time.perf_counter() - began)
        write_json(Path(job.result), {**asdict(scores), "images_per_second": rate})
    return True


def data_settings(package: packages.Package, settings: EvaluateSettings) -> DataSettings:
    """Settings of the loader, with what the start-up probe needs to know of the package's preprocessing."""
    prepared = package.preprocessing
    return DataSettings(
        corpus=settings.corpus,
        image_size=prepared.size,
        eval_resize=prepared.resize_to if prepared.resize == "shorter" else None,
        eval_interpolation=prepared.interpolation,
        eval_antialias=prepared.antialias,
        mean=prepared.mean,
        std=prepared.std,
        decode=settings.decode,
        cache_gb=settings.cache_gb,
        max_bad_share=settings.max_bad_share,
    )


def _is_small(settings: EvaluateSettings, package: packages.Package, corpus: Corpus) -> bool:
    """Whether one rank, in this process, scores the corpus in less time than Ray takes to start its ranks twice."""
    if torch.cuda.device_count() > 1:
        return False
    work = Work(corpus.num_samples, corpus.manifest["num_bytes"])
    forward = train_flops(package.config) / 3
    computing = corpus.num_samples * forward / (_GPU_FLOPS if torch.cuda.is_available() else _CPU_FLOPS)
    small = not takes_ray(work, settings.workers or 0) and computing < _SMALL_S
    if small and "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        torch.set_num_threads(os.cpu_count() or 1)  # as a rank under Ray has: the sums are the same to the last digit
    return small


def main() -> None:
    """Read the command line, score, print and record."""
    settings = parse_command(
        EvaluateSettings, prog="pipeline/evaluate.py", description=__doc__ or "", positionals=("model", "corpus")
    )
    corpus = Corpus.open(absolute_path(settings.corpus, "corpus"), cache_bytes=round(settings.cache_gb * 1e9))
    home = home_folder(settings.home, "home")
    uri = tracking.connect(home)
    package = packages.load_package(settings.model)
    names = corpus.names
    if list(package.classes) != names:
        raise SettingsError(
            f"{package.uri} knows {len(package.classes)} classes ({', '.join(package.classes[:3])}, ...), {corpus}"
            f" has {len(names)} ({', '.join(names[:3])}, ...): score it on a corpus with its own classes, or fine-tune "
            "it on this one"
        )
    if package.activation == "softmax" and corpus.label_kind == "multi":
        raise SettingsError(f"{package.uri} gives one class an image (softmax), {corpus} has many labels an image")
    check_weights(Mixture.of(corpus))
    settings = settings.model_copy(update={"corpus": corpus.place})
    with temporary_folder("evaluate", home / "tmp") as scratch:  # every node sees it
        result = str(scratch / "scores.json")
        job = Job(settings, package.uri, (corpus.folder,), corpus.checks, result, str(home), uri)
        run_ranks(
            evaluate,
            job,
            name="evaluate",
            terms=Terms(
                (settings.workers, settings.workers) if settings.workers else None,
                settings.cpus_per_worker,
                settings.max_failures,
                wait_s=settings.wait_s,
                interface=settings.interface,
                section="",
            ),
            check=lambda ranks: None,
            here=_is_small(settings, package, corpus),
        )
        if not leads():
            return
        scores = read_json(Path(job.result))
    print(json.dumps({"model": package.uri, "corpus": corpus.url, **scores}, indent=1), flush=True)

    made_by = package.tags.get("vitforge.mlflow_run")
    if made_by:
        key = f"evaluate/{corpus.name}"
        tracking.add_scores(made_by, {f"{key}/{name}": value for name, value in scores.items()})


if __name__ == "__main__":
    run_command(main)
