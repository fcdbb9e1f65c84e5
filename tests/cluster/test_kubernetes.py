"""The manifest for Kubernetes: no cluster runs it here, but its schema and its own numbers are checked."""

import copy
import importlib
import itertools
import os
import re
import shlex
from types import ModuleType

import pytest
import yaml

from inrank_megatron.config.cli import parse
from tests.cluster.trainings import RECIPES

DOCUMENTS = list(yaml.safe_load_all((RECIPES / "kubernetes.yml").read_text()))
VERSION = "1.33"  # the first whose jobs count failures by index without a feature gate


@pytest.fixture(scope="module")
def validator() -> ModuleType:
    try:
        return importlib.import_module("kubernetes_validate")
    except ImportError:
        if os.environ.get("CI"):
            raise
        pytest.skip("needs the schemas of Kubernetes: .venv/bin/pip install kubernetes-validate==1.37.0")


def test_the_manifest_has_the_schema_of_kubernetes(validator):
    assert [document["kind"] for document in DOCUMENTS] == ["Service", "Job"]
    for document in DOCUMENTS:
        validator.validate(document, VERSION, strict=True)
    wrong = copy.deepcopy(DOCUMENTS[1])
    wrong["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(validator.ValidationError, match="imagee"):
        validator.validate(wrong, VERSION, strict=True)


def test_the_numbers_and_names_of_the_manifest_agree():
    service, job = DOCUMENTS
    [container] = job["spec"]["template"]["spec"]["containers"]
    script = container["command"][-1].replace("\\\n", " ")
    words = shlex.split(script)
    start = words.index("launch/pretrain_gpt2.py")
    options = dict(itertools.pairwise(words[:start]))
    assert int(options["--nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(options["--nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    name, domain = options["--master-addr"].split(".")
    assert name == f"{job['metadata']['name']}-0"
    assert domain == service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    launch = parse(words[start + 1 :], world_size=16)
    assert re.match("/runs/", launch.config.training.save)
