"""The commands and snippets of the READMEs run as they stand there, but for what tests/readme_values.py replaces."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow.cli import cli as mlflow_cli

from cluster.settings import Settings, parse_command, parse_override
from data_prep import card, copy_corpus, index, shard, show, subset, verify
from pipeline import evaluate, finetune, pretrain
from pipeline.config import RECIPES, EvaluateSettings, FinetuneSettings, PretrainSettings
from tests.corpora import encoded, make_corpus
from tests.readme_values import LENGTHS, NOT_RUN, OF_COMMAND, OUTPUT, PATHS, RANKS, READMES, ROOMS, SIZES
from tests.running import REPOSITORY, environment, free_port

SETTINGS: dict[str, tuple[type[Settings], tuple[str, ...], Path | None]] = {
    "pipeline/pretrain.py": (PretrainSettings, (), RECIPES / "pretrain"),
    "pipeline/finetune.py": (FinetuneSettings, (), RECIPES / "finetune"),
    "pipeline/evaluate.py": (EvaluateSettings, ("model", "corpus"), None),
    "data_prep/shard.py": (shard.ShardSettings, ("source", "destination"), None),
    "data_prep/subset.py": (subset.SubsetSettings, ("corpus", "destination"), None),
    "data_prep/verify.py": (verify.VerifySettings, ("corpus",), None),
    "data_prep/show.py": (show.ShowSettings, ("corpus",), None),
    "data_prep/copy_corpus.py": (copy_corpus.CopySettings, ("source", "destination"), None),
    "data_prep/card.py": (card.CardSettings, ("corpus",), None),
    "data_prep/index.py": (index.IndexSettings, ("source", "destination"), None),
}
"""Of each command: its settings, the plain words, where its recipes are."""
MAINS = {
    "pipeline/pretrain.py": pretrain.main,
    "pipeline/finetune.py": finetune.main,
    "pipeline/evaluate.py": evaluate.main,
    "data_prep/shard.py": shard.main,
    "data_prep/subset.py": subset.main,
    "data_prep/verify.py": verify.main,
    "data_prep/show.py": show.main,
    "data_prep/copy_corpus.py": copy_corpus.main,
    "data_prep/card.py": card.main,
    "data_prep/index.py": index.main,
}


@dataclass(frozen=True)
class Piece:
    """A command line, or a block of another language."""

    kind: str
    """shell, inline (a command inside a sentence), or the language of a fenced block."""
    text: str

    @property
    def runs(self) -> bool:
        return not any(self.text == known or self.text.startswith(f"{known} ") for known in NOT_RUN)


def pieces(text: str) -> Iterator[Piece]:
    """All that a README would have one type: lines of indented blocks, fenced blocks, commands inside sentences."""
    prose = []
    for number, part in enumerate(re.split(r"^```(.*)$", text, flags=re.M)):
        match number % 4:  # text, what follows the opening fence, the block, what follows the closing fence
            case 0:
                lines = part.splitlines()
                prose += [line for line in lines if not line.startswith("    ")]
                yield from _lines([line for line in lines if line.startswith("    ")])
            case 1:
                language = part
            case 2:
                yield from [Piece(language, part.strip("\n"))] if language else _lines(part.splitlines())
    for command in re.findall(r"`((?:python|make|mlflow|ray|torchrun|pip|curl) [^`]+)`", " ".join(prose)):
        yield Piece("inline", command)


def _lines(lines: list[str]) -> Iterator[Piece]:
    """The command lines of a block, without comments."""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip() and not line.strip().startswith((*OUTPUT, *ROOMS)):
            yield Piece("shell", re.sub(r"\s+# .*", "", line).strip())


def all_pieces() -> list[Piece]:
    return [piece for name in READMES for piece in pieces((REPOSITORY / name).read_text(encoding="utf-8"))]


def script_and_words(line: str) -> tuple[str, list[str]] | None:
    """Which of our commands a command line runs, under Ray's job interface or torchrun too, and with which words."""
    words = shlex.split(line)
    for place, word in enumerate(words):
        if word in SETTINGS and "python" in words[:place]:
            return word, words[place + 1 :]
    return None


