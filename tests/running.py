"""Starts stages as users do, in processes of their own, and reads what they leave."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.folders import LocalFolder
from pipeline.tracking import metrics_of

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def tiny(steps: int, save_every: int) -> list[str]:
    """Words of the smallest pre-training that has everything: two blocks of width 32, every step recorded."""
    return [
        "pipeline/pretrain.py", "demo", "model.width=32", "model.depth=2", "model.heads=2", "model.mlp_dim=64",
        f"training.duration={steps} steps", "training.global_batch=12", "optimizer.warmup=5 steps", "log.every=1",
        f"checkpoint.every={save_every} steps", "registry.name=null",
    ]  # fmt: skip


def environment(home: Path, **extra: str) -> dict[str, str]:
    dropped = ("RAY_", "MLFLOW_", "VITFORGE_", "MASTER_", "TORCHELASTIC_", "OMPI_", "PMI", "SLURM_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped) and key not in RANK_NAMES}
    return {**kept, "VITFORGE_HOME": str(home), "OMP_NUM_THREADS": "1", **extra}


RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(ranks: int, home: Path, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """A stage under torchrun, to its end."""
    return subprocess.run(
        torchrun_command(ranks, words),
        cwd=REPOSITORY,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def torchrun_killed(ranks: int, home: Path, metrics: Path, step: int, *words: str) -> int:
    """A stage under torchrun, killed with SIGKILL (all of its processes) once it has taken `step` steps.

    Returns the last step that it recorded.
    """
    process = subprocess.Popen(
        torchrun_command(ranks, words),
        cwd=REPOSITORY,
        env=environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (rows := losses(metrics)) and max(rows) >= step:
            break
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    for pid in [str(process.pid), *children.split()]:
        os.kill(int(pid), signal.SIGKILL)
    process.wait()
    return max(losses(metrics))


def torchrun_command(ranks: int, words: tuple[str, ...]) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()), *words,
    ]  # fmt: skip


def script(home: Path, *words: str, timeout: float = 400, **extra: str) -> subprocess.CompletedProcess[str]:
    """An entry point under Python, to its end."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=environment(home, **extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def losses(metrics: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics_of(LocalFolder(metrics.parent)) if "loss" in row}


def newest_state(checkpoints: Path) -> dict[str, "torch.Tensor"]:
    """Every state of every parameter in the newest checkpoint, whole: {"NAME STATE": numbers}."""
    import torch

    from cluster.folders import LocalFolder
    from pipeline.checkpoints import newest

    checkpoint = newest(LocalFolder(checkpoints))
    assert checkpoint is not None
    parts = checkpoint.parts()
    found = {
        (name, state): torch.empty(shape)
        for name, shape in checkpoint.state["shapes"].items()
        for state in parts.states()
    }
    parts.read([(name, state, 0, numbers.view(-1)) for (name, state), numbers in found.items()], "reading")
    return {f"{name} {state}": numbers for (name, state), numbers in found.items()}


def same_state(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same numbers, bit by bit."""
    import torch

    states = [newest_state(run / "checkpoints") for run in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )
