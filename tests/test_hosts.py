"""Two hosts: what the manifests start is a cluster that only its token opens, and it trains like one machine."""

import os
import re
import secrets
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.corpora import image_folder, make_corpus
from tests.running import losses, script, tiny, torchrun
from tests.test_manifests import MANIFESTS, pods
from tests.two_hosts import ADDRESSES, end_processes, two_hosts, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(REASON is not None, reason=f"two hosts need network namespaces: {REASON}"),
]
STEPS = 150
TINY = tiny(STEPS, 25)
PYTHON = Path(sys.executable).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("hosts")
    return make_corpus(image_folder(root / "images", classes=3, images=20), root / "corpus")


@pytest.fixture(scope="module")
def one_machine(corpus, tmp_path_factory):
    """The losses of two ranks under torchrun."""
    home = tmp_path_factory.mktemp("one")
    done = torchrun(2, home, *TINY, f"data.corpus={corpus.path}", "run.name=a", "run.workers=null")
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(home / "runs" / "a" / "metrics.jsonl")


def test_bare_machines_train_together_and_only_the_token_opens_them(corpus, one_machine, tmp_path):
    script = str(MANIFESTS / "ray_node.sh")
    log = tmp_path / "nodes.log"
    path = f"{PYTHON}:{os.environ['PATH']}"
    with two_hosts(tmp_path / "pair", ray=False, PATH=path) as pair:
        first, second = pair.hosts
        first.start("bash", script, "head", ADDRESSES[0], "--num-cpus", "1", log=log)
        pair.wait_for_nodes({ADDRESSES[0]})
        joined = second.start("bash", script, "join", ADDRESSES[0], "--num-cpus", "1", log=log)
        pair.wait_for_nodes(set(ADDRESSES))

        run = pair.start(*TINY, f"data.corpus={corpus.path}", "run.name=a", "run.workers=2", log=tmp_path / "run.log")
        seen: set[int] = set()
        while run.poll() is None:
            seen |= {number for number in range(2) if pair.workers(number)}
            time.sleep(0.5)
        assert run.returncode == 0, (tmp_path / "run.log").read_text()[-4000:]
        assert seen == {0, 1}
        assert losses(tmp_path / "pair" / "home" / "runs" / "a" / "metrics.jsonl") == one_machine

        # The job interface: on the first machine's loopback only, and closed without the token.
        ask = (
            "import sys, urllib.error, urllib.request\n"
            "try:\n"
            "    print(urllib.request.urlopen(sys.argv[1], timeout=5).status)\n"
            "except urllib.error.HTTPError as error:\n"
            "    print(error.code)\n"
            "except OSError:\n"
            "    print('no answer')\n"
        )
        inside = first.run(sys.executable, "-c", ask, "http://127.0.0.1:8265/api/jobs/")
        outside = second.run(sys.executable, "-c", ask, f"http://{ADDRESSES[0]}:8265/api/jobs/")
        assert (inside.stdout.strip(), outside.stdout.strip()) == ("401", "no answer"), inside.stderr + outside.stderr
        first.variables["RAY_AUTH_TOKEN"], right = secrets.token_hex(32), first.variables["RAY_AUTH_TOKEN"]
        refused = first.run(str(PYTHON / "ray"), "job", "list", "--address", "http://127.0.0.1:8265")
        first.variables["RAY_AUTH_TOKEN"] = right
        assert refused.returncode != 0
        allowed = first.run(str(PYTHON / "ray"), "job", "list", "--address", "http://127.0.0.1:8265")
        assert allowed.returncode == 0, allowed.stderr

        # What KubeRay's manifests ask of a node: its probes, and the word to Ray before a pod goes.
        for host, pod in zip(pair.hosts, pods("kuberay_cluster.yaml"), strict=True):
            for probe in ("readinessProbe", "livenessProbe"):
                done = host.run(*pod["containers"][0][probe]["exec"]["command"])
                assert done.returncode == 0, done.stderr
        second.variables["FQ_RAY_IP"] = ADDRESSES[0]
        done = second.run(*pods("kuberay_cluster.yaml")[1]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"])
        assert done.returncode == 0, done.stderr
        pair.wait_for_nodes({ADDRESSES[0]})
        assert joined.wait(60) == 0  # a drained machine is about to go: it does not join again

        # A node that dies comes back by itself.
        second.start("bash", script, "join", ADDRESSES[0], "--num-cpus", "1", log=log)
        pair.wait_for_nodes(set(ADDRESSES))
        before = dict(pair.nodes())
        pair.kill_raylet(1)
        deadline = time.monotonic() + 120
        while (now := dict(pair.nodes())).get(ADDRESSES[1]) in (None, before[ADDRESSES[1]]):
            assert time.monotonic() < deadline, (before, now, log.read_text()[-2000:])
            time.sleep(0.5)


def test_sharding_uses_both_hosts_and_outlives_one(tmp_path):
    source = image_folder(tmp_path / "images", classes=3, images=400)
    words = ("data_prep/shard.py", str(source))
    alone = script(tmp_path, *words, str(tmp_path / "alone"), "shard_mb=0.01")
    assert alone.returncode == 0, alone.stderr[-3000:]
    log, destination = tmp_path / "shard.log", tmp_path / "corpus"
    with two_hosts(tmp_path / "pair") as pair:
        run = pair.start(*words, str(destination), "shard_mb=0.01", log=log)
        seen: set[int] = set()
        while seen != {0, 1} or len(list(destination.glob("*.record.json"))) < 5:
            assert run.poll() is None, log.read_text()[-3000:]
            seen |= {number for number in range(2) if pair.hosts[number].find("ray::write_shard")}
            time.sleep(0.01)
        pair.kill_raylet(1)
        assert run.wait(300) == 0, log.read_text()[-3000:]
    tars = {path.name: path.read_bytes() for path in (tmp_path / "alone").glob("*.tar")}
    assert len(tars) > 100
    assert {path.name: path.read_bytes() for path in destination.glob("*.tar")} == tars


STUB = """#!/usr/bin/env bash
# What Slurm does with a step, as far as our script asks: run it on the node that --nodelist names.
holders=({holders})
while [[ $1 == --* ]]; do
    case $1 in --nodelist=*) node=${{1#--nodelist=host}} ;; esac
    shift
done
exec nsenter -t "${{holders[$node]}}" -n -m -u --wd="$PWD" "$@"
"""
CONTROL = """#!/usr/bin/env bash
case "$1" in
show) printf 'host0\nhost1\n' ;;
*) echo "$@" >>"{record}" ;;
esac
"""


def test_the_slurm_script_saves_before_the_limit_and_goes_on_when_it_is_queued_again(corpus, one_machine, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    with two_hosts(tmp_path / "pair", ray=False, PATH=f"{tools}:{PYTHON}:{os.environ['PATH']}") as pair:
        stubs = {
            "srun": STUB.format(holders=" ".join(str(host.holder.pid) for host in pair.hosts)),
            "scontrol": CONTROL.format(record=tmp_path / "scontrol.log"),
        }
        for name, text in stubs.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        for host in pair.hosts:
            del host.variables["RAY_AUTH_TOKEN"], host.variables["RAY_AUTH_MODE"]  # the script's to set
        slurm = {
            "SLURM_SUBMIT_DIR": str(MANIFESTS.parents[1]), "SLURM_JOB_NODELIST": "host[0-1]", "SLURM_JOB_ID": "7",
            "SLURM_CPUS_PER_TASK": "1",
        }  # fmt: skip
        log, words = tmp_path / "slurm.log", [*TINY, f"data.corpus={corpus.path}", "run.name=a", "run.workers=2"]
        metrics = tmp_path / "pair" / "home" / "runs" / "a" / "metrics.jsonl"

        def job():
            return pair.hosts[0].start("bash", str(MANIFESTS / "slurm.sh"), *words, log=log, **slurm)

        # The time limit comes near: the run saves, and the job goes back to the queue.
        first = job()
        while not losses(metrics):
            assert first.poll() is None, log.read_text()[-4000:]
            time.sleep(0.02)
        first.send_signal(signal.SIGUSR1)
        assert first.wait(300) != 0
        assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n", log.read_text()[-4000:]
        saved = max(losses(metrics))
        assert saved < STEPS
        end_processes(pair.hosts[0])  # as Slurm does when a job ends
        end_processes(pair.hosts[1])

        # The queue starts it again.
        assert job().wait(600) == 0, log.read_text()[-4000:]
        assert f"step-{saved:08d}" in log.read_text().split("resumed from", 1)[1][:300]
        assert losses(metrics) == one_machine
        assert re.search("2 nodes", log.read_text())
