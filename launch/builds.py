"""Which builds of torch serve a GPU and its driver. The facts and their sources: docs/reference/platforms.md.

Runs before anything is installed: the standard library alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Capability = tuple[int, int]

LEAVE_THEM = 'or set CUDA_VISIBLE_DEVICES="" to leave the GPUs and use the CPU'
_CHOOSE = "(CUDA_VISIBLE_DEVICES=GPU-..., as `nvidia-smi -L` lists them)"
_EVERYWHERE = ((8, 0), (9, 0))


class Refusal(Exception):
    """Why nothing can be installed or run here. One line: the value, the rule, the remedy."""


@dataclass(frozen=True)
class Card:
    """One GPU; ``capability`` is None where it is not known."""

    name: str
    capability: Capability | None
    uuid: str = ""

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.level})" if self.capability else self.name

    @property
    def level(self) -> str:
        return ".".join(map(str, self.capability or ("?",)))


@dataclass(frozen=True)
class Build:
    """One build of torch.

    Args:
        label: what the version has behind the plus sign.
        driver: the first major version of the NVIDIA driver that serves it, by CUDA's compatibility between
            minor versions.
        kernels: the compute capabilities that it has kernels of, by processor; those serve later cards of
            the same major version too.
        ptx: from which capability on a driver can compile what the build has no kernels of.
    """

    label: str
    cuda: str
    driver: int
    kernels: Mapping[str, tuple[Capability, ...]]
    ptx: Capability | None = None

    def serves(self, card: Card, processor: str) -> bool:
        if card.capability is None or (self.ptx and card.capability >= self.ptx):
            return True
        major, minor = card.capability
        return any(major == own and minor >= least for own, least in self.kernels.get(processor, ()))


# Of torch 2.12 and 2.13, the preferred one first.
BUILDS = (
    Build(
        "cu130",
        "13.0",
        580,
        {
            "x86_64": ((7, 5), *_EVERYWHERE, (10, 0), (12, 0)),
            "aarch64": (*_EVERYWHERE, (10, 0), (11, 0), (12, 0)),
        },
        ptx=(12, 0),
    ),
    Build(
        "cu126",
        "12.6",
        525,
        {"x86_64": ((5, 0), (6, 0), (7, 0), (7, 5), *_EVERYWHERE), "aarch64": _EVERYWHERE},
    ),
)


def fitting(cards: tuple[Card, ...], driver: str, processor: str) -> tuple[Build, ...]:
    """The builds that serve the driver and every card, the preferred one first.

    Args:
        driver: its version, such as ``535.129.03``.
        processor: as ``platform.machine`` names it.

    Raises:
        Refusal: there is none.
    """
    for card in cards:
        if not any(build.serves(card, processor) for build in BUILDS):
            raise Refusal(
                f"{card}: no build of torch has kernels for it on {processor}; use another GPU {_CHOOSE}, "
                f"{LEAVE_THEM}"
            )
    kinds = ", ".join(dict.fromkeys(map(str, cards)))
    builds = [build for build in BUILDS if all(build.serves(card, processor) for card in cards)]
    if not builds:
        raise Refusal(
            f"{kinds}: no build of torch has kernels for all of them; choose GPUs of one kind {_CHOOSE}, "
            f"{LEAVE_THEM}"
        )
    borne = tuple(build for build in builds if int(driver.split(".")[0]) >= build.driver)
    if not borne:
        needed = " or ".join(f"{build.driver} (CUDA {build.cuda})" for build in reversed(builds))
        raise Refusal(
            f"NVIDIA driver {driver}: torch on {kinds} needs at least {needed}; update the driver, "
            f"{LEAVE_THEM}"
        )
    return borne
