#!/usr/bin/env bash
# A stage on a Slurm cluster: Ray on every node of the allocation, the stage's command on the first.
#
#   sbatch --nodes=4 cluster/manifests/slurm.sh pipeline/pretrain.py vit-l16-imagenet21k \
#       data.corpus=/mnt/corpora/in21k run.home=/mnt/vitforge
#
# Five minutes before the time limit the run saves, and the job goes back to the queue; it then goes on from there.
# `scancel --signal=TERM --batch JOB` lets it save and leaves it ended. Submitted again, the same command continues.
#SBATCH --job-name=vitforge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8          # CHANGE: GPUs of a node
#SBATCH --cpus-per-task=96         # CHANGE: cores of a node
#SBATCH --exclusive
#SBATCH --time=24:00:00            # CHANGE: what your partition allows
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vitforge-%j.log
set -euo pipefail

# CHANGE: the environment of requirements.lock, on every node
# source /shared/vitforge/.venv/bin/activate
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"

# Only this job's processes hold the token; Slurm hands it to them in their environment.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # Slurm does not hand it on by itself

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" --overlap hostname -I | tr ' ' '\n' | grep -m1 .)
# Several jobs of a user, one after the other on a node, must not meet in /tmp/ray.
local_options=(--block --num-cpus "${SLURM_CPUS_PER_TASK:-1}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}")

srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" --overlap \
    ray start --head --node-ip-address "$address" --port 6379 --dashboard-host 127.0.0.1 \
    --temp-dir "/tmp/ray-$SLURM_JOB_ID" "${local_options[@]}" &
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap \
        ray start --address "$address:6379" "${local_options[@]}" &
done

# Until every node has joined.
python - "$address:6379" "${#nodes[@]}" <<'PYTHON'
import sys
import time

from ray._raylet import GcsClient

deadline = time.monotonic() + 300
while True:
    try:
        nodes = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5).values()
        if sum(node.state == 0 for node in nodes) >= int(sys.argv[2]):
            break
    except Exception as error:  # the head is not there yet
        if time.monotonic() > deadline:
            sys.exit(f"Ray did not start on {sys.argv[1]}: {error}")
    if time.monotonic() > deadline:
        sys.exit(f"not all of {sys.argv[2]} nodes joined Ray within 300 s")
    time.sleep(1)
PYTHON

export RAY_ADDRESS=$address:6379
python "$@" &
stage=$!
again=
trap 'again=yes; kill -TERM "$stage"' USR1
trap 'kill -TERM "$stage"' TERM
status=0
wait "$stage" || status=$?
while kill -0 "$stage" 2>/dev/null; do # the wait was cut short by a signal: the run is saving
    status=0
    wait "$stage" || status=$?
done
if [[ -n $again && $status -ne 0 ]]; then
    echo "the time limit is near: back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
