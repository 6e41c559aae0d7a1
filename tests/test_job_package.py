"""What `ray job submit --working-dir .` sends from a checkout in which somebody has worked, by Ray's own packaging."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from pipeline.config import RECIPES
from tests.running import REPOSITORY, environment

ROOMS = ("cluster", "data_prep", "models", "pipeline")
PEOPLE_HAVE = (
    ".venv/lib/torch.so", "venv/lib/torch.so", "venv3.11/lib/torch.so", "env/lib/torch.so", "my-env/lib/torch.so",
    "ENV/lib/torch.so", ".conda/lib/torch.so", "miniconda3/pkgs/torch.conda", ".tox/py311/torch.so", "conda_env/a.so",
    "corpora/pets/shard-000000.tar", "corpus/index.npy", "data/cat/1.jpg", "dataset/train.bin", "datasets/1.arrow",
    "images/cat/1.jpg", "photos/1.heic", "vitforge/runs/a/checkpoints/step-1/rank-0.pt", "runs/a/metrics.jsonl",
    "outputs/x.bin", "output/x.bin", "results/x.bin", "demo-output/images/1.jpg", "mlruns/0/model/data.bin",
    "mlartifacts/0/weights", "mlflow.db", "wandb/run-1/files/x.bin", "lightning_logs/version_0/events.out",
    "tensorboard/events.out", "checkpoints/last.ckpt", "models.zip", "images.tar", "images.tar.gz", "train.parquet",
    "labels.csv", "weights.safetensors", "notebook.ipynb", "notebooks/a.ipynb", "nohup.out", "train.log", "core.1234",
    "node_modules/x.js", "htmlcov/index.html", "build/lib/x.so", "dist/vitforge.whl", "wheels/torch.whl",
    ".hypothesis/examples/x", ".cache/pip/x", ".git/objects/pack/x.pack", "tests/frozen/corpus/shard-000000.tar",
    "pipeline/__pycache__/stage.cpython-311.pyc", "pipeline/last.ckpt", "data_prep/images.tar", "models/weights.pt",
)  # fmt: skip
"""Where checkouts have something large."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package that Ray makes of a copy of this checkout, with all of the above in it."""
    folder = tmp_path_factory.mktemp("package")
    checkout = folder / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file() and not name.startswith("tests/frozen/"):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, checkout / name)
    for name in PEOPLE_HAVE:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(os.urandom(1 << 20))
    (checkout / "recipes").mkdir()
    for name in ("mine.yaml", "recipes/mine.yaml"):
        shutil.copyfile(RECIPES / "pretrain" / "demo.yaml", checkout / name)
    target = folder / "package.zip"
    create_package(str(checkout), target, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    return target


def test_the_code_and_own_recipes_travel_and_nothing_else(package):
    with zipfile.ZipFile(package) as archive:
        names = set(archive.namelist())
    assert not names & set(PEOPLE_HAVE)
    assert {"mine.yaml", "recipes/mine.yaml", "requirements.lock"} <= names
    own = {str(path.relative_to(REPOSITORY)) for room in ROOMS for path in (REPOSITORY / room).rglob("*.py")}
    assert own <= names
    assert {name.split("/")[0] for name in names if "/" in name} == {*ROOMS, "recipes"}
    assert package.stat().st_size < 2 << 20  # Ray refuses 100 MiB


def test_a_command_works_in_what_has_travelled(package, tmp_path):
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path / "unpacked")
    done = subprocess.run(
        [sys.executable, "pipeline/pretrain.py", "recipes/mine.yaml", "data.corpus=/nowhere"],
        cwd=tmp_path / "unpacked", env=environment(tmp_path / "home"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "/nowhere" in done.stderr, done.stderr
