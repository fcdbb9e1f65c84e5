"""Engines on layouts, and the checks that the changes of a training get on each."""

from dataclasses import dataclass

from tests.contract.layouts import LAYOUTS, Layout

ZERO_0, ZERO_3 = {"zero_stage": 0}, {"zero_stage": 3}
APEX = {"optimizer": "apex-fused-adam"}
BF16 = {"bf16": True}
BF16_OFFLOADED = {"bf16": True, "zero_stage": 2, "offload_optimizer": True}
FP16_ZERO_3 = {"fp16": True, "zero_stage": 3}

RESETS = (("full", 0.9), ("random", 0.9), ("magnitude", 0.9))
MORE_RESETS = (*RESETS, ("random", 0.999), ("magnitude", 0.999))
"""Ways of ReLoRA's restart, and the fraction of the moments that they clear."""

GROWTHS = {"absorbed": {"absorb_columns": True, "new_column_moments": "mean"}, "default": {}}


@dataclass(frozen=True, eq=False)
class Setup:
    """An engine on a layout, and what is looked at there.

    Args:
        layout_name: of ``LAYOUTS``.
        settings: of the engine.
        growth: ways of it in ``GROWTHS``.
        restarts: reset and cleared fraction.
        switches: row of ``CASES`` and truncation. Those by outputs are judged by what one rank alone sees of
            inputs and gradients: on ``TP1 DP1`` in the same precision.
        spectra: whether those that methods decide on are compared with dense ones.
        multiplier: whether the factors' learning rate is.
    """

    layout_name: str
    settings: dict
    growth: tuple[str, ...] = ()
    restarts: tuple[tuple[str, float], ...] = ()
    switches: tuple[tuple[str, str], ...] = ()
    spectra: bool = False
    multiplier: bool = False

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.layout_name]

    @property
    def half(self) -> bool:
        return "bf16" in self.settings or "fp16" in self.settings

    def __str__(self) -> str:
        words = [name if value is True else f"{name}={value}" for name, value in self.settings.items()]
        return "-".join([self.layout_name, *words])


PLAIN = ("inrank-efficient", "plain")
PLAIN_BUDGET = ("warm-start-budget", "plain")
ACTIVATION_AWARE = ("inrank-efficient", "activation-aware")
FISHER = (("inrank-efficient", "fisher"), ("warm-start-budget", "fisher"))
LLAMA_FISHER = ("llama-warm-start", "fisher")

SETUPS = (
    Setup(
        "TP1 DP1",
        {},
        growth=("absorbed", "default"),
        restarts=MORE_RESETS,
        switches=(PLAIN, PLAIN_BUDGET, ACTIVATION_AWARE, *FISHER, LLAMA_FISHER),
        spectra=True,
        multiplier=True,
    ),
    Setup("TP1 DP1", BF16, growth=("absorbed",), switches=(PLAIN, ACTIVATION_AWARE), spectra=True),
    Setup("DP2", {}, switches=(ACTIVATION_AWARE,), spectra=True),
    Setup("DP2", ZERO_0, growth=("absorbed",), switches=(PLAIN,)),
    Setup("DP2", APEX, growth=("absorbed",), switches=(PLAIN,)),
    Setup("DP2", BF16, restarts=RESETS),
    Setup("DP2", BF16_OFFLOADED, growth=("absorbed",), switches=(PLAIN,), spectra=True, multiplier=True),
    Setup(
        "DP2",
        FP16_ZERO_3,
        growth=("absorbed",),
        restarts=RESETS,
        switches=(PLAIN, PLAIN_BUDGET),
        spectra=True,
        multiplier=True,
    ),
    Setup("TP2 SP", {}, switches=(ACTIVATION_AWARE,), spectra=True),
    Setup("TP2 SP separate", {}, switches=(ACTIVATION_AWARE,)),
    Setup("TP2 without SP", {}, switches=(ACTIVATION_AWARE, *FISHER)),
    Setup("TP2 without SP", BF16, switches=(ACTIVATION_AWARE,)),
    Setup("TP2 SP DP2", {}, switches=(ACTIVATION_AWARE, *FISHER, LLAMA_FISHER), spectra=True),
    Setup(
        "TP2 SP DP2",
        ZERO_3,
        growth=("absorbed", "default"),
        restarts=MORE_RESETS,
        switches=(PLAIN, ("llama-warm-start", "plain")),
    ),
    Setup(
        "TP2 SP DP2",
        BF16,
        growth=("absorbed",),
        switches=(PLAIN, PLAIN_BUDGET, ACTIVATION_AWARE),
        spectra=True,
    ),
    Setup("TP4 SP", {}, switches=(ACTIVATION_AWARE,)),
)
