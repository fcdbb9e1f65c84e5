"""Where the scalars of a run go besides its own files, one file each; ``registry.py`` lists them."""
