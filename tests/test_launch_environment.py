"""Who a process is by its environment: what launchers leave there is taken as it is meant, or refused at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.launch_environment import LaunchError, describe, forget_other_launchers, launch
from tests.running import REPOSITORY, environment, script, torchrun_command

ONE_OF_TWO = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
IN_A_RAY_JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


@pytest.fixture
def only(monkeypatch, tmp_path):
    """Sets the variables of launchers that it is given, and no others."""

    def setting(variables):
        kept = environment(tmp_path)
        for name in [name for name in os.environ if name not in kept]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return setting


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"RANK": "1"}, ["RANK=1 is in the environment", "torchrun did not start", "env -u RANK python"]),
        ({"RANK": "0"}, ["RANK=0 is in the environment"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, ["RANK=0, WORLD_SIZE=2 are", "-u RANK -u WORLD_SIZE"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1 is"]),
        ({"WORLD_SIZE": "8"}, ["WORLD_SIZE=8 is"]),
        ({"RANK": "first"}, ["RANK=first is"]),
        ({"RANK": "1", **IN_A_RAY_JOB}, ["RANK=1 is"]),
        ({"TORCHELASTIC_RUN_ID": "x"}, ["TORCHELASTIC_RUN_ID=x is", "RANK, WORLD_SIZE", "env -u TORCHELASTIC_RUN_ID"]),
        ({**ONE_OF_TWO, "MASTER_PORT": ""}, ["but MASTER_PORT is not"]),
        ({**ONE_OF_TWO, "RANK": "2"}, ["RANK=2, WORLD_SIZE=2", "no rank is that"]),
        ({**ONE_OF_TWO, "LOCAL_RANK": "1"}, ["LOCAL_RANK=1", "no rank is that"]),
        ({**ONE_OF_TWO, "WORLD_SIZE": "two"}, ["WORLD_SIZE=two", "no rank is that"]),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}, ["Open MPI started 4 copies", "start it once", "torchrun"]),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, ["mpiexec started 2 copies", "PMI_RANK=1"]),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "3"}, ["srun started 16 copies"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(only, variables, parts):
    only(variables)
    with pytest.raises(LaunchError) as caught:
        launch()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, ""),
        ({"RANK": "", "WORLD_SIZE": ""}, ""),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, ""),
        # Slurm's batch script, and the one process of a step.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "4"}, ""),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "started alone: Ray's workers run on this machine; what "),
        (ONE_OF_TWO, "started by torchrun as rank 1 of 2, 1 of them on this node"),
        ({**ONE_OF_TWO, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "2"}, "started by torchrun as rank 1 of 2, 1 of them on "
         "this node; what mpirun of Open MPI left in the environment is not used"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "RAY_ADDRESS=10.0.0.1:6379: Ray's workers run on that cluster"),
        ({"RAY_ADDRESS": "local"}, ""),
        # A node that `srun --ntasks=4 ray start` started hands its variables to the jobs that run on it.
        ({**IN_A_RAY_JOB, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "started as a Ray job: "),
    ],
)  # fmt: skip
def test_what_was_found_is_said_in_a_line(only, variables, said):
    only(variables)
    assert describe().startswith(said)
    assert bool(said) == bool(describe())
    assert "\n" not in describe()


def test_what_other_launchers_left_is_taken_out_of_a_rank(only, monkeypatch):
    only({**ONE_OF_TWO, **OPEN_MPI, "PMI_RANK": "3", "PMIX_RANK": "3", "SLURM_JOB_ID": "7"})
    forget_other_launchers("torchrun")
    assert {name for name in os.environ if name.startswith(("OMPI_", "PMI"))} == set()
    assert {name: os.environ[name] for name in (*ONE_OF_TWO, "SLURM_JOB_ID")} == {**ONE_OF_TWO, "SLURM_JOB_ID": "7"}
    forget_other_launchers("Ray")
    assert "TORCHELASTIC_RUN_ID" not in os.environ


@pytest.mark.parametrize("command", ["pipeline/evaluate.py", "pipeline/pretrain.py", "data_prep/shard.py"])
def test_a_command_with_a_rank_that_nobody_gave_it_leaves_with_one_message(tmp_path, command):
    done = script(tmp_path, command, "models:/x/1", str(tmp_path / "nothing"), RANK="1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: RANK=1 is in the environment")
    assert len(done.stderr.splitlines()) == 1


ENGINE = """
import torch
from models.presets import vit_config
from models.vit import VisionTransformer
from pipeline import engine, layout, workers
from pipeline.config import OptimizerSettings
deepspeed = engine.prepare_deepspeed()
worker = workers.join(60)
deepspeed.initialize(
    model=torch.nn.Linear(2, 2), optimizer=torch.optim.SGD, config={"train_batch_size": 2}, dist_init_required=False
)
"""


def test_ranks_start_where_mpi_has_left_its_variables(tmp_path):
    """DeepSpeed takes the local rank from them, and ends a rank for which it is another."""
    ranks = tmp_path / "ranks.py"
    ranks.write_text(ENGINE)
    done = subprocess.run(
        torchrun_command(2, (str(ranks),)), cwd=REPOSITORY, capture_output=True, text=True, timeout=240,
        env=environment(tmp_path, PYTHONPATH=str(REPOSITORY), **OPEN_MPI, PMI_RANK="0"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


ADDRESSES = """
import os, socket
import cluster.ray_runtime as runtime
runtime._ANSWERS_S = 1.0
silent, http = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
if os.fork() == 0:
    while True:
        connection = http.accept()[0]
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 400 Bad Request\\r\\n\\r\\n")
        connection.close()
