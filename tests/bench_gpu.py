"""Training steps of a large ViT in bf16 on synthetic images: images/s, MFU, peak memory, attention backend.

On a machine with a GPU (one rank a GPU):

    torchrun --nproc-per-node 1 -m tests.bench_gpu            # ViT-H/14, micro-batch 128, eager and compiled
    torchrun --nproc-per-node 1 -m tests.bench_gpu L/16 256 50

Without one it runs a few steps of a tiny model, to show that it works. The DALI start-up probe comes first.
"""

import statistics
import sys
import time

import torch

from models.losses import softmax_cross_entropy
from models.presets import train_flops, vit_config
from models.vit import VisionTransformer, VitConfig
from pipeline import decoding, throughput, workers
from pipeline.config import OptimizerSettings
from pipeline.engine import build_engine, prepare_deepspeed, reduce_and_update, set_learning_rate
from pipeline.layout import Layout, Precision


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
        if worker.gpu:
            backends: tuple[decoding.Backend, ...] = ("gpu-slice", "gpu-roi")
            for backend in backends:
                print(f"DALI probe {backend}: {decoding.probe(backend) or 'works'}")
    config = vit_config(name, num_classes=1000)
    for compiled in (False, True) if worker.gpu else (False,):
        line = measure(config, micro_batch, steps, compiled, worker)
        if worker.leads:
            print(line, flush=True)


if __name__ == "__main__":
    main()
