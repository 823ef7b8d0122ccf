"""Implement AdamW with the interface of apex's and Transformer Engine's FusedAdam, for systems that have neither.

Megatron's fallback, torch.optim.AdamW, keeps a tensor ``step`` in each parameter's state. The distributed optimizer's
checkpoints do not support it: a new optimizer cannot be saved, and after loading all parameters share one tensor,
which is then incremented once per parameter. Here ``step`` is a number in the parameter group.
"""

import torch


class Adam(torch.optim.Optimizer):
    """Implement Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101)."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, capturable=False
    ):
        if not adam_w_mode or capturable:
            raise ValueError("only decoupled weight decay, not captured in a CUDA graph, is implemented")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters that have a gradient. ``closure`` is ignored."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = step = group.get("step", 0) + 1
            (beta1, beta2), lr = group["betas"], group["lr"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                state["exp_avg"].lerp_(param.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
                param.mul_(1 - lr * group["weight_decay"])
                param.addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1**step))
