"""The recorder for the ``Trainer`` of transformers."""

from typing import Any

from transformers import TrainerCallback

from inrank_megatron.spectra.recorder import SpectrumRecorder


class SpectrumCallback(TrainerCallback):
    """Records the spectra of ``W_t - W_0``: ``Trainer(..., callbacks=[SpectrumCallback(every=100)])``.

    Steps are those of the Trainer (``global_step``). W_0 is what training starts from; where it resumes
    from a checkpoint, that checkpoint.

    Args:
        options: keyword arguments of :class:`SpectrumRecorder`.

    Attributes:
        recorder: made when training begins; its ``rows`` have what was recorded.
    """

    recorder: SpectrumRecorder

    def __init__(self, **options: Any):
        self._options = options

    def on_train_begin(self, args, state, control, *, model, **_):
        self.recorder = SpectrumRecorder(model, start_step=state.global_step, **self._options)

    def on_step_end(self, args, state, control, **_):
        self.recorder.step()
