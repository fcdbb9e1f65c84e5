"""Runs as YAML files; a package so that an installed project carries them."""
