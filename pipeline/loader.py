"""Batches for training and evaluation: which samples, in which order, decoded and augmented.

Optimizer step s uses the positions [s*G, (s+1)*G) of the corpus order, G the global batch; rank r takes the
r-th contiguous slice of them, micro-batch by micro-batch. Nothing else decides what a rank sees, so that
every world size that divides G sees the same samples, and a restart needs to know only the step.
"""

import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.corpus import Corpus
from data_prep.order import SampleOrder
from pipeline import augment, decoding, pixels
from pipeline.config import DataSettings
from pipeline.workers import Worker

PREFETCH = 2
"""Decoded batches that wait ready for the training loop, beside those inside DALI."""


@dataclass(frozen=True)
class Batch:
    """B images, on the rank's device, and their labels."""

    images: torch.Tensor
    """float32 [B, 3, S, S], normalised."""
    ids: NDArray[np.int64]
    """[B] sample ids in the corpus."""
    rows: NDArray[np.int64]
    """[K] which image each of the K labels belongs to."""
    classes: NDArray[np.int64]
    """[K]."""
    weights: NDArray[np.float32]
    """[K]."""
    real: int
    """The first `real` images count; the rest only fill the last batch of an evaluation."""


class UndecodableError(ValueError):
    """DALI could not decode a batch; the message names the samples that are damaged."""


class _Loader:
    """Runs a DALI graph in a thread of its own and hands over its batches in order."""

    def __init__(self, corpus: Corpus, worker: Worker, count: int) -> None:
        self.corpus, self.worker, self.count = corpus, worker, count
        self._stream: Any = None

    def _ids(self, batch: int) -> NDArray[np.int64]:
        raise NotImplementedError

    def _graph(self) -> Any:
        raise NotImplementedError

    def _real(self, batch: int) -> int:
        raise NotImplementedError

    def _source(self, inputs: Callable[[int], tuple[Any, ...]]) -> decoding.Source:
        def source(batch: int) -> tuple[Any, ...]:
            if batch >= self.count:
                raise StopIteration
            return inputs(batch)

        return source

    def __iter__(self) -> Generator[Batch, None, None]:
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCH)
        stop = threading.Event()

        def put(item: Batch | BaseException | None) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def produce() -> None:
            try:
                graph = self._graph()
                for index in range(self.count):
                    if stop.is_set() or not put(self._next(graph, index)):
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
                yield item
        finally:
            stop.set()
            thread.join(timeout=30)

    def _next(self, graph: Any, index: int) -> Batch:
        try:
            (output,) = graph.run()
        except StopIteration as error:
            raise AssertionError("the graph ended before its last batch") from error
        except RuntimeError as error:
            raise self._explain(index, error) from error
        images = self._take(output, index)
        ids = self._ids(index)
        rows, classes, weights = self.corpus.labels_of(ids)
        return Batch(images, ids, rows, classes, weights, self._real(index))

    def _finish(self, images: torch.Tensor, batch: int) -> torch.Tensor:
        """What is left to do when the images have arrived on the rank's device."""
        return images

    def _take(self, output: Any, batch: int) -> torch.Tensor:
        """DALI's output as a tensor of our own on the rank's device."""
        shared = output.as_tensor()
        device = self.worker.device
        if device.type == "cpu":
            # DALI's dynamic executor writes no other batch into memory that a tensor still holds; a copy would
            # cost a tenth of the whole loading.
            return self._finish(torch.from_dlpack(shared), batch)
        # The copy must be done before DALI goes on, and must not wait behind the training step on its stream.
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(self._stream):
            images = self._finish(torch.from_dlpack(shared).to(device, copy=True), batch)
        self._stream.synchronize()
        images.record_stream(torch.cuda.default_stream(device))
        return images

    def _explain(self, index: int, error: RuntimeError) -> Exception:
        """Find the damaged samples: DALI fails a batch as a whole, up to its own prefetch behind the one it was fed."""
        from data_prep.image_check import UnusableImage, check_image

        found = []
        for batch in range(index, min(index + 4, self.count)):
            for sample in self._ids(batch).tolist():
                try:
                    check_image(self.corpus.read([sample])[0].tobytes())
                except UnusableImage as reason:
                    found.append(f"sample {sample} ({self.corpus.origin(sample)}): {reason}")
        if not found:
            return error
        return UndecodableError(
            f"corpus {self.corpus} holds images that do not decode: {'; '.join(found)}. "
            "Shard the source again: images that fail are then left out and listed"
        )