def example_lines() -> list[str]:
    """The commands in the docstrings, help texts, recipes and manifests."""
    found = []
    for room in ("pipeline", "data_prep", "cluster"):
        for path in sorted((REPOSITORY / room).rglob("*")):
            if path.suffix in (".py", ".yaml", ".sh") or path.name == "Dockerfile":
                text = path.read_text(encoding="utf-8").replace('"\\\\\n', "")
                text = re.sub(r"\\{1,2}\n[\s#]*", " ", text)
                found += re.findall(r"^[\s#]*(?:Command: +)?(python (?:pipeline|data_prep)/\w+\.py .*)$", text, re.M)
    return found


@pytest.mark.parametrize("line", sorted({*example_lines(), *(p.text for p in all_pieces() if p.kind == "shell")}))
def test_the_settings_of_every_command_shown_anywhere_can_be_read(line):
    found = script_and_words(line)
    if found is not None and not found[1][0].startswith("recipes/"):  # one of the reader's own
        kind, positionals, recipes = SETTINGS[found[0]]
        parse_command(kind, prog=found[0], description="", positionals=positionals, recipes=recipes, argv=found[1])


def test_nothing_but_paths_lengths_sizes_and_ranks_is_replaced():
    units = {"duration", "global_batch", "every", "warmup"}
    assert {key.split(".")[-1] for key in LENGTHS} <= units
    assert {key.split(".")[-1] for key in SIZES} <= {"image_size", "width", "depth", "heads", "mlp_dim"}
    assert set(RANKS) == {"run.workers"}
    allowed = LENGTHS | SIZES | RANKS
    assert all(allowed.get(key) == value for values in OF_COMMAND.values() for key, value in values.items())
    text = "\n".join(piece.text for piece in all_pieces())
    unused = [name for name in PATHS if name not in text]
    unused += [name for name in NOT_RUN if not any(piece.text.startswith(name) for piece in all_pieces())]
    assert not unused, "the table has what no README has"


def test_every_block_and_command_is_of_a_kind_that_is_run_or_listed():
    lines = [piece.text for piece in all_pieces() if piece.kind == "shell"]
    for piece in all_pieces():
        if piece.kind == "inline":
            known = script_and_words(piece.text) is not None or any(line.startswith(piece.text) for line in lines)
            assert known or not piece.runs, f"`{piece.text}` is not in tests/readme_values.py"
        else:
            assert piece.kind in ("shell", "python", "yaml", "text"), piece
        if piece.kind == "yaml":
            assert yaml.safe_load(piece.text)["kind"] == "NetworkPolicy"  # no Kubernetes is here to run it


# ------------------------------------------------------------------------------------------------------ running


