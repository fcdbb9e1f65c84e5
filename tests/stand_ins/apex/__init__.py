"""Stands in for NVIDIA apex, which is built for GPUs: see `tests/contract/sessions.py`."""
