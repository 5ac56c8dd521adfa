"""JobSets: validity by the schemas of Kubernetes and JobSet, and the arguments that a container receives."""

import json
import re

import jsonschema
import kubernetes_validate
import pytest

from launch.gke import MAIN
from launch.jobs import Job, build_launcher
from tests.launch.fakes import CODE, GOLDEN, awkward_job, check_golden, sweep_jobs
from tests.refusals import refused

TPU, GPU = "gke:image=r/i:tpu=v5e:4x4", "gke:image=r/i:gpu=nvidia-h100-80gb:gpus=8:nodes=2"
ALL = f"{TPU}:slices=2:spot=true:cpus=48:memory=200Gi:grace=60:namespace=ml:service_account=me:queue=q"
VERSIONS = ("1.31", kubernetes_validate.latest_version())


def manifests(text, jobs, retries=3):
    submission = build_launcher(text).submission(jobs, CODE, "gs://b/s", retries)
    return [json.loads(text) for path, text in submission.files.items()]


def pod(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(("name", "text"), [("gke_tpu.txt", ALL), ("gke_gpu.txt", GPU)])
def test_submission(name, text):
    check_golden(name, build_launcher(text).submission(sweep_jobs("gs://b/lr"), CODE, "gs://b/lr", 3))


@pytest.mark.parametrize("text", [
    TPU, ALL, GPU, "gke:image=r/i:tag:build=false:tpu=v5p:2x2x4", "gke:image=r/i:tpu=v6e:1x1",
    "gke:image=r/i:gpu=nvidia-l4:spot=true",
])  # fmt: skip
def test_manifests_conform_to_the_schemas(text):
    schema = json.loads((GOLDEN / "jobset.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jobs = [*sweep_jobs("gs://b/s"), awkward_job("gs://b/s/x"), Job("A" * 120, ("m",), "gs://b/s/" + "A" * 120)]
    for manifest in manifests(text, jobs):
        jsonschema.validate(manifest, schema)
        for index, replicated in enumerate(manifest["spec"]["replicatedJobs"]):
            name = f"{manifest['metadata']['name']}-{replicated['name']}-{index}"
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, **replicated["template"]}
            for version in VERSIONS:
                kubernetes_validate.validate(job, version, strict=True)
            # A pod's name, which is also its host name, is that of the Job with an index and five more characters.
            assert len(f"{name}-9999-abcde") <= 63


def expanded(word, variables):
    """Expands `$(NAME)` as Kubernetes documents it: `$$` becomes `$`, and unknown names are left unchanged."""
    pattern = r"\$\$|\$\(([^)]*)\)"
    return re.sub(pattern, lambda found: "$" if found[0] == "$$" else variables.get(found[1], found[0]), word)


@pytest.mark.parametrize("text", [TPU, GPU, "gke:image=r/i:gpu=nvidia-l4"])
def test_arguments_are_passed_unchanged(text):
    job = awkward_job("gs://b/s/it's $(touch canary)")
    (manifest,) = manifests(text, [job])
    (container,) = pod(manifest)["containers"]
    variables = {"JOB_COMPLETION_INDEX": "1", "HOME": "/root", "A": "a"}
    received = [expanded(word, variables) for word in container["command"] + container["args"]]
    name = manifest["metadata"]["name"]
    multihost = [f"--coordinator={name}-w-0-0.{name}:8476", "--num_processes=2", "--process_id=1"] * ("nodes=2" in text)
    assert received == ["python", "-m", *job.command, *multihost]


@pytest.mark.parametrize(("text", "pods", "chips", "accelerator", "topology"), [
    ("v5e:4x4", 4, 4, "tpu-v5-lite-podslice", "4x4"),
    ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice", "1x1"),
    ("v5e:2x4", 2, 4, "tpu-v5-lite-podslice", "2x4"),
    ("v5e:2x4:chips=8", 1, 8, "tpu-v5-lite-podslice", "2x4"),
    ("v4:2x2x4", 4, 4, "tpu-v4-podslice", "2x2x4"),
    ("v5p:4x4x4", 16, 4, "tpu-v5p-slice", "4x4x4"),
    ("v6e:16x16", 64, 4, "tpu-v6e-slice", "16x16"),
])  # fmt: skip
def test_tpu_slices(text, pods, chips, accelerator, topology):
    (manifest,) = manifests(f"gke:image=i:tpu={text}:slices=3", sweep_jobs("gs://b/s")[:1])
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 3 and job["parallelism"] == job["completions"] == pods
    limits = pod(manifest)["containers"][0]["resources"]["limits"]
    assert limits == {"google.com/tpu": str(chips)}
    selector = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topology}
    assert pod(manifest)["nodeSelector"] == selector


@pytest.mark.parametrize(("text", "field"), [
    ("tpu=v5e:4x4:gpu=g", "tpu"), ("tpu=v5e:4", "tpu"), ("tpu=v9:4x4", "tpu"), ("tpu=v5e:0x4", "tpu"),
    ("tpu=v5e:4x4:chips=3", "chips"), ("tpu=v5e:4x4:slices=0", "slices"), ("gpu=g:slices=2", "slices"),
    ("gpu=g:nodes=0", "nodes"),
])  # fmt: skip
def test_invalid_options_are_refused(text, field):
    with refused(f"launcher.{field}"):
        build_launcher(f"gke:image=i:{text}")


def outcome(manifest, code=None, evicted=False):
    """Returns what Kubernetes does after a pod has ended with a code or was evicted.

    The first matching rule of the Job's failure policy applies; otherwise the pod counts towards backoffLimit. Then the
    first matching rule of the JobSet's failure policy applies; otherwise the JobSet restarts.
    """
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason = "BackoffLimitExceeded"
    for rule in job["podFailurePolicy"]["rules"]:
        exits, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", ())
        matches = exits and exits["operator"] == "In" and exits["containerName"] == MAIN and code in exits["values"]
        if matches or (evicted and any(condition["type"] == "DisruptionTarget" for condition in conditions)):
            if rule["action"] == "Ignore":
                return "another pod"
            reason = "PodFailurePolicy"
            break
    assert job["backoffLimit"] == 0
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("text", [TPU, GPU])
def test_exit_codes(text):
    (manifest,) = manifests(text, sweep_jobs("gs://b/s")[:1], retries=5)
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert [outcome(manifest, code) for code in (2, 3)] == ["FailJobSet"] * 2
    assert [outcome(manifest, code) for code in (1, 70, 134, 137)] == ["RestartJobSet"] * 4
    assert outcome(manifest, 75) == outcome(manifest, 137, evicted=True) == "another pod"
    assert pod(manifest)["restartPolicy"] == "Never"  # required by podFailurePolicy


def test_spot_nodes():
    for text in (TPU, GPU):
        (plain,), (spot,) = (manifests(f"{text}{option}", sweep_jobs("gs://b/s")[:1]) for option in ("", ":spot=true"))
        assert "tolerations" not in pod(plain) and "cloud.google.com/gke-spot" not in pod(plain)["nodeSelector"]
        (toleration,) = pod(spot)["tolerations"]
        assert pod(spot)["nodeSelector"][toleration["key"]] == toleration["value"] == "true"
        assert toleration["effect"] == "NoSchedule"


def test_existing_image_is_not_built():
    submission = build_launcher("gke:image=r/i:v1:build=false:gpu=g").submission(
        sweep_jobs("gs://b/s"), CODE, "gs://b/s", 0
    )
    assert {command[0] for command in submission.commands} == {"kubectl"}
    assert pod(json.loads(next(iter(submission.files.values()))))["containers"][0]["image"] == "r/i:v1"


def test_image_runs_modules_as_an_unprivileged_user():
    text = (GOLDEN.parents[2] / "launch" / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["python", "-m"]' in text and text.index("USER user") < text.index("ENTRYPOINT")
