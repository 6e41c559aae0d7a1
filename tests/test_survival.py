"""What runs survive: wishes to stop, ranks that hang, batches that are not finite."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import mlflow
import psutil
import pytest

from cluster.folders import LocalFolder, folder_at
from pipeline import tracking
from pipeline.checkpoints import newest, newest_name
from tests.corpora import image_folder, make_corpus
from tests.running import REPOSITORY, environment, losses, tiny, torchrun, torchrun_command

STEPS = 200
TINY = [*tiny(STEPS, 25), "run.workers=null"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("survival")
    corpus = make_corpus(image_folder(root / "images", classes=3, images=20), root / "corpus")
    return root / "home", corpus.path


def words(places, name, *overrides):
    return [*TINY, f"data.corpus={places[1]}", f"run.name={name}", *overrides]


def start(places, name, ranks, *overrides):
    """A stage under torchrun, under way: its process and those of its ranks."""
    process = subprocess.Popen(
        torchrun_command(ranks, tuple(words(places, name, *overrides))),
        cwd=REPOSITORY, env=environment(places[0]), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    metrics = places[0] / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while max(losses(metrics), default=0) < 5:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = [child for child in psutil.Process(process.pid).children() if "pretrain.py" in " ".join(child.cmdline())]
    assert len(workers) == ranks
    return process, workers


def test_a_run_that_is_told_to_stop_saves_and_goes_on_with_identical_losses(places):
    looks_for_spikes = "health.spike_factor=1000"
    process, workers = start(places, "stopped", 2, looks_for_spikes)
    workers[1].send_signal(signal.SIGTERM)  # one rank knows, all must stop at the same step
    output, _ = process.communicate(timeout=120)
    assert "the same command goes on from there" in output
    folder = places[0] / "runs" / "stopped"
    taken = max(losses(folder / "metrics.jsonl"))
    assert 5 <= taken < STEPS
    assert len(list((folder / "checkpoints").glob(f"step-{taken:08d}-*/manifest.json"))) == 1
    assert json.loads((folder / "heartbeat.json").read_text())["state"] == "stopped"
    for name in ("stopped", "straight"):
        done = torchrun(2, places[0], *words(places, name, looks_for_spikes))
        assert done.returncode == 0, done.stderr[-4000:]
    straight = places[0] / "runs" / "straight"
    assert losses(folder / "metrics.jsonl") == losses(straight / "metrics.jsonl")
    ends = [newest(LocalFolder(run / "checkpoints")) for run in (folder, straight)]
    usual = [end.state["usual_losses"] for end in ends if end]
    assert [len(some) for some in usual] == [STEPS, STEPS]
    assert usual[0] == usual[1]
    mlflow_run = json.loads((folder / "run.json").read_text())["mlflow_run"]
    tracking.connect(places[0])
    assert mlflow.get_run(mlflow_run).info.status == "FINISHED"


def test_ranks_whose_torchrun_is_killed_save_and_end(places):
    process, workers = start(places, "orphans", 2, "training.duration=100k steps", "checkpoint.every=50k steps")
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=120)
    for worker in alive:
        worker.kill()
    assert not alive
    folder = places[0] / "runs" / "orphans"
    taken = max(losses(folder / "metrics.jsonl"))
    assert len(list((folder / "checkpoints").glob(f"step-{taken:08d}-*/manifest.json"))) == 1
    assert json.loads((folder / "heartbeat.json").read_text())["state"] == "stopped"


@pytest.mark.parametrize("hung", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_and_all_are_ended(places, hung):
    process, workers = start(
        places, f"hung{hung}", 2, "training.duration=100k steps", "checkpoint.every=50k steps", "run.hang_timeout_s=15"
    )
    rank = next(worker for worker in workers if worker.environ()["RANK"] == str(hung))
    rank.send_signal(signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"rank {hung} on {os.uname().nodename} (process {rank.pid}), in " in output
    assert "gave no sign of life for" in output
    assert not any(worker.is_running() for worker in workers)


def test_a_run_in_a_bucket_is_complete_there_and_a_rerun_does_nothing_again(places, s3, tmp_path):
    home = folder_at(s3.bucket(), "run.home")
    words_ = words(places, "bucket", f"run.home={home}", "training.duration=60 steps")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words_]

    def run():
        variables = environment(places[0]) | s3.env
        return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)

    done = run()
    assert done.returncode == 0, done.stderr[-4000:]
    folder = home.child("runs").child("bucket")
    assert {"run.json", "settings.json", "metrics.jsonl", "curves.png", "first_batch.png", "result.json"} < set(
        folder.names()
    )
    assert [row["step"] for row in tracking.metrics_of(folder)] == list(range(1, 61))
    assert folder.read_json("heartbeat.json")["state"] == "finished"
    again = run()
    assert again.returncode == 0, again.stderr[-4000:]
    assert "training is finished already" in again.stderr


def two_ranks(tmp_path, code, *arguments):
    """What two ranks of a script of their own say, which must fail."""
    script = tmp_path / "ranks.py"
    script.write_text("from pipeline import agreement, workers\nworker = workers.join(60)\n" + code)
    done = subprocess.run(
        torchrun_command(2, (str(script), *map(str, arguments))),
        cwd=REPOSITORY, env=environment(tmp_path, PYTHONPATH=str(REPOSITORY)), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize("other", ["code", "data"])
def test_ranks_that_do_not_have_the_same_are_named(tmp_path, other):
    """Two ranks that run from two copies of the code, or see two corpora: as on two machines that differ."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "if sys.argv[1] == 'code' and worker.rank == 1:\n"
        "    agreement.REPOSITORY = Path(sys.argv[2])\n"
        "agreement.check_ranks({'data.corpus': sys.argv[1] + str(worker.rank) * (sys.argv[1] == 'data')}, worker)\n"
    )
    what = "the code of Vitforge" if other == "code" else "the data (data.corpus)"
    said = two_ranks(tmp_path, code, other, tmp_path)
    assert f"{what} is not the same on all nodes: {os.uname().nodename} has" in said


