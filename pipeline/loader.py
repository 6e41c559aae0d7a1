"""Batches for training and evaluation: which samples, in which order, decoded and augmented.

Optimizer step s uses the positions [s*G, (s+1)*G) of the corpus order, G the global batch; rank r takes the
r-th contiguous slice of them, micro-batch by micro-batch. Nothing else decides what a rank sees, so that
every world size that divides G sees the same samples, and a restart needs to know only the step. (Where a run has
left out windows of the order, step s uses the s-th of the others.)

A sample that cannot be read or decoded never ends a batch: another takes its place (data_prep/bad_samples.py).
"""

import os
import queue
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from cluster.command import log
from data_prep.bad_samples import BadSamples, TooManyBadSamples, too_many
from data_prep.corpus import Corpus
from data_prep.image_check import UnusableImage, check_image
from data_prep.mixture import MixedOrder, Mixture
from data_prep.order import OF_SLOTS, Permutation
from data_prep.shard_cache import PLANNED
from data_prep.target_weights import check_batch_weights
from models.preprocess import Preprocessing
from pipeline import augment, decoding, pixels, workers
from pipeline.corpora import check_cache, shuffle_windows
from pipeline.data_config import DataSettings
from pipeline.workers import Worker

PREFETCH = 2
"""Decoded batches that wait ready for the training loop, beside those inside DALI."""
_SHARDS_AHEAD = 4
"""Shards of an object store that an evaluation fetches before it comes to them."""


@dataclass(frozen=True)
class Batch:
    """B images, on the rank's device, and their labels."""

    images: torch.Tensor
    """float32 [B, 3, S, S], normalised."""
    ids: NDArray[np.int64]
    """[B] samples, numbered through the mixture; of a bad one, the one that took its place."""
    rows: NDArray[np.int64]
    """[K] which image each of the K labels belongs to."""
    classes: NDArray[np.int64]
    """[K]."""
    weights: NDArray[np.float32]
    """[K]."""
    real: int
    """The first `real` images count; the rest only fill a batch of an evaluation."""


@dataclass
class _Contents:
    """What a batch is made of."""

    epochs: NDArray[np.int64]
    """[B] of each sample's part."""
    ids: NDArray[np.int64]
    """[B]."""
    images: list[NDArray[np.uint8]]
    """B, encoded."""
    real: int
    bad: list[int]
    """Samples that were due and could not be shown."""


