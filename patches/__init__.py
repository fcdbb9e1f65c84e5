"""Third-party symbols that must behave otherwise on a machine without CUDA, one file each.

Every file has ``needed()``, which probes the symbol as it stands in this process, and ``apply()``,
which replaces it if the probe fails. So a second ``apply()`` does nothing, a machine with CUDA is
never touched, and an upstream release that mends the symbol retires its patch by itself.
"""