def test_the_node_of_a_rank_that_cannot_use_its_scratch_is_named(tmp_path):
    """Every rank's scratch has another path here, as if each were on a node of its own."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cluster.folders import LocalFolder\n"
        "from pipeline.config import CheckpointSettings\n"
        "from pipeline.saving import Checkpoints\n"
        "root = Path(sys.argv[1])\n"
        "(root / 'scratch-1').touch()\n"
        "settings = CheckpointSettings(scratch=str(root / f'scratch-{worker.rank}'))\n"
        "Checkpoints(LocalFolder(root / 'checkpoints'), settings, worker)\n"
    )
    said = two_ranks(tmp_path, code, tmp_path)
    assert f"not all ranks can begin: on {os.uname().nodename}: {tmp_path}/scratch-1 cannot be used" in said
    assert "set checkpoint.scratch to a folder on this node's own disk" in said


def test_what_no_rank_can_open_is_said_as_it_is(tmp_path):
    code = (
        "from pipeline.corpora import open_corpora\n"
        "from pipeline.data_config import DataSettings\n"
        "agreement.on_all_ranks(lambda: open_corpora(DataSettings(corpus='/nowhere', image_size=16)))\n"
    )
    said = two_ranks(tmp_path, code)
    assert "CorpusError: no corpus at /nowhere" in said
    assert "DisagreementError" not in said


STOPPED = """
    import sys
    from cluster.command import run_command
    from pipeline import pretrain
    from pipeline.oversight import Oversight

    moment, wishes, at = sys.argv.pop(1), [], Oversight.at

    def watched(self, phase, step):
        at(self, phase, step)
        if f"{phase} of step {step}" == moment:
            wishes.append(moment)

    Oversight.at = watched
    Oversight.wants_stop = property(lambda self: bool(wishes))
    run_command(pretrain.main)
