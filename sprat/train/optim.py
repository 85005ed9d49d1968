# size: two optimizers under one roof are one noun
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
experts has a few shapes and hundreds of matrices, so a step costs a few calls.

The update is scaled by sqrt(max(1, rows / columns)) as in Jordan's code, which keeps the size of the output
change per unit of learning rate equal over shapes. (Moonlight, arXiv 2502.16982, scales by 0.2 sqrt(max(rows,
columns)) instead, to share AdamW's rates; ours are given separately.)

Embedding, head, router, gains and biases are not such maps (rows are looked up or stand alone) and go to AdamW
(Loshchilov and Hutter, arXiv 1711.05101), fused. Weight decay is decoupled in both, and only for matrices.
Left out: bfloat16 iterations on CPUs, and distributing the iteration over ranks.
"""

# G matrices of one shape, m short side, n long side

from __future__ import annotations

import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from sprat.config import OptimConfig
from sprat.errors import CheckpointError, TrainingError
from sprat.model.lora import LowRank
from sprat.quant import quantized_weights
from sprat.train.parallel import Parallel, ThreadDataParallel
from sprat.trust.run import Run

log = logging.getLogger(__name__)

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_ADAM_EPS = 1e-8
_ALONE = ThreadDataParallel(1)


@torch.no_grad()  # of its own: it runs in threads, where the caller's does not reach
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


def _by_shape(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Those whose matrices have one shape, the short side first."""
    groups = defaultdict[str, list[Tensor]](list)
    for x in tensors:
        groups[f"{min(x.shape[-2:])}x{max(x.shape[-2:])}"].append(x)
    return groups


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    """x_Gmn, float32: all matrices of ``tensors`` (each [..., rows, columns]), tall ones lying on their side."""
    flat = (x.reshape(-1, *x.shape[-2:]) for x in tensors)
    return torch.cat([x.transpose(1, 2) if x.shape[1] > x.shape[2] else x for x in flat]).float()


def _unstack(x_Gmn: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What was stacked, each in the shape of its one of ``like``."""
    parts = zip(x_Gmn.split([x[..., 0, 0].numel() for x in like]), like, strict=True)
    return [(own.transpose(1, 2) if x.shape[-2] > x.shape[-1] else own).reshape(x.shape) for own, x in parts]


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse a group of parameters whose options make no sense, or are another optimizer's."""
    for name, limit in (("lr", math.inf), ("momentum", 1.0), ("weight_decay", math.inf)):
        if name not in options or not 0 <= options[name] < limit:
            raise ValueError(f"Muon wants 0 <= {name} < {limit}, not {options.get(name)}")


class _Optimizer(torch.optim.Optimizer):
    """Without torch's wrappers, each of which imports ``torch.compile`` to keep it out: 1.1 s and 77 MB a process."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class Muon(_Optimizer):
    """Nesterov momentum, orthogonalized; all matrices of one shape at once.

    The state of a parameter is its ``momentum_buffer``, float32, of its shape; there is none before its first step.

    Args:
        params: as torch's optimizers take them; each is [rows, columns] or a stack [E, rows, columns].
        momentum: decay of the momentum.
        weight_decay: decoupled, times the learning rate.
        parallel: shares out the matrices of a shape; a copy of a Muon leaves all to the caller.

    Raises:
        ValueError: a number is out of its range, or a parameter is no matrix.
    """

    _parallel: Parallel = _ALONE

    def __init__(
        self, params: ParamsT, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, parallel: Parallel = _ALONE
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._parallel = parallel

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See ``torch.optim.Optimizer``; options and shapes are checked (ValueError)."""
        _check_options(self.defaults | param_group)
        super().add_param_group(param_group)
        if flat := [tuple(p.shape) for p in self.param_groups[-1]["params"] if p.ndim < 2]:
            self.param_groups.pop()
            raise ValueError(f"Muon moves matrices and stacks of them, not parameters of shape {flat[0]}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``torch.optim.Optimizer``; the momenta are copied, in float32. A ValueError leaves all as it was."""
        for options in state_dict["param_groups"]:
            _check_options(options)
        keys = (key for options in state_dict["param_groups"] for key in options["params"])
        parameters = (p for options in self.param_groups for p in options["params"])
        momenta = {}
        for key, parameter in zip(keys, parameters, strict=False):  # torch compares their numbers
            if state := state_dict["state"].get(key):
                if {k: getattr(x, "shape", None) for k, x in state.items()} != {"momentum_buffer": parameter.shape}:
                    raise ValueError(f"the state of parameter {key} is not Muon's of shape {tuple(parameter.shape)}")
                momenta[parameter] = state["momentum_buffer"].to(parameter.device, torch.float32, copy=True)
        super().load_state_dict(state_dict)
        for parameter, momentum in momenta.items():  # torch has them in the parameter's dtype
            self.state[parameter]["momentum_buffer"] = momentum

    def momentum_of(self, parameter: Tensor) -> Tensor:
        """The live ``momentum_buffer``; zeros where there was none."""
        if not (state := self.state[parameter]):
            state["momentum_buffer"] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        return cast(Tensor, state["momentum_buffer"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter; one without a gradient (an MTP module that did not run) counts as gradient zero.

        Returns:
            what ``closure``, called before with gradients enabled, gives.
        """
        loss = torch.enable_grad()(closure)() if closure else None
        for options in self.param_groups:
            lr, momentum, weight_decay = options["lr"], options["momentum"], options["weight_decay"]
            for parameters in _by_shape(options["params"]).values():
                momenta = [self.momentum_of(parameter) for parameter in parameters]
                grads = [torch.zeros_like(p).float() if p.grad is None else p.grad.float() for p in parameters]
                torch._foreach_lerp_(momenta, grads, 1 - momentum)
                update_Gmn = self._orthogonalize(_stack(torch._foreach_lerp(grads, momenta, momentum)))
                for parameter, moved in zip(parameters, _unstack(update_Gmn, momenta), strict=True):
                    rows, columns = parameter.shape[-2:]
                    if weight_decay:
                        parameter.mul_(1 - lr * weight_decay)
                    parameter.add_(moved, alpha=-lr * max(1.0, rows / columns) ** 0.5)
        return loss

    def _orthogonalize(self, x_Gmn: Tensor) -> Tensor:
        """``orthogonalize``, a part of the batch by each who works at once."""
        parts = self._parallel.map(orthogonalize, self._parallel.split(x_Gmn))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _AdamW(_Optimizer, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class OptimizersContainer:
    """Muon, and torch's own AdamW for everything else, as one optimizer; ``build`` makes it.

    Attributes:
        muon_names, adamw_names: which parameter is whose.
        parameters: all of them, Muon's first.
    """

    def __init__(
        self,
        matrices: dict[str, nn.Parameter],
        rest: dict[str, nn.Parameter],
        config: OptimConfig,
        parallel: Parallel | None = None,
    ) -> None:
        self.muon_names, self.adamw_names = list(matrices), list(rest)
        self.parameters = [*matrices.values(), *rest.values()]

        def group(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
            return {"params": list(parameters), "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}

        decayed = group((p for p in rest.values() if p.ndim > 1), config.adam_lr, config.weight_decay)
        plain = group((p for p in rest.values() if p.ndim <= 1), config.adam_lr, 0.0)
        muon = [group(matrices.values(), config.muon_lr, config.weight_decay)]
        self._muon = Muon(muon, config.muon_lr, config.momentum, config.weight_decay, parallel or _ALONE)
        self._adamw = _AdamW([decayed, plain], betas=config.betas, eps=_ADAM_EPS, fused=True)
        # Laid out at once, so that a checkpoint has the state of all parameters, and one count for all.
        self._momenta = [self._muon.momentum_of(parameter) for parameter in matrices.values()]
        self._counts = torch.zeros(max(1, len(rest)), device=self.parameters[0].device)
        for parameter, count in zip(rest.values(), self._counts, strict=False):
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            self._adamw.state[parameter] = {"step": count, **moments}

    def clip_grad_norm(self, limit: float) -> float:
        """Scale all gradients so that their joint norm is at most ``limit``; returns the norm before."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))) if grads else 0.0
        if norm > limit:
            torch._foreach_mul_(grads, limit / (norm + 1e-6))
        return norm

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both, Muon's first; ``step`` sets their ``lr``, from ``initial_lr``."""
        return [*self._muon.param_groups, *self._adamw.param_groups]

    def step(self, *, lr_factor: float = 1.0) -> None:
        """A step at ``lr_factor`` times the rates; AdamW leaves what has no gradient, Muon takes it for 0."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        self._muon.step()
        self._adamw.step()
        self._counts.fill_(self._counts.max())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or set them to 0."""
        self._muon.zero_grad(set_to_none)
        self._adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a later step depends on, by the parameters' names; the tensors are the live ones."""
        state = {"adamw.count": self._counts[0]}
        for name, moments in zip(self.adamw_names, self._adamw.state.values(), strict=True):
            state |= {f"adamw.mean.{name}": moments["exp_avg"], f"adamw.square.{name}": moments["exp_avg_sq"]}
        momenta = zip(self.muon_names, self._momenta, strict=True)
        return state | {f"muon.momentum.{name}": momentum for name, momentum in momenta}

    def layouts(self) -> list[dict[str, Tensor]]:
        """``state_dict``, and the same as checkpoints had it before Muon's momenta went by name: a stack for each
        shape, in the order of the model's parameters."""
        stacks = {f"muon.{shape}": _stack(momenta) for shape, momenta in _by_shape(self._momenta).items()}
        return [state := self.state_dict(), stacks | {k: x for k, x in state.items() if k.startswith("adamw.")}]

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave in another process.

        Raises:
            CheckpointError: names or shapes differ, so the state is of another model or optimizer.
        """
        shapes = {name: value.shape for name, value in state.items()}
        fitting = [each for each in self.layouts() if {name: value.shape for name, value in each.items()} == shapes]
        if not fitting:
            what = "the optimiser state is of another model or optimiser"
            raise CheckpointError(what, where="optimiser state", todo="start from an empty checkpoint folder")
        for name, value in fitting[0].items():
            value.copy_(state[name])
        for shape, momenta in _by_shape(self._momenta).items():
            if (name := f"muon.{shape}") in state:
                torch._foreach_copy_(momenta, _unstack(state[name].to(momenta[0].device), momenta))
        self._counts.fill_(self._counts[0])


def build(model: nn.Module, config: OptimConfig, parallel: Parallel | None = None) -> OptimizersContainer:
    """The optimizer of ``model``; with ``config.name == "adamw"`` all parameters go to AdamW.

    Muon gets what has two dims or is a stack of matrices, but for embeddings, the module called ``head``,
    modules called ``gate`` (routers), and adapters: the two thin factors of a map are no maps of their own, and PEFT's
    rates are AdamW's. Parameters that want no gradient are left out. ``parallel`` shares Muon's work.

    Raises:
        TrainingError: there is no such parameter.
    """
    apart = {
        id(parameter)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in ("embed_tokens", "head", "gate") or isinstance(module, LowRank)
        for parameter in module.parameters(recurse=False)
    }
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise TrainingError("no parameter wants a gradient", where="optim", todo="unfreeze what is to be trained")
    matrices = {n: p for n, p in named.items() if p.ndim in (2, 3) and id(p) not in apart and config.name == "muon"}
    return OptimizersContainer(matrices, {n: p for n, p in named.items() if n not in matrices}, config, parallel)


def check_trainable(model: nn.Module, run: Run) -> None:
    """Note as the run's fact ``trained`` how many parameters of how many want a gradient, and log it.

    The codes of a quantized matrix are whole numbers without a gradient. A loop over such a model would run, and its
    loss would even fall, but only the gains of the norms would move.

    Raises:
        TrainingError: matrices of the model are quantized, or nothing of it wants a gradient.
    """
    parameters = list(model.parameters())
    trainable, total = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
    if packed := quantized_weights(model):
        frozen = sum(part.width * part.codes.numel() // part.codes.shape[-1] for part in packed.values())
        what = f"{len(packed)} matrices are quantised: {trainable:,} of {total + frozen:,} parameters could be trained"
        todo = "train a dense model: sprat.load(path, dequantize=True), or sprat.quant.dequantize_model(model)"
        raise TrainingError(what, where=run.stage, todo=todo)
    if not trainable:
        raise TrainingError("no parameter wants a gradient", where=run.stage, todo="unfreeze what is to be trained")
    run.add_facts(trained={"trainable": trainable, "total": total})
    level = logging.INFO if trainable == total else logging.WARNING
    log.log(level, "%s trains %s of %s parameters", run.stage, f"{trainable:,}", f"{total:,}")
