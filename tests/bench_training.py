"""The training loop against a plain PyTorch loop on the same model, as a ratio within one run.

    python -m tests.bench_training [CORPUS]

ViT-Ti/16 at 224 pixels, batch 16, one worker, fp32, one thread. Ours is the whole of `pipeline/pretrain.py` with its
engine, schedule, checks, log lines and tracking; whenever it asks for the first batch of a round, the plain loop first
takes a round's steps, with a loader and a model of the same kind, in the same process. What a run does once (start,
checkpoint at the end) lies outside of the rounds.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from data_prep.corpus import Corpus
from models.presets import vit_config
from models.vit import VisionTransformer
from pipeline import pretrain, train_loop
from pipeline.data_config import DataSettings
from pipeline.engine import parameter_groups
from pipeline.loader import Batch, TrainLoader
from pipeline.workers import Worker
from tests.bench_writing import make_images
from tests.benching import Times, cpu_seconds, print_ratio, print_times
from tests.corpora import make_corpus
from tests.running import free_port

ROUNDS = 5
STEPS = 5
"""Steps a round; one log line among them."""
BATCH = 16
WARM_UP = 3

RECIPE = """
model: {{name: Ti/16, representation: false}}
data: {{corpus: {corpus}, decode: cpu, decode_threads: 1, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
optimizer: {{learning_rate: 1e-3, weight_decay: 0.1, warmup: 10 steps, gradient_clipping: 1.0}}
training: {{duration: {steps} steps, global_batch: 16, precision: fp32}}
log: {{every: 5}}
run: {{name: bench, home: {home}}}
"""


def plain_loop(corpus: Corpus) -> Iterator[None]:
    """A training loop as one writes it by hand, each `next` being a step."""
    mean = std = (0.5, 0.5, 0.5)
    settings = DataSettings(corpus=str(corpus.path), mean=mean, std=std, decode="cpu", decode_threads=1)
    loader = TrainLoader(corpus, settings, 1, Worker(), BATCH, BATCH, 0, 10**6, "cpu")
    model = VisionTransformer(vit_config("Ti/16", image_size=224, num_classes=len(corpus.classes)))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)
    for batch in loader:
        loss = F.cross_entropy(model(batch.images), torch.from_numpy(batch.classes))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


class Turns:
    """Takes the time of both loops, round by round."""

    def __init__(self, plain: Iterator[None]) -> None:
        self.plain = plain
        self.times = {"vitforge": Times(), "plain PyTorch loop": Times()}
        self._since: tuple[float, float] | None = None

    def between_rounds(self) -> None:
        """Our loop has just finished a round: let the plain loop take its own."""
        if self._since is not None:
            self._stop("vitforge")
        self._start()
        for _ in range(STEPS):
            next(self.plain)
        self._stop("plain PyTorch loop")
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter(), cpu_seconds()

    def _stop(self, name: str) -> None:
        assert self._since is not None
        self.times[name].wall.append(time.perf_counter() - self._since[0])
        self.times[name].cpu.append(cpu_seconds() - self._since[1])


def bench(corpus: Corpus, scratch: Path) -> None:
    """Run both loops and print a table and the ratio."""
    print(
        f"ViT-Ti/16 at 224 pixels, batch {BATCH}, fp32, one thread; {ROUNDS} rounds of {STEPS} steps each\n", flush=True
    )
    plain = plain_loop(corpus)
    for _ in range(WARM_UP):
        next(plain)
    turns = Turns(plain)

    class LoaderInTurns(TrainLoader):
        def __iter__(self) -> Generator[Batch, None, None]:
            batches = super().__iter__()
            for number in range(self.count):
                if number >= WARM_UP and (number - WARM_UP) % STEPS == 0:
                    turns.between_rounds()
                yield next(batches)

    recipe = scratch / "bench.yaml"
    steps = WARM_UP + ROUNDS * STEPS + 1  # the last one is asked for when the last round is over
    recipe.write_text(RECIPE.format(corpus=corpus.path, home=scratch / "home", steps=steps))
    # one rank, as torchrun would start it, but in this process
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "bench"}
    with (
        mock.patch.dict(os.environ, alone),
        mock.patch.object(sys, "argv", ["pretrain.py", str(recipe)]),
        mock.patch.object(train_loop, "TrainLoader", LoaderInTurns),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),  # its log lines would take the plain loop's time for waiting
    ):
        pretrain.main()
    times = turns.times
    times["plain PyTorch loop"].wall.pop()  # the plain loop begins each round, and one more than ours ends
    times["plain PyTorch loop"].cpu.pop()
    assert len(times["vitforge"].cpu) == len(times["plain PyTorch loop"].cpu) == ROUNDS
    print_times(times, BATCH * STEPS)
    print_ratio(times, "vitforge", "plain PyTorch loop", "target 0.95x")


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if len(sys.argv) > 1:
            bench(Corpus.open(sys.argv[1]), scratch)
            return
        images = scratch / "images"
        images.mkdir()
        make_images(images, 200)
        bench(make_corpus(images, scratch / "corpus", shard_mb=8), scratch)


if __name__ == "__main__":
    main()
