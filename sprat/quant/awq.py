"""AWQ (Lin et al. 2023, arXiv 2306.00978): before rounding, move the size of loud channels from inputs to weights.

What rounding a weight costs is ``(Q(W) - W) x``: an error in a column counts as much as its channel is loud, and a few
channels of real activations are far louder than the rest. ``W x = (W diag(s)) (x / s)``: with ``s`` large on loud
channels their columns are rounded finely relative to what they carry, and others a little more coarsely. The
division costs nothing at run time, because whoever makes ``x`` takes it over:

- a norm's gain, before q, k and v (of latent attention q or q_a, and kv_a), q_b, kv_b, gate and up of a dense or of all
  experts with shared experts and router, and before what joins an MTP module's two inputs;
- rows of the linear before: the value rows of v or kv_b for the output projection (heads that share a value share its
  scales), rows of up for down, each expert its own.

``s = mean(|x|)^alpha`` (section 3.2, equation 4), and alpha is searched on ``ALPHAS`` for the least error of the
outputs, ``sum d H d^T`` over all matrices that read ``x``, with ``d = Q(W s) / s - W`` and ``H = X^T X``. Zero is among
them, so nothing gets worse on the text. The text passes the unrounded model once; all scales are folded in
afterwards, and the folded model computes what the model computed. Clipping, the second search, is ``clip="mse"``.

Left out: scales of the head's input (embedding and head are kept in eight bits), and the repository's second form
of ``s``, divided by a power of the weights' size.
"""

# E experts, N outputs or tokens, I input channels, F expert width, D hidden, H query heads, G key heads, v value width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprat.config.quant import FewTokens
from sprat.errors import CheckpointError
from sprat.model import MLP, MoE, Routing, Transformer
from sprat.model.gqa import GQA
from sprat.model.mla import MLA
from sprat.quant.calibration import MIN_ROWS_PER_CHANNEL, SchemeOf, TextHooks, run_text
from sprat.quant.int4 import Scheme, dequantize_tensor, quantize_tensor

ALPHAS = tuple(step / 20 for step in range(20))
_SMALLEST = 1e-4  # scale, before they are made even around one


@dataclass(frozen=True)
class _Reader:
    """A matrix [N, I] that reads the scaled channels, by its name, and the ``X^T X`` [I, I] by which it is judged."""

    name: str
    weight_NI: Tensor
    hessian_II: Tensor


def awq_scale(
    model: Transformer,
    tokens_BT: Tensor,
    scheme_of: SchemeOf,
    *,
    expert_tokens: int = 0,
    few_tokens: FewTokens = "nearest",
    segments_BT: Tensor | None = None,
) -> None:
    """Fold scales into the weights of ``model`` (float32, dense), which then computes the same and rounds better.

    Args:
        tokens_BT: long; calibration text, all of it at work at once.
        scheme_of: how each matrix will be rounded.
        expert_tokens, few_tokens, segments_BT: see ``calibrate``. An expert that too few tokens reach has no scales of
            its own, unless all of them are to count.

    Raises:
        CheckpointError: what passes is not finite.
    """
    search, handles = _AWQHooks(scheme_of, expert_tokens, few_tokens), []

    def listen(module: nn.Module, call: Callable[[Tensor], None]) -> None:
        handles.append(module.register_forward_pre_hook(lambda _, inputs: call(inputs[0])))

    for name, module in model.named_modules():
        if isinstance(module, MLA):
            for linear, find in search.latent_attention(name, module).items():
                listen(module.get_submodule(linear), find)
        elif isinstance(module, GQA):
            listen(module.o_proj, search.grouped_output(name, module))
        elif isinstance(module, MLP):
            listen(module.down_proj, search.down(name, module))
        elif name.endswith("eh_proj"):
            mtp: Any = model.get_submodule(name.rpartition(".")[0])
            listen(module, search.behind_norms(name, (mtp.enorm, mtp.hnorm), {f"{name}.weight": module}))
        block: Any = module
        if hasattr(block, "post_attention_layernorm"):
            readers = search.attention_inputs(f"{name}.self_attn", block.self_attn)
            first = next(iter(readers.values()))
            listen(first, search.behind_norms(f"{name}.self_attn", (block.input_layernorm,), readers))
            norm = block.post_attention_layernorm
            if isinstance(block.mlp, MoE):
                handles.append(block.mlp.gate.register_forward_hook(search.experts(f"{name}.mlp", block.mlp, norm)))
            else:
                leaves = {
                    f"{name}.mlp.{leaf}.weight": block.mlp.get_submodule(leaf) for leaf in ("gate_proj", "up_proj")
                }
                listen(block.mlp, search.behind_norms(f"{name}.mlp", (norm,), leaves))
    try:
        run_text(model, tokens_BT, segments_BT, search)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for fold in search.folds:
            fold()