class _Loader:
    """Runs a DALI graph in a thread of its own and hands over its batches in order.

    Attributes:
        bad: what could not be shown so far, of the batches that were handed over.
    """

    def __init__(
        self,
        corpus: Corpus | Mixture,
        settings: DataSettings,
        worker: Worker,
        size: int,
        count: int,
        backend: decoding.Backend,
    ) -> None:
        self.corpus = Mixture.of(corpus)
        self.settings, self.worker, self.size, self.count, self.backend = settings, worker, size, count, backend
        self.bad = BadSamples(self.corpus)
        self._under_way: dict[int, _Contents] = {}
        self._stream: Any = None

    def _contents(self, batch: int) -> _Contents:
        """Decide on and read what a batch shows."""
        raise NotImplementedError

    def _inputs(self, contents: _Contents) -> tuple[Any, ...]:
        """What the graph is fed for a batch."""
        raise NotImplementedError

    def _graph(self, source: decoding.Source, size: int) -> Any:
        raise NotImplementedError

    def __iter__(self) -> Generator[Batch, None, None]:
        ready: queue.Queue[tuple[Batch, list[int]] | BaseException | None] = queue.Queue(PREFETCH)
        stop = threading.Event()

        def put(item: tuple[Batch, list[int]] | BaseException | None) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def produce() -> None:
            try:
                graph = self._start_at(0)
                for index in range(self.count):
                    if stop.is_set():
                        return
                    while (batch := self._run(graph)) is None:
                        self._find_undecodable(index)
                        graph = self._start_at(index)
                    contents = self._under_way.pop(index)
                    rows, classes, weights = self.corpus.labels_of(contents.ids)
                    if self.corpus.label_kind == "multi":
                        check_batch_weights(self.corpus, contents.ids, rows, classes, weights)
                    made = Batch(self._take(batch, contents), contents.ids, rows, classes, weights, contents.real)
                    if not put((made, contents.bad)):
                        return
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=produce, name="vitforge-loader", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                batch, bad = item
                self.bad.handed_over(bad)
                yield batch
        finally:
            stop.set()
            thread.join(timeout=30)

    def _start_at(self, first: int) -> Any:
        """A graph whose first batch is number `first`."""
        self._under_way.clear()

        def source(turn: int) -> tuple[Any, ...]:
            if first + turn >= self.count:
                raise StopIteration
            contents = self._under_way[first + turn] = self._contents(first + turn)
            return self._inputs(contents)

        return self._graph(source, self.size)

    def _run(self, graph: Any) -> Any | None:
        """DALI's next batch; None if it could not be decoded."""
        try:
            (output,) = graph.run()
        except StopIteration as error:
            raise AssertionError("the graph ended before its last batch") from error
        except RuntimeError as error:
            self._failure = error
            return None
        return output

    def _finish(self, images: torch.Tensor, contents: _Contents) -> torch.Tensor:
        """What is left to do when the images have arrived on the rank's device."""
        return images

    def _take(self, output: Any, contents: _Contents) -> torch.Tensor:
        """DALI's output as a tensor of our own on the rank's device."""
        shared = output.as_tensor()
        device = self.worker.device
        if device.type == "cpu":
            # DALI's dynamic executor writes no other batch into memory that a tensor still holds; a copy would
            # cost a tenth of the whole loading.
            return self._finish(torch.from_dlpack(shared), contents)
        # The copy must be done before DALI goes on, and must not wait behind the training step on its stream.
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(self._stream):
            images = self._finish(torch.from_dlpack(shared).to(device, copy=True), contents)
        self._stream.synchronize()
        images.record_stream(torch.cuda.default_stream(device))
        return images

    def _find_undecodable(self, batch: int) -> None:
        """Mark the samples for which DALI failed a batch: it does so as a whole, without naming them.

        Every image is decoded alone, so that whether it is bad depends on itself and not on the batch it came in.

        Raises:
            RuntimeError: all of them decode, so the failure is not one of the images.
        """
        contents = self._contents(batch)
        failing = self._failing(contents)
        if not failing:
            raise self._failure
        for place in failing:
            sample = int(contents.ids[place])
            self.bad.mark(sample, f"does not decode: {_why(contents.images[place])}")
            log.warning("%s does not decode: %s", self.corpus.describe(sample), _why(contents.images[place]))

    def _failing(self, contents: _Contents) -> list[int]:
        """The places of a batch whose images fail when they are decoded alone."""
        failing, place, number = [], 0, len(contents.ids)
        while place < number:
            graph = self._graph(self._one_by_one(contents, place), 1)
            while place < number and self._run(graph) is not None:
                place += 1
            if place < number:
                failing.append(place)
                place += 1  # a graph that has failed is of no more use
        return failing

    def _one_by_one(self, contents: _Contents, first: int) -> decoding.Source:
        def source(turn: int) -> tuple[Any, ...]:
            if first + turn >= len(contents.ids):
                raise StopIteration
            return self._inputs(_one_of(contents, first + turn))

        return source


def _one_of(contents: _Contents, place: int) -> _Contents:
    here = slice(place, place + 1)
    return _Contents(contents.epochs[here], contents.ids[here], contents.images[here], 1, [])


def _why(image: NDArray[np.uint8]) -> str:
    try:
        check_image(image.tobytes())
    except UnusableImage as reason:
        return str(reason)
    return "DALI cannot, though other libraries can"