"""


def stopped_at(places, tmp_path, moment, name, *overrides):
    """A run on one rank that is told to stop at a moment: "PHASE of step STEP"."""
    script = tmp_path / "stopped.py"
    script.write_text(textwrap.dedent(STOPPED))
    command = torchrun_command(1, (str(script), moment, *words(places, name, *overrides)[1:]))
    variables = environment(places[0], PYTHONPATH=str(REPOSITORY))
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)


def test_a_spike_that_comes_with_the_wish_to_stop_is_not_saved(places, tmp_path):
    overrides = ("health.spike_factor=1.0000001", "health.spike=stop", "log.every=1000", "checkpoint.every=500 steps")
    first = torchrun(1, places[0], *words(places, "spike", *overrides))
    assert "the loss jumped" in first.stderr
    reports = (places[0] / "runs" / "spike" / "reports").glob("step-*.json")
    step = json.loads(next(reports).read_text())["step"]
    assert step < STEPS
    stopped = stopped_at(places, tmp_path, f"computing of step {step}", "spike-and-stop", *overrides)
    assert f"at step {step}, samples [" in stopped.stderr, stopped.stderr[-4000:]
    assert newest_name(LocalFolder(places[0] / "runs" / "spike-and-stop" / "checkpoints")) == ""


def test_the_best_of_all_that_were_scored_stays(places, tmp_path):
    """Also where the score came late: the run is told to stop while it is scored."""
    held = image_folder(tmp_path / "held", classes=3, images=5)
    (held / "c0").rename(held / "c3")  # the classes are mixed up: what is learned makes the score worse
    for number in range(3):
        (held / f"c{number + 1}").rename(held / f"c{number}")
    heldout = make_corpus(held, tmp_path / "heldout")
    overrides = (
        f"data.heldout={heldout.path}", "evaluation.every=7 steps", "evaluation.batch=4", "checkpoint.keep=1",
        "checkpoint.keep_best=heldout/loss", "training.duration=60 steps",
    )  # fmt: skip
    stopped = stopped_at(places, tmp_path, "evaluation, batch 1 of step 7", "best", *overrides)
    assert "step 7: not scored" in stopped.stderr
    done = torchrun(1, places[0], *words(places, "best", *overrides))
    assert done.returncode == 0, done.stderr[-4000:]
    folder = LocalFolder(places[0] / "runs" / "best")
    scores = {row["step"]: row["heldout/loss"] for row in tracking.metrics_of(folder) if "heldout/loss" in row}
    assert sorted(scores) == [*range(7, 60, 7), 60]
    best = min(scores, key=lambda step: scores[step])
    assert best == 7
    kept = folder.child("checkpoints")
    assert [int(name.split("-")[1]) for name in kept.folders()] == [best, 60]
    assert kept.child(kept.folders()[0]).read_json("manifest.json")["state"]["scores"]["heldout/loss"] == scores[best]


def test_a_batch_that_makes_the_loss_jump_is_left_out_and_reported(places):
    """The first loss after the warm-up of the statistics that is above the smallest factor counts as a spike."""
    overrides = ("health.spike_factor=1.0000001", "health.max_skips=3")
    done = torchrun(2, places[0], *words(places, "spikes", *overrides))
    assert done.returncode != 0
    assert "going back to the last checkpoint, and on without this batch" in done.stderr
    assert "3 batches were left out already (health.max_skips = 3)" in done.stderr
    reports = places[0] / "runs" / "spikes" / "reports"
    report = json.loads(sorted(reports.glob("step-*.json"))[0].read_text())
    assert report["spike"] is True
    assert sorted(share["rank"] for share in report["shares"]) == [0, 1]
    samples = [sample for share in report["shares"] for sample in share["ids"]]
    assert len(samples) == 12
    assert report["images_stored"] == "12 of 12"
    assert all(str(sample) in report["origins"] for sample in samples)
    assert all((reports / name).stat().st_size > 100 for name in report["images"].values())
    assert (reports / f"step-{report['step']:08d}" / "sheet.png").stat().st_size > 1000


FULL = """
    from cluster.command import run_command
    from pipeline import pretrain, saving

    saving._RETRY_WAITS = (0.2,)
    run_command(pretrain.main)
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_the_same_command_goes_on_when_there_is_room(places, small_disk, tmp_path):
    script = tmp_path / "full.py"
    script.write_text(textwrap.dedent(FULL))
    line = words(places, "full", "training.duration=300 steps", "checkpoint.keep=9", "log.samples=true")
    command = ["cluster/torchrun.py", *torchrun_command(2, (str(script), *line[1:]))[3:]]
    variables = environment(small_disk, PYTHONPATH=str(REPOSITORY))
    process = subprocess.Popen(
        [sys.executable, *command], cwd=REPOSITORY, env=variables, stderr=subprocess.PIPE, text=True
    )
    folder = small_disk / "runs" / "full"
    filler = (small_disk / "filler").open("wb", buffering=0)
    while process.poll() is None and not list((folder / "checkpoints").glob("step-*/manifest.json")):
        time.sleep(0.05)
    with contextlib.suppress(OSError):
        while process.poll() is None:
            filler.write(bytes(4096))
    _, said = process.communicate(timeout=240)
    assert process.returncode == 2, said
    assert said.count("\nerror") == 1, said
    assert "No space left on device. The checkpoints before it are as they were: make room" in said
    assert "Traceback" not in said
    committed = newest(LocalFolder(folder / "checkpoints"))
    assert committed is not None
    filler.close()
    (small_disk / "filler").unlink()
    done = torchrun(2, small_disk, *line)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"resumed from {committed}" in done.stderr
    assert list(losses(folder / "metrics.jsonl")) == list(range(1, 301))


@pytest.mark.slow
def test_a_finished_run_whose_database_is_lost_is_tracked_and_registered_anew(places, tmp_path):
    line = words(places, "lost", "training.duration=6 steps", "registry.name=lost")
    home = tmp_path / "home"
    done = torchrun(1, home, *line)
    assert done.returncode == 0, done.stderr[-4000:]
    first = json.loads((home / "runs" / "lost" / "run.json").read_text())["mlflow_run"]
    (home / "mlflow.db").rename(home / "mlflow.db.damaged")
    refused = torchrun(1, home, *line)
    assert refused.returncode != 0
    assert f"has no run {first}" in refused.stderr
    assert "give run.new_tracking=true" in refused.stderr
    for _ in range(2):  # the second time there is nothing to make anew
        done = torchrun(1, home, *line, "run.new_tracking=true")
        assert done.returncode == 0, done.stderr[-4000:]
        assert "training is finished already" in done.stderr
        now = json.loads((home / "runs" / "lost" / "run.json").read_text())["mlflow_run"]
        assert now != first
    tracking.connect(home)
    assert [point.step for point in mlflow.MlflowClient().get_metric_history(now, "train/loss")] == list(range(1, 7))
    assert mlflow.get_run(now).data.tags["vitforge.instead_of"] == first
    assert mlflow.MlflowClient().get_model_version("lost", "1").run_id == now
