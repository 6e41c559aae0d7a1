#!/usr/bin/env bash
# A Ray cluster on machines that you log in to. On every machine: this repository, the environment of
# requirements.lock (active), and the storage of corpora and runs (mounted at the same path, or S3).
#
#   once, on the first machine:  RAY_AUTH_MODE=token ray get-auth-token --generate
#                                scp ~/.ray/auth_token OTHER:.ray/auth_token     # for each other machine; mode 600
#   on the first machine:        bash cluster/manifests/ray_node.sh head 10.0.0.1    # its own address
#   on each other machine:       bash cluster/manifests/ray_node.sh join 10.0.0.1    # the first machine's address
#
# Then, on the first machine (from elsewhere through `ssh -L 8265:127.0.0.1:8265 FIRST`):
#
#   export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
#   ray job submit --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}' --working-dir . -- \
#       python pipeline/pretrain.py vit-b16-imagenet21k data.corpus=/mnt/corpora/in21k run.home=/mnt/vitforge
#
# `ray job stop ID` then leaves the run 120 s to save. The dashboard, and with it the job interface, answers on loopback
# only, and only to who holds the token. Ray's other ports answer on every interface, also only to the token, which
# travels in the clear: keep the machines on a network of their own.
set -euo pipefail

usage="usage: ray_node.sh head OWN_ADDRESS | ray_node.sh join HEAD_ADDRESS  [options of ray start]"
role=${1:?$usage}
address=${2:?$usage}
shift 2
export RAY_AUTH_MODE=token
if [[ -z ${RAY_AUTH_TOKEN:-} && ! -s ${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token} ]]; then
    echo "no token in ${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}: make it with" \
        "'RAY_AUTH_MODE=token ray get-auth-token --generate' on the first machine and copy it here" >&2
    exit 2
fi

case $role in
head)
    exec ray start --block --head --node-ip-address "$address" --port 6379 --dashboard-host 127.0.0.1 "$@"
    ;;
join)
    # A node that dies, or ends itself because it lost its head for a while, comes back, and an elastic run grows again.
    # One that was drained stays away: somebody is about to take the machine.
    node=
    trap 'kill -TERM $node 2>/dev/null; wait; exit 0' TERM INT
    while true; do
        ray start --block --address "$address:6379" "$@" &
        node=$!
        started=
        while kill -0 "$node" 2>/dev/null; do
            if pgrep -P "$node" -x raylet >/dev/null; then
                started=yes
            elif [[ -n $started ]]; then # Ray 2.60 goes on waiting when its raylet ended in good order
                sleep 3
                kill -0 "$node" 2>/dev/null || break
                kill -TERM "$node"
                wait "$node" || true
                echo "this node was drained: not started again" >&2
                exit 0
            fi
            sleep 1
        done
        wait "$node" || true
        echo "the Ray node has died; starting it again in 5 s" >&2
        sleep 5
    done
    ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
