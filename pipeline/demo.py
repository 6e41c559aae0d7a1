"""The whole main job on this machine, on real images: handwritten digits.

Writes scikit-learn's 1,797 digits as JPEG files, shards them, pre-trains a small ViT on two workers, registers
it, fine-tunes it at a higher resolution on digits that pre-training has not seen, scoring digits that neither has seen
now and then, registers that as models:/digits@champion, loads it as a consumer would and scores those digits again.
Every step is a command that a user would type, and is shown. Run again, it repeats nothing that was finished.

example:
  python pipeline/demo.py
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cluster.stop_signals import STOP

    STOP.install(early=True)  # the imports take seconds

import io
import json
import os
import shlex
import subprocess
import time
from typing import Any

import numpy as np

from cluster.command import absolute_path, check_folder, duration, run_command
from cluster.ray_runtime import REPOSITORY
from cluster.settings import Settings, parse_command
from cluster.stop_signals import STOPPED, hand_on_to_children
from cluster.storage import write_bytes
from pipeline import tracking

NEEDED_ACCURACY = 0.95
PARTS = {"pretrain": range(0, 4), "finetune": range(4, 8), "heldout": range(8, 10)}
"""Which digits go where, by their number modulo ten."""


class DemoSettings(Settings):
    """Settings of the demo."""

    home: str = str(REPOSITORY / "demo-output")
    """Folder for images, corpora, runs and the tracking database."""


def write_digits(folder: Path) -> None:
    """Write the digits, 32 pixels high with a margin of 4, as JPEG files: folder/PART/DIGIT/NUMBER.jpg."""
    from PIL import Image, ImageOps
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = next(name for name, numbers in PARTS.items() if number % 10 in numbers)
        path = folder / part / str(digit) / f"{number:04d}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            gray = Image.fromarray((255 - pixels * 255 / 16).astype(np.uint8)).convert("RGB")
            buffer = io.BytesIO()
            drawn = ImageOps.expand(gray.resize((32, 32), Image.Resampling.BICUBIC), border=4, fill="white")
            drawn.save(buffer, "JPEG", quality=95)
            write_bytes(path, buffer.getvalue())


def step(title: str, *command: str) -> float:
    """Run one command of the main job, showing it; returns the seconds it took.

    Raises:
        SystemExit: the command failed.
    """
    shown = shlex.join(["python", *command])
    print(f"\n=== {title}\n$ {shown}", flush=True)
    began = time.monotonic()
    # In a process group of its own, so that it does not get a signal of the terminal twice: it is handed on.
    status = subprocess.run([sys.executable, *command], cwd=REPOSITORY, process_group=0).returncode
    if status in STOPPED:
        sys.exit(status)
    if status:
        sys.exit(f"the demo stopped: `{shown}` left with status {status}")
    return time.monotonic() - began


def consume(uri: str, images: Path) -> tuple[float, float]:
    """Load a model as any consumer of the registry does and classify the files images/CLASS/*.jpg.

    Returns:
        Share that is right, and images/s.
    """
    import mlflow
    import pandas

    files = sorted(images.glob("*/*.jpg"))
    model = mlflow.pyfunc.load_model(uri)
    began = time.monotonic()
    answers = model.predict(pandas.DataFrame({"image": [path.read_bytes() for path in files]}), params={"top_k": 1})
    rate = len(files) / (time.monotonic() - began)
    right = sum(classes[0] == path.parent.name for classes, path in zip(answers["classes"], files, strict=True))
    return right / len(files), rate


def main() -> None:
    """Run the demo."""
    settings = parse_command(DemoSettings, prog="pipeline/demo.py", description=__doc__ or "")
    home = Path(absolute_path(settings.home, "home"))
    check_folder(home, "home")
    hand_on_to_children()
    began = time.monotonic()
    os.environ["VITFORGE_HOME"] = str(home)
    images, corpora, runs = home / "images", home / "corpora", home / "runs"
    write_digits(images)
    sharding = 0.0
    for part in PARTS:
        sharding += step(f"shard the {part} images", "data_prep/shard.py", str(images / part), str(corpora / part))
    step(
        "pre-train on two workers, register",
        "pipeline/pretrain.py",
        "demo",
        f"data.corpus={corpora / 'pretrain'}",
    )
    pretrained = _result(runs / "demo-pretrain")
    step(
        "fine-tune at a higher resolution, register as champion",
        "pipeline/finetune.py",
        "demo",
        f"parent={pretrained['model']}",
        f"data.corpus={corpora / 'finetune'}",
        f"data.heldout={corpora / 'heldout'}",
        "evaluation.every=10 epochs",
    )
    finetuned = _result(runs / "demo-finetune")
    print("\n=== load models:/digits@champion as a consumer and score the held-out digits", flush=True)
    tracking.connect(home)
    accuracy, rate = consume("models:/digits@champion", images / "heldout")
    counts = {part: sum(1 for _ in (images / part).rglob("*.jpg")) for part in PARTS}
    rows = [
        ("images", f"{sum(counts.values()):,} digits as JPEG files", images),
        (
            "corpora",
            ", ".join(f"{count} {part}" for part, count in counts.items())
            + f"; {sum(counts.values()) / sharding:,.0f} images/s in {duration(sharding)}",
            corpora,
        ),
        ("pre-training", _speed(pretrained), pretrained["model"]),
        ("fine-tuning", _speed(finetuned), f"{finetuned['model']}, alias champion"),
        ("consumer", f"{100 * accuracy:.1f} % of the held-out digits are right, {rate:,.0f} images/s", ""),
        ("curves", "loss, learning rate, gradient norm", runs / "demo-finetune" / "curves.png"),
        ("MLflow", "to look at all of it:", tracking.open_command(home)),
    ]
    print(f"\nThe main job is done, in {duration(time.monotonic() - began)}.\n")
    for name, what, where in rows:
        print(f"  {name:<13} {what}" + (f"\n{'':<16}{where}" if where else ""))
    print(flush=True)
    if accuracy < NEEDED_ACCURACY:
        sys.exit(f"the demo failed: {100 * accuracy:.1f} % is below the {100 * NEEDED_ACCURACY:.0f} % it must reach")


def _speed(result: dict[str, Any]) -> str:
    rate, overall = result["images_per_second_training"], result["images_per_second_overall"]
    saving = f" ({overall:,.0f} with evaluations and checkpoints)" if overall else ""
    waiting = f"{100 * result['data_wait']:.1f} % of the time waiting for data"
    return f"{result['steps']} steps, {rate:,.0f} images/s{saving}, {waiting}"


def _result(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    run_command(main)
