"""What ranks agree on without waiting: with two ranks, and with one."""

import subprocess
import sys

from tests.running import REPOSITORY, environment, torchrun_command

RANKS = """
import os
import torch
from pipeline import workers
from pipeline.consensus import Consensus
worker = workers.join(60)
consensus = Consensus(("stop", "loss"), worker, 60)
heard = []
for step in range(6):
    heard.append(consensus.exchange(stop=worker.rank == 1 and step == 2, loss=step + worker.rank))
last = consensus.settle()
assert consensus.settle() is None
assert heard[0] is None
line = f"{[sums['stop'] for sums in heard[1:]]} {[sums['loss'] for sums in heard[1:]]} {last}\\n"
torch.distributed.destroy_process_group()
os.write(1, line.encode())  # in one piece: both ranks write to one pipe
"""


def test_every_rank_hears_the_same_one_step_later(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    variables = environment(tmp_path, PYTHONPATH=str(REPOSITORY))
    for command in (torchrun_command(2, (str(script),)), [sys.executable, str(script)]):
        done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        two = "torch.distributed.run" in command
        stops = [0.0, 0.0, float(two), 0.0, 0.0]
        losses = [step * (1 + two) + two for step in range(6)]
        line = f"{stops} {[float(loss) for loss in losses[:5]]} {{'stop': 0.0, 'loss': {float(losses[5])}}}"
        assert done.stdout.splitlines() == [line] * (1 + two)