class TrainLoader(_Loader):
    """The micro-batches of one rank for the optimizer steps [start, stop).

    Args:
        global_batch: images an optimizer step, over all ranks.
        micro_batch: images a batch of this loader; divides global_batch / world size.
        skipped: windows of the order (of global_batch positions each) that no step uses.
    """

    def __init__(
        self,
        corpus: Corpus,
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
        super().__init__(corpus, worker, (stop - start) * (share // micro_batch))
        self.settings, self.seed, self.backend = settings, seed, backend
        self.global_batch, self.micro_batch, self.start, self.share = global_batch, micro_batch, start, share
        self.skipped = sorted(skipped)
        self.order = SampleOrder(corpus.num_samples, seed, corpus.shard_sizes, settings.shuffle_window)

    def positions(self, batch: int) -> NDArray[np.int64]:
        """[micro_batch] global positions of one of this loader's batches."""
        step, micro = divmod(batch, self.share // self.micro_batch)
        window = self.start + step
        for left_out in self.skipped:
            window += left_out <= window
        first = window * self.global_batch + self.worker.rank * self.share + micro * self.micro_batch
        return np.arange(first, first + self.micro_batch, dtype=np.int64)

    def _ids(self, batch: int) -> NDArray[np.int64]:
        return self.order.ids(self.positions(batch))[1]

    def _real(self, batch: int) -> int:
        return self.micro_batch

    def _inputs(self, batch: int) -> tuple[Any, ...]:
        epochs, ids = self.order.ids(self.positions(batch))
        rows = self.corpus.index[ids]
        widths, heights = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
        draws = augment.draw(self.settings.augment, self.seed, epochs, ids, widths, heights)
        return decoding.train_inputs(self.corpus.read(ids), draws)

    def _finish(self, images: torch.Tensor, batch: int) -> torch.Tensor:
        epochs, ids = self.order.ids(self.positions(batch))
        return pixels.finish(images, self.settings, self.seed, epochs, ids)

    def _graph(self) -> Any:
        return decoding.train_graph(
            self._source(self._inputs),
            self.micro_batch,
            self.settings,
            self.backend,
            _threads(self.settings, self.worker),
            self.worker.dali_device(self.backend),
        )


class EvalLoader(_Loader):
    """Every sample of a corpus exactly once over all ranks, prepared as a consumer prepares it.

    Every rank gets the same number of batches, since collectives wait for all; where its samples run out, the
    last one is repeated and not counted (`Batch.real`).
    """

    def __init__(
        self, corpus: Corpus, settings: DataSettings, worker: Worker, batch: int, backend: decoding.Backend
    ) -> None:
        share = -(-corpus.num_samples // worker.world_size)
        super().__init__(corpus, worker, -(-share // batch))
        self.settings, self.batch, self.backend = settings, batch, backend
        self.first = min(worker.rank * share, corpus.num_samples)
        self.last = min(self.first + share, corpus.num_samples)

    def _ids(self, batch: int) -> NDArray[np.int64]:
        wanted = np.arange(self.first + batch * self.batch, self.first + (batch + 1) * self.batch, dtype=np.int64)
        return np.minimum(wanted, max(self.last - 1, 0))

    def _real(self, batch: int) -> int:
        return int(np.clip(self.last - (self.first + batch * self.batch), 0, self.batch))

    def _inputs(self, batch: int) -> tuple[Any, ...]:
        return (self.corpus.read(self._ids(batch)),)

    def _graph(self) -> Any:
        return decoding.eval_graph(
            self._source(self._inputs),
            self.batch,
            self.settings,
            self.backend,
            _threads(self.settings, self.worker),
            self.worker.dali_device(self.backend),
        )


def _threads(settings: DataSettings, worker: Worker) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return settings.decode_threads or max(1, min(16, cores // worker.local_world_size))
