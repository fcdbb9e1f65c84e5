"""The most memory that this process has taken: between two lines of metrics, and in each part of a run."""

import resource

import torch

Peak = dict[str, int]
"""``max_memory_allocated`` and ``max_memory_reserved``, of torch on a GPU; on a CPU ``peak_rss``. Bytes."""


class PeakMemory:
    """Peaks of a device by part of a run; asking for them waits for nothing.

    A process on a CPU has one peak for good: there a part's is that since the start of the process.

    Attributes:
        parts: the peak of each part that has begun, the present one up to the last call.
    """

    def __init__(self, device: torch.device, part: str):
        self._on_gpu, self._part = device.type != "cpu", part
        self.parts: dict[str, Peak] = {}
        self.since_last()

    def begin(self, part: str) -> None:
        """What comes is of another part, or of the same one once more."""
        self.since_last()
        self._part = part

    def since_last(self) -> Peak:
        """The peak since this or :meth:`begin` was called last."""
        peak = self._read()
        before = self.parts.get(self._part, {})
        self.parts[self._part] = {name: max(size, before.get(name, 0)) for name, size in peak.items()}
        return peak

    def _read(self) -> Peak:
        if not self._on_gpu:
            return {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        peak = {
            "max_memory_allocated": torch.cuda.max_memory_allocated(),
            "max_memory_reserved": torch.cuda.max_memory_reserved(),
        }
        torch.cuda.reset_peak_memory_stats()
        return peak


def largest(peaks: list[dict[str, Peak]]) -> dict[str, Peak]:
    """The largest of several ranks' or sessions' parts."""
    parts = {part: None for own in peaks for part in own}
    return {
        part: {
            name: max(own.get(part, {}).get(name) or 0 for own in peaks)
            for name in {name: None for own in peaks for name in own.get(part, {})}
        }
        for part in parts
    }
