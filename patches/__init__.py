"""Third-party symbols that must behave otherwise, nearly all on a machine without CUDA, one file each.

Every file has ``needed()``, which probes the symbol as it is in this process, and ``apply()``,
which replaces it if the probe fails. So a second ``apply()`` does nothing, the patches of CPU runs
never touch a machine with CUDA, and an upstream release that fixes the symbol retires its patch by
itself.
"""