class World:
    """A machine of a newcomer: a home, a checkout, images, and what the commands before have made."""

    def __init__(self, root: Path, bucket: str, patch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, patch
        self.places = {"root": str(root), "bucket": bucket, "port": str(free_port()), "digest": ""}
        self.servers: list[subprocess.Popen[bytes]] = []
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "VITFORGE_", "RAY_ADDRESS"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(root / "home"))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        (root / "checkout").mkdir()
        for room in ("cluster", "data_prep", "models", "pipeline"):
            (root / "checkout" / room).symlink_to(REPOSITORY / room)
        patch.chdir(root / "checkout")
        write_images(root)

    def placed(self, text: str) -> str:
        for known, place in PATHS.items():
            text = text.replace(known, place.format(**self.places))
        return text

    def run(self, piece: Piece) -> None:
        """Run a command or snippet; raises whatever is wrong with it."""
        text = self.placed(piece.text)
        if piece.kind == "python":
            self.snippet(text)
            return
        words = shlex.split(text)
        found = script_and_words(text)
        if words[:2] == ["python", "cluster/torchrun.py"]:
            assert found is not None
            command = [sys.executable, *words[1:2], "--nproc-per-node", RANKS["run.workers"], found[0]]
            done = subprocess.run(
                [*command, *self.shorter(*found)], capture_output=True, text=True, timeout=300,
                env={**environment(self.root / "home" / "torchrun"), "HOME": str(self.root / "home")},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        elif words[0] == "python" and found is not None:
            self.patch.setattr(sys, "argv", [found[0], *self.shorter(*found)])
            MAINS[found[0]]()
        elif words[0] == "export":
            name, _, value = words[1].partition("=")
            self.patch.setenv(name, os.path.expandvars(value))
        elif words[:3] == ["mlflow", "models", "serve"]:
            self.serve(words)
        elif words[0] == "mlflow":
            mlflow_cli.main(words[1:], standalone_mode=False)
        else:
            done = subprocess.run(["bash", "-ec", text], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            if "invocations" in text:
                assert '"classes"' in done.stdout, done.stdout

    def shorter(self, script: str, words: list[str]) -> list[str]:
        """The words with the lengths, sizes and ranks of the table."""
        values = OF_COMMAND[script]
        kept = [word for word in words if word.partition("=")[0] not in values]
        given = {parse_override(word)[0][0]: word for word in words if "=" in word}
        skipped = {"evaluation.every"} if "data.heldout" not in " ".join(given.values()) else set()
        return [*kept, *(f"{key}={value}" for key, value in values.items() if key not in skipped)]

    def snippet(self, text: str) -> None:
        """A Python snippet where `cat.jpg` lies: in a process of its own, without anything of ours, unless it asks."""
        elsewhere = self.root / "elsewhere"
        if "from models." in text:
            printed = io.StringIO()
            with redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
                patch.chdir(elsewhere)
                exec(compile(text, "README", "exec"), {})
            answer = printed.getvalue()
        else:
            variables = environment(self.root, HOME=str(self.root / "home"))
            del variables["VITFORGE_HOME"]
            variables.pop("PYTHONPATH", None)
            done = subprocess.run(
                [sys.executable, "-c", text], cwd=elsewhere, env=variables, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr
            answer = done.stdout
        assert re.search(r"class\d", answer), answer
        assert sorted(path.name for path in elsewhere.iterdir() if ".onnx" not in path.name) == ["cat.jpg"]

    def serve(self, words: list[str]) -> None:
        """Start a server, and wait until it answers."""
        with (self.root / "server.log").open("wb") as output:
            server = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
        self.servers.append(server)
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.places['port']}/ping", timeout=5).close()
                return
            except OSError:
                waits = server.poll() is None and time.monotonic() < deadline
                assert waits, (self.root / "server.log").read_text()
                time.sleep(0.2)

    def close(self) -> None:
        for server in self.servers:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def write_images(root: Path) -> None:
    """The images, tables and corpora that the READMEs take for granted."""

    def folder(place: str, seed: int, images: int = 6, classes: int = 2) -> Path:
        for number in range(classes * images):
            path = root / place / f"class{number % classes}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(seed + number))
        return root / place

    folder("home/photos", 0, images=10)
    data = folder("data/imagenet-train", 100).parent
    (data / "corpora").mkdir()
    make_corpus(folder("data/val", 200), data / "corpora" / "in1k-val")
    make_corpus(folder("data/pets", 300, images=10), data / "corpora" / "pets")
    subset.make_parts(
        subset.SubsetSettings(
            corpus=str(data / "corpora" / "pets"), destination=str(data / "corpora" / "pets-parts"), holdout=0.2
        )
    )
    with tarfile.open(data / "winter21_whole.tar.gz", "w:gz") as whole:
        for number in range(2):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for image in range(3):
                    _add(tar, f"n0000000{number}_{image}.JPEG", encoded(400 + 3 * number + image))
            _add(whole, f"n0000000{number}.tar", inner.getvalue())
    (data / "words.txt").write_text("n00000000\tcat\nn00000001\tdog\n")
    names = [f"pets/class{number % 2}/{number}.jpg" for number in range(6)]
    (data / "images.csv").write_text(
        "path,tags,confidence\n" + "".join(f"{name},cat,0.9\n{name},dog,0.1\n" for name in names)
    )
    make_corpus(data / "pets", root / "mnt" / "corpora" / "in21k")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "cat.jpg").write_bytes(encoded(1))
    (root / "checkout" / "cat.jpg").write_bytes(encoded(1))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_every_command_and_snippet_of_the_readmes_runs_in_their_order(tmp_path, s3, monkeypatch, capfd):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    world = World(tmp_path, s3.bucket(), monkeypatch)
    try:
        for piece in all_pieces():
            if piece.kind in ("shell", "python") and piece.runs:
                began = time.monotonic()
                try:
                    if piece.kind == "python" and "digest" in piece.text:
                        version = mlflow.MlflowClient().get_model_version("photos", "1")
                        world.places["digest"] = version.tags["vitforge.package"]
                    world.run(piece)
                except BaseException as error:
                    error.add_note(f"in the README: {piece.text}")
                    raise
                with capfd.disabled():
                    print(f"{time.monotonic() - began:5.1f} s  {piece.text[:100]!r}", flush=True)
    finally:
        world.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
