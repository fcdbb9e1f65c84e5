"""The optional sinks with their real packages: what arrives, what a resumed run goes on with."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from inrank_megatron.config.loading import from_flat
from inrank_megatron.errors import UserError
from inrank_megatron.reporting.sinks.registry import SINKS, check_installed, open_sinks

LAYER = "decoder.layers.0.mlp.linear_fc1"
SERVER_PACKAGES = ("flask", "flask_cors", "sqlalchemy", "alembic", "graphene", "huey", "aiohttp")


def settings(**chosen):
    return from_flat({"model_preset": "tiny", "train_iters": 8, **chosen})


def session(config, folder, steps, *, is_new):
    """Send the steps to the one sink of ``config``; what it says went wrong."""
    [sink] = open_sinks(config, folder, is_new=is_new)
    for step in steps:
        sink.scalars({"lm loss": 10.0 - step, f"rank/{LAYER}": 4}, step)
    sink.close(finished=not is_new, patience=120)
    return sink.fault()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_none_is_the_default(tmp_path):
    assert open_sinks(settings(), tmp_path, is_new=True) == []
    check_installed(settings())


@pytest.mark.parametrize("entry", SINKS, ids=lambda entry: entry.extra)
def test_a_missing_package_is_refused_with_its_command(entry, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == entry.package else find(name, *rest)
    )
    value = 9400 if entry.extra == "prometheus" else "a"
    with pytest.raises(UserError, match=re.escape(f"pip install 'inrank-megatron[{entry.extra}]'")):
        check_installed(settings(**{entry.setting: value}))


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = settings(wandb_project="project")
    assert session(config, tmp_path, range(1, 5), is_new=True) is None
    assert session(config, tmp_path, range(4, 9), is_new=False) is None
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    known = (tmp_path / "wandb_run_id").read_text().strip()
    assert [file.stem for file in files] == [f"run-{known}"] * 2, "the second goes on with the first's run"
    for file, steps in zip(files, ([1, 2, 3, 4], [4, 5, 6, 7, 8]), strict=True):
        deadline = time.monotonic() + 60
        while steps_of(file) != steps and time.monotonic() < deadline:  # its own process writes
            time.sleep(0.1)
        assert steps_of(file) == steps


def steps_of(file):
    """The steps in a log of W&B, whose records of protobuf hold names and values as text."""
    found = re.findall(rb"iteration\x82\x01.(\d+)", file.read_bytes(), re.DOTALL)
    return sorted({int(step) for step in found})


def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_mlflow(tmp_path, f"file:{tmp_path / 'store'}")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in SERVER_PACKAGES),
    reason="MLflow's server: pip install flask flask-cors sqlalchemy alembic graphene huey aiohttp",
)
def test_mlflow_on_its_server(tmp_path):
    port, log = free_port(), tmp_path / "log"
    store = f"sqlite:///{tmp_path / 'store.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", store, "--default-artifact-root", str(tmp_path)]
    with log.open("w") as output:
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=env)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", log)
        check_mlflow(tmp_path, f"http://127.0.0.1:{port}")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


def wait_for(address, log):
    for _ in range(200):
        try:
            return urllib.request.urlopen(address, timeout=5).read()
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def check_mlflow(folder, uri):
    from mlflow.tracking import MlflowClient

    config = settings(mlflow_experiment="inrank", mlflow_tracking_uri=uri, mlflow_run_name="first")
    assert session(config, folder, range(1, 5), is_new=True) is None
    client = MlflowClient(tracking_uri=uri)
    known = (folder / "mlflow_run_id").read_text().strip()
    assert client.get_run(known).info.status == "KILLED"
    assert session(config, folder, range(5, 9), is_new=False) is None
    run = client.get_run(known)
    assert (run.info.status, run.info.run_name, run.data.params["train_iters"]) == ("FINISHED", "first", "8")
    history = client.get_metric_history(known, "lm loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(s, 10.0 - s) for s in range(1, 9)]
    experiment = client.get_experiment_by_name("inrank")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_an_unreachable_server_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = settings(mlflow_experiment="inrank", mlflow_tracking_uri=f"http://127.0.0.1:{free_port()}")
    assert "MLflow: cannot be opened" in session(config, tmp_path, range(1, 3), is_new=True)


def test_prometheus_is_scraped_while_the_run_goes_on(tmp_path):
    port = free_port()
    [sink] = open_sinks(settings(prometheus_port=port), tmp_path, is_new=True)
    for step in (1, 2):
        sink.scalars({"lm loss": 10.0 - step, f"rank/{LAYER}": 4, "rank/mean": 4.0}, step)
    deadline, text = time.monotonic() + 60, ""
    while "inrank_iteration 2.0" not in text and time.monotonic() < deadline:
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        except OSError:
            time.sleep(0.1)
    assert f'inrank_rank{{layer="{LAYER}"}} 4.0' in text
    assert "inrank_lm_loss 8.0" in text and "inrank_rank_mean 4.0" in text
    [second] = open_sinks(settings(prometheus_port=port), tmp_path, is_new=True)
    second.close(finished=True)
    assert "Prometheus: cannot be opened (OSError" in second.fault(), "the port is taken"
    sink.close(finished=True)
    assert sink.fault() is None
