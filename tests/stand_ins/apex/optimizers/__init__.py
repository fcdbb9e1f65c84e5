from apex.optimizers.fused_adam import FusedAdam

__all__ = ["FusedAdam"]
