"""What people start clusters with: right by the schemas of those who read it, and never an open job interface."""

import json
import re
import subprocess
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from tests.running import REPOSITORY

MANIFESTS = REPOSITORY / "cluster" / "manifests"
SCHEMAS = json.loads((Path(__file__).parent / "schemas" / "kuberay.json").read_text())
SCRIPTS = ["ray_node.sh", "slurm.sh"]
KUBERAY = ["kuberay_cluster.yaml", "kuberay_job.yaml"]


def documents(name):
    return list(yaml.safe_load_all((MANIFESTS / name).read_text()))


def check(document):
    schema = {"$schema": SCHEMAS["$schema"], "definitions": SCHEMAS["definitions"]}
    jsonschema.validate(document, {**schema, "$ref": f"#/definitions/{document['kind']}"})


def cluster(name):
    """The RayClusterSpec of a manifest."""
    spec = next(d["spec"] for d in documents(name) if d["kind"] in ("RayCluster", "RayJob"))
    return spec.get("rayClusterSpec", spec)


def pods(name):
    """The pod specs of a manifest, the head's first."""
    spec = cluster(name)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests_follow_the_schemas(name):
    kinds = [document["kind"] for document in documents(name)]
    assert kinds in (["ServiceAccount", "RayCluster"], ["ServiceAccount", "RayJob"])
    for document in documents(name):
        check(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "authOptions", "mode"), "none"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMounts", 0, "path"), "/x"),
        (("spec", "workerGroupSpecs", 0, "replica"), 3),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "cpu"), "many"),
    ],
)
def test_the_schemas_notice_what_is_wrong(path, value):
    document = documents("kuberay_cluster.yaml")[1]
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(document)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_clusters_answer_to_the_token_only_and_stay_inside(name):
    spec = cluster(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not spec["headGroupSpec"].get("enableIngress")
    assert "headService" not in spec["headGroupSpec"]
    for pod in pods(name):
        assert not pod.get("hostNetwork")
        assert not any("hostPort" in port for c in pod["containers"] for port in c.get("ports", []))
        given = [variable["name"] for c in pod["containers"] for variable in c.get("env", [])]
        assert not [variable for variable in given if variable.startswith("RAY_AUTH")]  # the operator's to set


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_nodes_have_what_training_needs(name):
    head, *workers = pods(name)
    accounts = [d["metadata"]["name"] for d in documents(name) if d["kind"] == "ServiceAccount"]
    for pod in (head, *workers):
        assert [pod["serviceAccountName"]] == accounts
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert "emptyDir" in mounts["/scratch"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["readinessProbe"]
        assert container["livenessProbe"]
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert variables["VITFORGE_CACHE"].startswith("/scratch/")
    for pod in workers:
        assert int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) > 0
        (seconds,) = re.findall(r"deadline-remaining-seconds (\d+)", str(pod["containers"][0]["lifecycle"]))
        assert int(seconds) < pod["terminationGracePeriodSeconds"]


def test_a_stopped_job_has_time_to_save():
    job = documents("kuberay_job.yaml")[1]["spec"]
    assert int(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    for name in ("kuberay_cluster.yaml", "ray_up_aws.yaml", "ray_node.sh"):
        submits = re.findall(r"ray job submit(?:.*\\\n)*.*", (MANIFESTS / name).read_text())
        assert submits
        assert all("RAY_JOB_STOP_WAIT_TIME_S" in line for line in submits)


def test_the_launcher_file_passes_rays_own_check():
    from ray.autoscaler._private.util import validate_config

    config = documents("ray_up_aws.yaml")[0]
    validate_config(config)
    assert "~/.ray/auth_token" in config["file_mounts"]


def strings(node):
    """Every string in a parsed document."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)


def ray_starts():
    """Every `ray start` of the manifests: file and the command to its end."""
    found = []
    for path in sorted(MANIFESTS.iterdir()):
        if path.suffix == ".yaml":
            text = "\n".join(strings(documents(path.name)))
        else:
            text = re.sub(r"^\s*#.*", "", path.read_text().replace("\\\n", " "), flags=re.MULTILINE)
        found += [(path.name, command) for command in re.findall(r"ray start .*", text)]
    return found


def test_every_head_binds_its_job_interface_to_loopback_and_wants_the_token():
    starts = ray_starts()
    assert {name for name, _ in starts} == {"ray_node.sh", "slurm.sh", "ray_up_aws.yaml"}
    heads = [(name, command) for name, command in starts if "--head" in command]
    assert len(heads) == 3
    for _, command in heads:
        assert re.search(r"--dashboard-host[ =]127\.0\.0\.1", command), command
    for name in {name for name, _ in starts}:
        assert "RAY_AUTH_MODE=token" in (MANIFESTS / name).read_text()
    assert "0.0.0.0" not in "".join(path.read_text() for path in MANIFESTS.iterdir()).replace("127.0.0.1", "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name):
    done = subprocess.run(["bash", "-n", str(MANIFESTS / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", KUBERAY)
def test_the_bash_inside_manifests_is_bash(name):
    for pod in pods(name):
        for container in pod["containers"]:
            for command in re.findall(r"bash', '-c', '(.*?)'\]", str(container.get("lifecycle", ""))):
                assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0


def test_a_machine_without_the_token_does_not_start(tmp_path):
    done = subprocess.run(
        ["bash", str(MANIFESTS / "ray_node.sh"), "head", "127.0.0.1"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert done.returncode == 2
    assert "get-auth-token --generate" in done.stderr