def window_of(step: int, skipped: Sequence[int]) -> int:
    """The window of the order that a step uses (both counted from 0) when some windows are left out."""
    for window in sorted(skipped):
        step += window <= step
    return step


class TrainLoader(_Loader):
    """The micro-batches of one rank for the optimizer steps [start, stop).

    Args:
        corpus: one, or several mixed.
        global_batch: images an optimizer step, over all ranks.
        micro_batch: images a batch of this loader; divides global_batch / world size.
        skipped: windows of the order (of global_batch positions each) that no step uses.
    """

    def __init__(
        self,
        corpus: Corpus | Mixture,
        settings: DataSettings,
        seed: int,
        worker: Worker,
        global_batch: int,
        micro_batch: int,
        start: int,
        stop: int,
        backend: decoding.Backend,
        skipped: Sequence[int] = (),
    ) -> None:
        share = global_batch // worker.world_size
        assert share * worker.world_size == global_batch
        assert share % micro_batch == 0
        super().__init__(corpus, settings, worker, micro_batch, (stop - start) * (share // micro_batch), backend)
        self.seed, self.global_batch, self.start, self.share = seed, global_batch, start, share
        self.skipped = list(skipped)
        self.windows = shuffle_windows(self.corpus, settings)
        check_cache(self.corpus, self.windows)
        self.order = MixedOrder(self.corpus, seed, self.windows)
        # A mixture's parts take turns: where images are mixed with their neighbours, at 1:1 none would ever meet one of
        # its own part.
        self._permutes = settings.rules >= 2 and settings.augment.mixes and len(self.corpus.parts) > 1
        self._reached: list[tuple[int, int] | None] = [None] * len(self.windows)

    def positions(self, batch: int) -> NDArray[np.int64]:
        """[micro_batch] global positions of one of this loader's batches."""
        window, micro = self._window(batch), batch % (self.share // self.size)
        first = self.worker.rank * self.share + micro * self.size
        slots = np.arange(first, first + self.size, dtype=np.int64)
        if self._permutes:
            slots = Permutation(self.global_batch, self.seed, use=OF_SLOTS, part=window)(slots)
        return window * self.global_batch + slots

    def _window(self, batch: int) -> int:
        return window_of(self.start + batch // (self.share // self.size), self.skipped)

    def _reach(self, batch: int) -> tuple[int, int]:
        """The first and the last position that a batch may show."""
        if self._permutes:
            first = self._window(batch) * self.global_batch
            return first, first + self.global_batch - 1
        positions = self.positions(batch)
        return int(positions[0]), int(positions[-1])

    def _look_ahead(self, batch: int) -> None:
        """When a part comes to another window, say which shards it will need from now on."""
        position = self._reach(batch)[0]
        for part, window in enumerate(self.windows):
            if window and (reached := self.order.window_at(part, position)) != self._reached[part]:
                self._reached[part] = reached
                count = max(2 * window, min(PLANNED, 2 * len(self.corpus.parts[part].shard_sizes)))
                last = self._reach(self.count - 1)[1]
                shards = self.order.shards_from(part, position, last, count)
                self.corpus.parts[part].prefetch(shards, ahead=2 * window)

    def _contents(self, batch: int) -> _Contents:
        self._look_ahead(batch)
        epochs, ids = self.order.ids(self.positions(batch))
        images, bad = [], []
        for place, image in enumerate(self.bad.read(ids)):
            if image is None:
                bad.append(int(ids[place]))
                ids[place], image = self.bad.substitute(bad[-1], self.seed)
            images.append(image)
        return _Contents(epochs, ids, images, self.size, bad)

    def _inputs(self, contents: _Contents) -> tuple[Any, ...]:
        widths, heights = self.corpus.image_sizes(contents.ids)
        draws = augment.draw(
            self.settings.augment, self.seed, contents.epochs, contents.ids, widths, heights, self.settings.rules
        )
        return decoding.train_inputs(contents.images, draws)

    def _finish(self, images: torch.Tensor, contents: _Contents) -> torch.Tensor:
        return pixels.finish(images, self.settings, self.seed, contents.epochs, contents.ids)

    def _graph(self, source: decoding.Source, size: int) -> Any:
        threads, device = _threads(self.settings, self.worker), self.worker.dali_device(self.backend)
        return decoding.train_graph(source, size, self.settings, self.backend, threads, device)


class EvalLoader(_Loader):
    """Every sample of a corpus exactly once over all ranks, prepared as a consumer prepares it.

    Every rank gets the same number of batches, since collectives wait for all; where its samples run out, or one is
    bad, another fills the place and is not counted (`Batch.real`).

    Args:
        prepared: how images are prepared; by default as the settings say.
    """

    def __init__(
        self,
        corpus: Corpus | Mixture,
        settings: DataSettings,
        worker: Worker,
        batch: int,
        backend: decoding.Backend,
        prepared: Preprocessing | None = None,
    ) -> None:
        share = -(-corpus.num_samples // worker.world_size)
        super().__init__(corpus, settings, worker, batch, -(-share // batch), backend)
        self.first = min(worker.rank * share, corpus.num_samples)
        self.last = min(self.first + share, corpus.num_samples)
        assert len(self.corpus.parts) == 1
        self.prepared = prepared or decoding.preprocessing_of(settings)
        self._shard = -1

    def __iter__(self) -> Generator[Batch, None, None]:
        try:
            yield from super().__iter__()
        finally:
            self.corpus.parts[0].prefetch([], ahead=0)  # training needs the room again
            self._shard = -1

    def _look_ahead(self, ids: NDArray[np.int64]) -> None:
        if ids.size:
            now, last = self.corpus.shards_of([ids[0], self.last - 1]).tolist()
            if now != self._shard:
                self._shard = now
                self.corpus.parts[0].prefetch(range(now, last + 1), ahead=_SHARDS_AHEAD)

    def _contents(self, batch: int) -> _Contents:
        wanted = np.arange(self.first + batch * self.size, self.first + (batch + 1) * self.size, dtype=np.int64)
        wanted = wanted[wanted < self.last]
        self._look_ahead(wanted)
        read = list(zip(wanted.tolist(), self.bad.read(wanted), strict=True))
        shown = [(sample, image) for sample, image in read if image is not None]
        bad = [sample for sample, image in read if image is None]
        real = len(shown)
        if not shown:
            shown = [self.bad.readable(bad[0] if bad else max(self.last - 1, 0), seed=0)]
        shown += [shown[-1]] * (self.size - len(shown))
        ids = np.array([sample for sample, _ in shown], np.int64)
        return _Contents(np.zeros_like(ids), ids, [image for _, image in shown], real, bad)

    def _inputs(self, contents: _Contents) -> tuple[Any, ...]:
        return decoding.eval_inputs(contents.images, self.prepared, *self.corpus.image_sizes(contents.ids))

    def _graph(self, source: decoding.Source, size: int) -> Any:
        threads, device = _threads(self.settings, self.worker), self.worker.dali_device(self.backend)
        return decoding.eval_graph(source, size, self.settings, self.prepared, self.backend, threads, device)


def check_bad(loader: _Loader, read: int, share: float) -> int:
    """Bad samples of all ranks' loaders so far, of `read` that were due; all ranks call it.

    Raises:
        CorpusError: on every rank, if they are more than that share (data_prep/bad_samples.py); names them.
    """
    bad = torch.tensor(loader.bad.count, device=loader.worker.device)
    if dist.is_initialized():
        dist.all_reduce(bad)
    number = int(bad)
    if too_many(number, read, share):
        described = [text for texts in workers.from_all(loader.bad.described) for text in texts]
        raise TooManyBadSamples(number, read, share, described)
    return number


def _threads(settings: DataSettings, worker: Worker) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return settings.decode_threads or max(1, min(16, cores // worker.local_world_size))
