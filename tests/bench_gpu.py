"""Training steps of a large ViT in bf16 on synthetic images: images/s, MFU, peak memory, attention backend.

On a machine with a GPU (one rank a GPU):

    torchrun --nproc-per-node 1 -m tests.bench_gpu            # ViT-H/14, micro-batch 128, eager and compiled
    torchrun --nproc-per-node 1 -m tests.bench_gpu L/16 256 50

Without one it runs a few steps of a tiny model, to show that it works. First come the decoders: what DALI's start-up
probe says of each (the pixels' difference from the CPU's), and how many images a second each makes of JPEGs.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from cluster.command import set_up_logging
from models.losses import softmax_cross_entropy
from models.presets import train_flops, vit_config
from models.vit import VisionTransformer, VitConfig
from pipeline import decoder_choice, decoding, throughput, workers
from pipeline.config import OptimizerSettings
from pipeline.data_config import AugmentSettings, DataSettings
from pipeline.engine import build_engine, prepare_deepspeed, reduce_and_update, set_learning_rate
from pipeline.layout import Layout, Precision
from pipeline.loader import TrainLoader
from tests.bench_loading import MEAN, STD, make_photographs
from tests.corpora import make_corpus


def measure(config: VitConfig, micro_batch: int, steps: int, compiled: bool, worker: workers.Worker) -> str:
    """A line about `steps` optimizer steps after warming up."""
    precision: Precision = "bf16" if worker.gpu else "fp32"
    plan = Layout(precision, micro_batch, 1, 1 if worker.gpu else 0, compiled, recompute=False)
    torch.manual_seed(0)
    model = VisionTransformer(config)
    settings = OptimizerSettings(learning_rate=1e-4, weight_decay=0.1)
    engine = build_engine(model, settings, plan, micro_batch * worker.world_size, worker)
    images = torch.randn(micro_batch, 3, config.image_size, config.image_size, device=worker.device, dtype=plan.dtype)
    targets = torch.zeros(micro_batch, config.num_classes, device=worker.device)
    targets[torch.arange(micro_batch), torch.arange(micro_batch) % config.num_classes] = 1
    if worker.gpu:
        torch.cuda.reset_peak_memory_stats(worker.device)
    seconds = []
    for number in range(steps + 5):
        if worker.gpu:
            torch.cuda.synchronize(worker.device)
        began = time.perf_counter()
        set_learning_rate(engine, 1e-4)
        loss = softmax_cross_entropy(engine(images), targets)
        engine.backward(loss)
        reduce_and_update(engine, measure=False)
        if worker.gpu:
            torch.cuda.synchronize(worker.device)
        if number >= 5:
            seconds.append(time.perf_counter() - began)
    rate = micro_batch * worker.world_size / statistics.median(seconds)
    line = f"{'compiled' if compiled else 'eager':<9} {rate:9,.1f} images/s  loss {float(loss.detach()):.3f}"
    peak = throughput.peak_flops(worker, precision)
    if peak:
        line += f"  MFU {100 * rate * train_flops(config) / (peak * worker.world_size):.1f} %"
    if worker.gpu:
        line += f"  peak memory {torch.cuda.max_memory_allocated(worker.device) / 2**30:.1f} GiB"
    line += f"  attention {throughput.attention_backend(config, plan, worker.device)}"
    engine.destroy()
    return line


def measure_decoders(worker: workers.Worker) -> None:
    """Print a line a decode mode: images/s of JPEGs of ImageNet's usual size, cropped, flipped and with RandAugment."""
    set_up_logging()  # the probe logs the difference of the pixels
    batch, batches = (128, 20) if worker.gpu else (16, 4)
    modes: list[tuple[decoding.Backend, float]] = [("cpu", 0.65)]
    if worker.gpu:
        modes += [("gpu-slice", share) for share in (0.0, 0.65, 0.9, 1.0)] + [("gpu-roi", 0.65)]
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        images.mkdir()
        make_photographs(images)
        corpus = make_corpus(images, Path(scratch) / "corpus", shard_mb=8)
        for layers, (backend, share) in itertools.product((0, 2), modes):
            augmenting = AugmentSettings(randaugment_layers=layers)
            settings = DataSettings(corpus="", mean=MEAN, std=STD, augment=augmenting, hw_decoder_load=share)
            what = f"decoding by {backend}, hardware share {share}, {layers} layers of RandAugment"
            fault = decoder_choice.probe(backend, settings)
            if fault is not None:
                print(f"{what}: {fault}", flush=True)
                continue
            alone = workers.Worker(gpu_index=worker.gpu_index)
            ready = iter(TrainLoader(corpus, settings, 0, alone, batch, batch, 0, batches + 5, backend))
            for _ in range(5):
                next(ready)
            began = time.perf_counter()
            count = sum(len(some.images) for some in ready)
            print(f"{what}: {count / (time.perf_counter() - began):,.0f} images/s", flush=True)


def main() -> None:
    """Print the table on rank 0."""
    prepare_deepspeed()
    worker = workers.join(timeout_s=600)
    name, micro_batch, steps = ("H/14", 128, 50) if worker.gpu else ("Ti/16", 4, 3)
    if len(sys.argv) > 1:
        name = sys.argv[1]
    if len(sys.argv) > 2:
        micro_batch = int(sys.argv[2])
    if len(sys.argv) > 3:
        steps = int(sys.argv[3])
    if worker.leads:
        device = torch.cuda.get_device_name(worker.device) if worker.gpu else "CPU"
        print(f"{name} at 224 px, micro-batch {micro_batch}, {steps} steps, {worker.world_size} rank(s), {device}")
        print(f"torch {torch.__version__}")
        measure_decoders(worker)
    config = vit_config(name, num_classes=1000)
    for compiled in (False, True) if worker.gpu else (False,):
        line = measure(config, micro_batch, steps, compiled, worker)
        if worker.leads:
            print(line, flush=True)


if __name__ == "__main__":
    main()
