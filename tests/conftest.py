"""Before any test imports Ray: how it authenticates is read from the environment at its import."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cluster.ray_runtime

assert cluster.ray_runtime.REPOSITORY
