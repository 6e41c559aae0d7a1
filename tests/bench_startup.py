"""How long commands take to start: to the first step under torchrun and under Ray, small jobs with and without Ray.

Each row is the fastest of some rounds in turn: wall seconds, and CPU seconds of all of its processes. The last
line says how much longer the start takes under Ray than under torchrun, and how much it may.

example:
  python -m tests.bench_startup [ROUNDS]
"""

import os
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import psutil

from tests.corpora import image_folder
from tests.running import REPOSITORY, environment, torchrun_command

ALLOWED_S = 15.0
IMAGES = 500


class Command:
    """A command that runs, and the CPU seconds of all that it starts, as far as they are seen while they live."""

    def __init__(self, words: list[str], home: Path, said: Path) -> None:
        self._said, self._began = said, time.monotonic()
        self._cpu: dict[tuple[int, float], float] = {}
        with said.open("w") as file:
            self._process = subprocess.Popen(words, cwd=REPOSITORY, env=environment(home), stdout=file, stderr=file)

    def until(self, text: str | None) -> tuple[float, float]:
        """Wall and CPU seconds until it has said something, or to its end."""
        while self._process.poll() is None:
            self._look()
            if text is not None and text in self._said.read_text():
                break
            time.sleep(0.05)
        assert self._process.returncode in (None, 0), self._said.read_text()
        assert text is None or text in self._said.read_text()
        return time.monotonic() - self._began, sum(self._cpu.values())

    def end(self) -> None:
        """End it, if it has not."""
        self._process.terminate()
        self._process.wait(120)

    def _look(self) -> None:
        try:
            root = psutil.Process(self._process.pid)
            for one in [root, *root.children(recursive=True)]:
                times = one.cpu_times()
                self._cpu[one.pid, one.create_time()] = times.user + times.system
        except psutil.Error:
            return


def commands(root: Path) -> dict[str, tuple[list[str], str | None]]:
    """What is measured: a command, in which NUMBER stands for another number every time, and what it says at last."""
    home, images, corpus = root / "home", root / "images", root / "corpus"
    image_folder(images, classes=10, images=IMAGES // 10)
    shard = [sys.executable, "data_prep/shard.py", str(images)]
    subprocess.run([*shard, str(corpus)], cwd=REPOSITORY, env=environment(home), check=True, capture_output=True)
    train = ["pipeline/pretrain.py", "demo", f"data.corpus={corpus}", "optimizer.warmup=1 steps"]
    model = [*train, "training.duration=5 steps", "run.name=model", "run.workers=1", "registry.name=start"]
    made = torchrun_command(1, tuple(model))
    subprocess.run(made, cwd=REPOSITORY, env=environment(home), check=True, capture_output=True)
    train += ["training.duration=100000 steps", "registry.name=null", "run.name=rNUMBER"]
    shard.append(str(root / "made-NUMBER"))
    copy = [sys.executable, "data_prep/copy_corpus.py", str(corpus), str(root / "made-NUMBER")]
    evaluate = [sys.executable, "pipeline/evaluate.py", "models:/start/1", str(corpus)]
    return {
        "first step, torchrun": (torchrun_command(2, tuple(train)), " step 1/"),
        "first step, Ray": ([sys.executable, *train], " step 1/"),
        f"shard {IMAGES} images": (shard, None),
        f"shard {IMAGES} images, Ray": ([*shard, "workers=2"], None),
        f"copy {IMAGES} images": (copy, None),
        f"copy {IMAGES} images, Ray": ([*copy, "workers=2"], None),
        f"verify {IMAGES} images": ([sys.executable, "data_prep/verify.py", str(corpus)], None),
        f"evaluate {IMAGES} images": (evaluate, None),
        f"evaluate {IMAGES} images, Ray": ([*evaluate, "workers=1"], None),
    }


def main() -> None:
    """Print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root, numbers = Path(folder), count()
        measured = commands(root)
        for _ in range(rounds):
            for name, (words, text) in measured.items():
                number = str(next(numbers))
                command = Command([word.replace("NUMBER", number) for word in words], root / "home", root / "said")
                try:
                    found.setdefault(name, []).append(command.until(text))
                finally:
                    command.end()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, fastest of {rounds} rounds")
    for name, times in found.items():
        wall, cpu = min(times)
        print(f"  {name:<26} {wall:6.1f} s wall {cpu:6.1f} s CPU")
    late = min(found["first step, Ray"])[0] - min(found["first step, torchrun"])[0]
    print(f"the first step comes {late:.1f} s later under Ray than under torchrun; {ALLOWED_S:.0f} s are allowed")
    if late > ALLOWED_S:
        sys.exit("that is more")


if __name__ == "__main__":
    main()
