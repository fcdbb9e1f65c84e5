"""DeepSpeed imports its autotuner without MLflow, on a CPU and with CUDA.

Reason: every import of DeepSpeed imports the autotuner, which imports MLflow where it is installed, with
FastAPI and pandas: a quarter of what the imports of a run's process cost. No run tunes itself.

Checked with deepspeed 0.19.
"""

import importlib

from inrank_megatron_patches.imports import is_imported, left_out

_MODULE = "deepspeed.autotuning.autotuner"


def needed() -> bool:
    """Whether the autotuner has still to be imported."""
    return not is_imported(_MODULE)


def apply() -> None:
    """Import the autotuner, and DeepSpeed with it, without MLflow."""
    if needed():
        with left_out("mlflow"):
            importlib.import_module(_MODULE)