class _AWQHooks(TextHooks):
    """Finds the scales of each group of matrices when their input passes; ``folds`` puts them into weights."""

    def __init__(self, scheme_of: SchemeOf, expert_tokens: int, few_tokens: FewTokens) -> None:
        self.folds: list[Callable[[], None]] = []
        self._scheme_of, self._expert_tokens, self._few_tokens = scheme_of, expert_tokens, few_tokens
        self._found = set[str]()

    def attention_inputs(self, name: str, attention: Any) -> dict[str, nn.Module]:
        """What reads the normed stream, by the names of the weights."""
        leaves = (
            ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")
            if isinstance(attention, MLA)
            else ("q_proj", "k_proj", "v_proj")
        )
        return {f"{name}.{leaf}.weight": getattr(attention, leaf) for leaf in leaves if hasattr(attention, leaf)}

    def behind_norms(
        self, name: str, norms: Sequence[nn.Module], readers: dict[str, nn.Module]
    ) -> Callable[[Tensor], None]:
        """A search for what reads the outputs of ``norms`` side by side."""

        def find(x: Tensor) -> None:
            x_NI = self.counted(x)
            hessian_II = x_NI.T @ x_NI
            table = [_Reader(key, module.get_parameter("weight"), hessian_II) for key, module in readers.items()]
            scales_I = self._search(name, x_NI.abs().mean(0), table)

            def fold() -> None:
                for norm, part in zip(norms, scales_I.chunk(len(norms)), strict=True):
                    norm.get_parameter("weight").div_(part)
                for module in readers.values():
                    module.get_parameter("weight").mul_(scales_I)

            self.folds.append(fold)

        return self._once(name, find)

    def latent_attention(self, name: str, attention: MLA) -> dict[str, Callable[[Tensor], None]]:
        """Searches inside latent attention, by the linear whose input they wait for."""
        sites = {}
        if attention.has_q_lora:
            readers: dict[str, nn.Module] = {f"{name}.q_b_proj.weight": attention.q_b_proj}
            sites["q_b_proj"] = self.behind_norms(f"{name}.q_b_proj", (attention.q_a_layernorm,), readers)
        readers = {f"{name}.kv_b_proj.weight": attention.kv_b_proj}
        sites["kv_b_proj"] = self.behind_norms(f"{name}.kv_b_proj", (attention.kv_a_layernorm,), readers)

        def fold(scales_I: Tensor) -> None:
            rows_HmR = attention.kv_b_proj.weight.view(attention.heads, attention.nope + attention.value, -1)
            rows_HmR[:, attention.nope :].div_(scales_I.view(attention.heads, attention.value, 1))

        sites["o_proj"] = self._behind_linear(f"{name}.o_proj", attention.o_proj, fold)
        return sites

    def grouped_output(self, name: str, attention: GQA) -> Callable[[Tensor], None]:
        """A search for the output projection: query heads that share a value head share its scales."""
        heads, kv_heads, dim = attention.heads, attention.kv_heads, attention.dim

        def shared(mean_I: Tensor) -> Tensor:
            return mean_I.view(kv_heads, heads // kv_heads, dim).mean(1, keepdim=True)

        def spread(mean_I: Tensor) -> Tensor:
            return shared(mean_I).expand(kv_heads, heads // kv_heads, dim).flatten()

        def fold(scales_I: Tensor) -> None:
            _divide_rows(attention.v_proj, scales_I.view(kv_heads, -1, dim)[:, 0].flatten())

        return self._behind_linear(f"{name}.o_proj", attention.o_proj, fold, spread)

    def down(self, name: str, mlp: MLP) -> Callable[[Tensor], None]:
        """A search for the down projection of a dense feed-forward."""
        return self._behind_linear(f"{name}.down_proj", mlp.down_proj, lambda scales: _divide_rows(mlp.up_proj, scales))

    def experts(self, name: str, moe: MoE, norm: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Routing], None]:
        """A hook for the router: scales of what experts read, shared by all, and of what each hands to its down."""
        experts, shared = moe.experts, moe.shared_experts

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], routing: Routing) -> None:
            if name in self._found:
                return
            x_ND, table, downs = self.counted(inputs[0]), list[_Reader](), list[Tensor]()
            chosen_NE = torch.zeros_like(routing.scores_NE, dtype=torch.bool).scatter_(1, routing.index_NK, True)
            chosen_NE = self.counted(chosen_NE)
            per_expert = zip(experts.w_gate_EFD, experts.w_up_EFD, experts.w_down_EDF, chosen_NE.T, strict=True)
            for number, (gate_FD, up_FD, down_DF, chosen_N) in enumerate(per_expert):
                x_MD = x_ND[chosen_N]
                enough = len(x_MD) >= (self._expert_tokens or MIN_ROWS_PER_CHANNEL * down_DF.shape[1])
                if not enough and self._few_tokens == "all":
                    x_MD, enough = x_ND, True
                hessian_DD = x_MD.T @ x_MD
                table += [_Reader(f"{name}.experts.w_gate_EFD", gate_FD, hessian_DD)]
                table += [_Reader(f"{name}.experts.w_up_EFD", up_FD, hessian_DD)]
                h_MF = F.silu(x_MD @ gate_FD.T) * (x_MD @ up_FD.T)
                reader = _Reader(f"{name}.experts.w_down_EDF", down_DF, h_MF.T @ h_MF)
                mean_F = h_MF.abs().mean(0) if enough else torch.zeros(h_MF.shape[1])  # zeros: scales of one
                downs.append(self._search(f"{name}.experts.{number}", mean_F, [reader]))
            if shared is not None:
                hessian_DD = x_ND.T @ x_ND
                for leaf in (shared.gate_proj, shared.up_proj):
                    table.append(_Reader(f"{name}.shared_experts.gate_proj.weight", leaf.weight, hessian_DD))
            scales_D = self._search(name, x_ND.abs().mean(0), table)
            scales_EF = torch.stack(downs)
            weights = [moe.gate.weight, *(reader.weight_NI for reader in table)]

            def fold() -> None:
                norm.get_parameter("weight").div_(scales_D)
                for weight in weights:
                    weight.mul_(scales_D)
                experts.w_up_EFD.div_(scales_EF.unsqueeze(2))
                experts.w_down_EDF.mul_(scales_EF.unsqueeze(1))

            self._found.add(name)
            self.folds.append(fold)

        return hook

    def _behind_linear(
        self,
        name: str,
        linear: Any,
        fold_before: Callable[[Tensor], None],
        spread: Callable[[Tensor], Tensor] = lambda mean_I: mean_I,
    ) -> Callable[[Tensor], None]:
        """A search for ``linear``, whose input's maker takes the division over by ``fold_before``."""

        def find(x: Tensor) -> None:
            x_NI = self.counted(x)
            reader = _Reader(f"{name}.weight", linear.weight, x_NI.T @ x_NI)
            scales_I = self._search(name, spread(x_NI.abs().mean(0)), [reader])

            def fold() -> None:
                fold_before(scales_I)
                linear.weight.mul_(scales_I)

            self.folds.append(fold)

        return self._once(name, find)

    def _once(self, name: str, find: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def find_once(x: Tensor) -> None:
            if name not in self._found:
                self._found.add(name)
                find(x)

        return find_once

    def _search(self, name: str, mean_I: Tensor, readers: Sequence[_Reader]) -> Tensor:
        """The scales [I] under which ``readers`` err least."""
        if not bool(torch.isfinite(mean_I).all()):
            fault = "what the calibration text makes of this matrix's input is not finite"
            raise CheckpointError(fault, where=name, todo="use a checkpoint that did not diverge")
        active_I = mean_I > 0
        mean_I = torch.where(active_I, mean_I, mean_I.sum() / active_I.sum().clamp(min=1))
        best, least = torch.ones_like(mean_I), float("inf")
        if bool(active_I.any()):
            for alpha in ALPHAS:
                scales_I = mean_I.pow(alpha).clamp(min=_SMALLEST)
                scales_I = scales_I / (scales_I.max() * scales_I.min()).sqrt()
                error = sum(_output_error(reader, scales_I, self._scheme_of(reader.name)) for reader in readers)
                if error < least:
                    best, least = scales_I, error
        return best


def _output_error(reader: _Reader, scales_I: Tensor, scheme: Scheme) -> float:
    """The squared error of the outputs on the text, if the matrix is rounded under these scales."""
    rounded = quantize_tensor(reader.weight_NI * scales_I, **scheme._replace(clip="extreme")._asdict())
    difference_NI = dequantize_tensor(rounded) / scales_I - reader.weight_NI
    return float(((difference_NI @ reader.hessian_II) * difference_NI).sum())


def _divide_rows(linear: Any, scales_N: Tensor) -> None:
    """Make the outputs of ``linear`` smaller by ``scales_N``."""
    linear.weight.div_(scales_N.unsqueeze(1))
    if linear.bias is not None:
        linear.bias.div_(scales_N)
