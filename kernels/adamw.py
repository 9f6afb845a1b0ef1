"""
AdamW in 10 bytes a weight: bf16 weights, the low halves of an fp32 master copy, bf16 moments.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- w - lr * (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps)

At the step sizes of reinforcement learning an update is a ten-thousandth of a weight, and bf16 moves in steps of a 256th: rounded to
bf16 after each update, most weights would never move. So w is fp32, exactly, kept in two halves: `high`, the nearest bf16, is the
parameter that the model computes with; `low` is the difference of the two bit patterns, a signed 16-bit number. Both together are 4
bytes a weight, as many as fp32 takes, and nobody needs another copy for bf16 arithmetic. The moments are rounded to bf16: each update
moves them by 5 or 10 % of their distance to the gradient, which bf16 can resolve (with b2 = 0.999 it could not). Gradients are bf16 too,
FSDP's type for bf16 parameters.

    fp32 weights, gradients, moments    4 + 4 + 8 = 16 bytes        here    2 + 2 + 2 + 4 = 10 bytes
"""
from collections.abc import Iterable

import torch
from torch import Tensor, nn

PIECE = 2 ** 21   # weights that are in fp32 at the same time: 8 MiB for each of ten temporaries


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 to (high, low). `low` is an int16 in the guise of a bf16: torch casts optimizer state to the parameter's type as it loads."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16).view(torch.bfloat16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 that was split, bit for bit."""
    return ((high.view(torch.int16).int() << 16) + low.view(torch.int16).int()).view(torch.float32)


def reference(w: Tensor, g: Tensor, m: Tensor, v: Tensor, n: int, lr: float, betas: tuple[float, float], eps: float) -> tuple[Tensor, ...]:
    """The n-th update, n = 1, 2, ...: new w, m and v, in the precision of the arguments (Loshchilov and Hutter, arXiv 1711.05101)."""
    m, v = torch.lerp(m, g, 1 - betas[0]), torch.lerp(v, g * g, 1 - betas[1])
    return w - lr * (m / (1 - betas[0] ** n)) / ((v / (1 - betas[1] ** n)).sqrt() + eps), m, v


class SplitAdamW(torch.optim.Optimizer):
    """The above for bf16 parameters, split among ranks or not: each rank updates what it holds."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float = 1e-8):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update(p, self.state[p], group["lr"], group["betas"], group["eps"])


def update(p: nn.Parameter, state: dict[str, Tensor], lr: float, betas: tuple[float, float], eps: float) -> None:
    """One parameter and its state, in place, PIECE weights at a time."""
    if not state:
        state |= {"step": torch.zeros(()), **{name: torch.zeros_like(p) for name in ("low", "exp_avg", "exp_avg_sq")}}
    state["step"] += 1
    local = [getattr(t, "_local_tensor", t).view(-1) for t in (p, state["low"], p.grad, state["exp_avg"], state["exp_avg_sq"])]
    for high, low, g, m, v in zip(*(t.split(PIECE) for t in local)):
        w, new_m, new_v = reference(join(high, low), g.float(), m.float(), v.float(), int(state["step"]), lr, betas, eps)
        for old, new in zip((high, low, m, v), (*split(w), new_m, new_v)):
            old.copy_(new)