closed = socket.create_server(("127.0.0.1", 0))
addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in (silent, http, closed)]
closed.close()
for address in [*addresses, "http://127.0.0.1:8265", "nothing", "nothing.invalid:6379"]:
    os.environ["RAY_ADDRESS"] = address
    try:
        with runtime.ray_session():
            print("there is one")
    except ValueError as error:
        print(error)
os.killpg(0, 9)
"""


def test_an_address_without_ray_is_named_within_seconds(tmp_path):
    """Not after the quarter of an hour for which Ray itself tries."""
    done = subprocess.run(
        [sys.executable, "-u", "-c", ADDRESSES],
        cwd=REPOSITORY, env=environment(tmp_path), capture_output=True, text=True, timeout=120, start_new_session=True,
    )  # fmt: skip
    messages = done.stdout.splitlines()
    assert len(messages) == 6, done.stdout + done.stderr
    assert all("RAY_ADDRESS=" in message and "unset RAY_ADDRESS" in message for message in messages)
    for message, why in zip(
        messages,
        ["timed out", "is not Ray", "refused", "ray job submit", "HOST:PORT", "nothing.invalid:6379"],
        strict=True,
    ):
        assert why in message


def test_a_ray_that_cannot_start_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    words = ("data_prep/shard.py", str(tmp_path), str(tmp_path / "corpus"))
    code = (
        "import cluster.ray_runtime as runtime\n"
        "from cluster.command import run_command\n"
        "def main():\n"
        "    with runtime.ray_session():\n"
        "        pass\n"
        "run_command(main)\n"
    )
    done = script(tmp_path, "-c", code, *words, RAY_TMPDIR=str(tmp_path / "file"))
    assert done.returncode == 2
    assert "error: Ray did not start on this machine (" in done.stderr
    assert "RAY_TMPDIR" in done.stderr
    assert "torchrun" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_ray_that_is_too_slow_to_start_is_one_message_and_leaves_nothing(tmp_path):
    """Its node manager is stopped as soon as it is there: on a busy machine it is as late as that."""
    code = """
import threading, time
import psutil
import cluster.ray_runtime as runtime
from cluster.command import run_command
runtime._STARTS = 1
def stop():
    while not time.sleep(0.005):
        for child in psutil.Process().children():
            if child.name() == "raylet":
                child.suspend()
                return
def main():
    threading.Thread(target=stop, daemon=True).start()
    try:
        with runtime.ray_session():
            pass
    finally:
        print([child.name() for child in psutil.Process().children() if child.status() != "zombie"])
run_command(main)
"""
    done = script(tmp_path, "-c", code)
    assert done.returncode == 2, done.stderr
    assert (
        "error: Ray did not start on this machine (not within 1 times 30 s): run the same command again" in done.stderr
    )
    logs = Path(done.stderr.split("its logs are in ")[1].strip())
    assert (logs / "gcs_server.out").exists()
    assert "Traceback" not in done.stderr
    assert done.stdout == "[]\n"
