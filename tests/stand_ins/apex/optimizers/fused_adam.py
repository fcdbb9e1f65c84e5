"""AdamW with the state that NVIDIA apex's FusedAdam keeps: moments by parameter, the step in the group."""

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0):
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {key: torch.zeros_like(p).float() for key in ("exp_avg", "exp_avg_sq")}
                gradient = p.grad.float()
                first = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1 ** group["step"])
                second = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2) / (
                    1 - beta2 ** group["step"]
                )
                update = first / (second.sqrt() + group["eps"]) + group["weight_decay"] * p
                p.sub_(group["lr"] * update)
