"""What tests/test_readme.py does not take from the READMEs as it stands: paths, lengths, sizes and numbers of ranks.

And the commands that it does not run, with the reason. Nothing else of a command is replaced.
"""

READMES = ("README.md", "data_prep/README.md", "pipeline/README.md")

PATHS = {
    "s3://BUCKET": "{bucket}",
    "/data/": "{root}/data/",
    "/mnt/": "{root}/mnt/",
    "FOLDER": "{root}/FOLDER",
    '"..."': '"{digest}"',
    "--port 5001": "--port {port}",
    "localhost:5001": "localhost:{port}",
}
"""Text of a command or snippet, and what stands in its place. `~` and $HOME need none: HOME is another."""

LENGTHS = {
    "training.duration": "2 steps",
    "training.global_batch": "8",
    "evaluation.every": "1 steps",
    "optimizer.warmup": "1 steps",
    "checkpoint.every": "2 steps",
}
SIZES = {
    "data.image_size": "32",
    "model.width": "24",
    "model.depth": "1",
    "model.heads": "2",
    "model.mlp_dim": "48",
}
RANKS = {"run.workers": "1"}
"""Of every command that trains: what is given in place of the recipe's values and of the command's own."""

OF_COMMAND = {
    "pipeline/pretrain.py": {**LENGTHS, **SIZES, **RANKS},
    "pipeline/finetune.py": {**LENGTHS, "data.image_size": "32", **RANKS},
    "pipeline/evaluate.py": {},
    "data_prep/shard.py": {},
    "data_prep/subset.py": {},
    "data_prep/verify.py": {},
    "data_prep/show.py": {},
    "data_prep/copy_corpus.py": {},
    "data_prep/card.py": {},
    "data_prep/index.py": {},
}

NOT_RUN = {
    "make demo": "tests/test_main_job.py runs pipeline/demo.py",
    "make test": "this is a part of it",
    "make test-fast": "this is a part of it",
    "make bench": "takes long, and measures instead of testing",
    "make lock": "needs the network, and changes requirements.lock",
    "make": "of other targets",
    "python -m tests.fuzz": "tests/test_fuzz.py runs it on fewer files",
    "python -m tests.image_kinds": "tests/test_image_kinds.py tests the same kinds",
    "python -m tests.image_damage": "tests/test_unusable_images.py damages some of them",
    "python -m tests.faults": "takes long; tests/test_faults.py makes some of its faults",
    "python -m tests.other_readers": "needs timm and Energon; tests/test_other_tools.py runs those that are installed",
    "python -m tests.soak": "takes half an hour",
    ". .venv/bin/activate": "the tests run in it",
    "mlflow server": "MLflow's own, which tests/test_mlflow_server.py runs",
    "ray job stop": "needs a cluster; tests/test_survival_on_ray.py stops one",
    "ray job submit": "needs a cluster; tests/test_main_job.py submits jobs (its settings are read)",
}
"""Beginnings of commands that are not run."""

OUTPUT = ("step 450/562, loss", "ViT-S/16 at 224 px: ", "$VITFORGE_HOME/", "first_batch.png, ")
"""Beginnings of lines that are no commands, in blocks that show what a command prints or writes."""

ROOMS = ("models/ ", "data_prep/ ", "cluster/ ", "pipeline/ ")
