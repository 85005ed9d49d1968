"""Two optimizers under one roof: Muon for the matrices inside the network, AdamW for everything else.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon/) treats a weight as a *map*, not as a bag of numbers. The momentum of
a matrix is usually dominated by a few directions; Muon replaces it by the nearest matrix with all singular
values equal, so that rare directions move as far as common ones. That matrix, U V^T of the singular value
decomposition, is found without a decomposition: five steps of the odd polynomial

    X  <-  a X + b (X X^T) X + c (X X^T)^2 X          (a, b, c) = (3.4445, -4.7750, 2.0315)

push the singular values of X / |X| (Frobenius norm) towards 1. It is all matrix products. Values of at least 0.0015
end between 0.68 and 1.21. A smaller one grows by a^5 = 485 times at most, so what lies far below stays small, and a
direction that the momentum lacks stays absent. All directions of a long random matrix are in reach; the last few of a
square one (about one in a hundred), and more of an ill-conditioned one, are not. So U V^T is what it aims at, not
what it gives.

All matrices of one shape, tall ones lying on their side, are one batch [G, m, n] of ``bmm``: a model with stacked
experts has a few shapes and hundreds of matrices, so a step costs a few calls. Momentum lives in that layout too.

The update is scaled by sqrt(max(1, rows / columns)) as in Jordan's code, which keeps the size of the output
change per unit of learning rate equal over shapes. (Moonlight, arXiv 2502.16982, scales by 0.2 sqrt(max(rows,
columns)) instead, to share AdamW's rates; ours are given separately.)

Embedding, head, router, gains and biases are not such maps (rows are looked up or stand alone) and go to AdamW
(Loshchilov and Hutter, arXiv 1711.05101), fused. Weight decay is decoupled in both, and only for matrices.
Left out: bfloat16 iterations on CPUs, and distributing the iteration over ranks.
"""

# G matrices of one shape, m short side, n long side

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sprat.config import OptimConfig
from sprat.errors import CheckpointError
from sprat.train.thread_data_parallel import ThreadDataParallel

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_ADAM_EPS = 1e-8


def orthogonalize(x_Gmn: Tensor, iterations: int = _ITERATIONS) -> Tensor:
    """Each matrix of the batch with its singular values pushed towards 1 (Newton-Schulz, see above).

    Args:
        x_Gmn: float, m <= n. It is not changed. On other devices than CPUs the products run in bfloat16.

    Returns:
        the same shape and dtype, the same singular vectors. In five steps a singular value of at least 0.0015 of the
        matrix's Frobenius norm becomes 0.68 to 1.21, a smaller one at most 485 times its share of the norm.
    """
    a, b, c = _COEFFICIENTS
    work = x_Gmn if x_Gmn.device.type == "cpu" else x_Gmn.bfloat16()
    work = work / (torch.linalg.vector_norm(work, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram_Gmm = torch.bmm(work, work.transpose(1, 2))
        mix_Gmm = torch.baddbmm(gram_Gmm, gram_Gmm, gram_Gmm, beta=b, alpha=c)
        work = torch.baddbmm(work, mix_Gmm, work, beta=a)
    return work.to(x_Gmn.dtype)


@torch.no_grad()
def _orthogonalize_no_grad(x_Gmn: Tensor) -> Tensor:
    """``orthogonalize`` for a thread of its own, where the caller's no_grad does not reach."""
    return orthogonalize(x_Gmn)


def _orthogonalize_parallel(x_Gmn: Tensor, workers: ThreadDataParallel | None) -> Tensor:
    """``orthogonalize``, a part of the batch by each thread of ``workers``."""
    if workers is None or workers.size == 1 or len(x_Gmn) < 2:
        return orthogonalize(x_Gmn)
    return torch.cat(workers.map(_orthogonalize_no_grad, x_Gmn.chunk(workers.size)))


@dataclass
class _ShapeGroup:
    """All matrices of one shape. A parameter [..., rows, columns] owns ``count`` slots from ``start``."""

    members: list[tuple[nn.Parameter, int, int, bool]] = field(default_factory=list)  # parameter, start, count, flip
    slots: int = 0
    momentum_Gmn: Tensor = field(default_factory=lambda: torch.empty(0))


class Muon:
    """Nesterov momentum, orthogonalized; all matrices of one shape at once.

    Args:
        parameters: by name; each [rows, columns] or a stack [E, rows, columns].
        momentum: decay of the momentum.
        weight_decay: decoupled, times the learning rate.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], momentum: float, weight_decay: float) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.shapes: dict[str, _ShapeGroup] = {}
        for parameter in parameters.values():
            rows, columns = parameter.shape[-2:]
            flip = rows > columns
            group = self.shapes.setdefault(f"{min(rows, columns)}x{max(rows, columns)}", _ShapeGroup())
            count = parameter.numel() // (rows * columns)
            group.members.append((parameter, group.slots, count, flip))
            group.slots += count
        for name, group in self.shapes.items():
            m, n = (int(side) for side in name.split("x"))
            group.momentum_Gmn = torch.zeros(group.slots, m, n, device=group.members[0][0].device)

    @torch.no_grad()
    def step(self, lr: float, workers: ThreadDataParallel | None = None) -> None:
        """Move every parameter; one without a gradient (an MTP module that did not run) counts as gradient zero.

        ``workers`` share out the matrices of a shape.
        """
        for group in self.shapes.values():
            grad_Gmn = torch.zeros_like(group.momentum_Gmn)
            for parameter, start, count, flip in group.members:
                if parameter.grad is not None:
                    grad = parameter.grad.view(count, *parameter.shape[-2:])
                    grad_Gmn[start : start + count] = grad.transpose(1, 2) if flip else grad
            group.momentum_Gmn.lerp_(grad_Gmn, 1 - self.momentum)
            update_Gmn = _orthogonalize_parallel(grad_Gmn.lerp_(group.momentum_Gmn, self.momentum), workers)
            for parameter, start, count, flip in group.members:
                update = update_Gmn[start : start + count]
                rows, columns = parameter.shape[-2:]
                if self.weight_decay:
                    parameter.mul_(1 - lr * self.weight_decay)
                moved = (update.transpose(1, 2) if flip else update).reshape(parameter.shape)
                parameter.add_(moved, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def state_dict(self) -> dict[str, Tensor]:
        """The momenta, by name."""
        return {f"muon.{name}": group.momentum_Gmn for name, group in self.shapes.items()}


class AdamW:
    """AdamW, fused: one call for all parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], betas: tuple[float, float], weight_decay: float) -> None:
        self.parameters, self.betas, self.weight_decay = dict(parameters), betas, weight_decay
        self.mean = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.square = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.count = torch.zeros((), dtype=torch.float32)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every parameter; gains and biases are not decayed, and one without a gradient stays."""
        self.count += 1
        for decayed in (True, False):
            names = [n for n, p in self.parameters.items() if p.grad is not None and (p.ndim > 1) == decayed]
            if not names:
                continue
            count = self.count.to(self.parameters[names[0]].device)
            torch._fused_adamw_(
                [self.parameters[name] for name in names],
                [grad for name in names if (grad := self.parameters[name].grad) is not None],
                [self.mean[name] for name in names],
                [self.square[name] for name in names],
                [],
                [count] * len(names),
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=self.weight_decay if decayed else 0.0,
                eps=_ADAM_EPS,
                amsgrad=False,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Both moments by parameter name, and the count of steps."""
        moments = {f"adamw.mean.{name}": value for name, value in self.mean.items()}
        moments |= {f"adamw.square.{name}": value for name, value in self.square.items()}
        return {**moments, "adamw.count": self.count}


class Optimizer:
    """Muon and AdamW with their learning rates; ``build`` makes it.

    Attributes:
        muon_names, adamw_names: which parameter is whose.
        parameters: all of them, Muon's first.
    """

    def __init__(self, matrices: dict[str, nn.Parameter], rest: dict[str, nn.Parameter], config: OptimConfig) -> None:
        self.config = config
        self.muon_names, self.adamw_names = list(matrices), list(rest)
        self.parameters = [*matrices.values(), *rest.values()]
        self._muon = Muon(matrices, config.momentum, config.weight_decay)
        self._adamw = AdamW(rest, config.betas, config.weight_decay)

    def clip_grad_norm(self, limit: float) -> float:
        """Scale all gradients so that their joint norm is at most ``limit``; returns the norm before."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))) if grads else 0.0
        if norm > limit:
            torch._foreach_mul_(grads, limit / (norm + 1e-6))
        return norm

    def step(self, factor: float = 1.0, workers: ThreadDataParallel | None = None) -> None:
        """One step at ``factor`` times the configured rates; ``workers`` share the work."""
        self._muon.step(self.config.muon_lr * factor, workers)
        self._adamw.step(self.config.adam_lr * factor)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """All that a later step depends on, by name; the tensors are the live ones."""
        return self._muon.state_dict() | self._adamw.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave in another process.

        Raises:
            CheckpointError: names or shapes differ, so the state is of another model or optimizer.
        """
        current = self.state_dict()
        if {k: v.shape for k, v in current.items()} != {k: v.shape for k, v in state.items()}:
            what = "the optimiser state is of another model or optimiser"
            raise CheckpointError(what, where="optimiser state", todo="start from an empty checkpoint folder")
        for name, value in current.items():
            value.copy_(state[name])


def build(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer of ``model``; with ``config.name == "adamw"`` all parameters go to AdamW.

    Muon gets what has two dims or is a stack of matrices, but for embeddings, the module called ``head`` and
    modules called ``gate`` (routers). Parameters that want no gradient are left out.
    """
    apart = {
        id(parameter)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in ("embed_tokens", "head", "gate")
        for parameter in module.parameters(recurse=False)
    }
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in named.items() if p.ndim in (2, 3) and id(p) not in apart and config.name == "muon"}
    return Optimizer(matrices, {n: p for n, p in named.items() if n not in matrices}, config)
