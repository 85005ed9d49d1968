"""The decoder that trains, rolls out and serves: one definition, on one device.

Pre-norm blocks (attention, then a dense or an expert feed-forward) on a residual stream, a last norm and a
head. What all layers share in a pass (rotary table, mask, cache position) is built once, as a ``ForwardContext``.
A pass is ``context``, ``embed_tokens``, ``run_layers``, ``norm`` and ``logits``, each of which stands by itself.

Initial weights are normal with ``initializer_range``. Matrices that write into the residual stream (``o_proj`` and all
``down`` matrices) are divided by ``sqrt(2 * layers)``, so that the stream's size does not depend on depth (GPT-2). Norm
gains are one, biases and the router's correction bias zero. Each tensor draws from its own generator, seeded by
(seed, name): adding a module does not change the others.
"""

# B batch, T time, D hidden, V vocabulary, L MoE layers, K chosen experts

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError, ConfigError
from sprat.model.forward_context import ForwardContext, forward_context, mtp_segments
from sprat.model.gqa import GQA
from sprat.model.kv_cache import KVCache
from sprat.model.layers import Embedding, Linear, RMSNorm
from sprat.model.mla import MLA
from sprat.model.moe import MLP, MoE, Routing
from sprat.model.mtp import MTP
from sprat.model.rope import RotaryTable


@dataclass(frozen=True)
class Hidden:
    """Output of the stack: ``x_BTD`` is normed, ready for the head; ``routing`` is what each MoE layer decided."""

    x_BTD: Tensor
    routing: list[Routing]


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each on its norm and added back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, layer) if config.is_mla else GQA(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = not config.is_moe(layer)
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(
        self, x_BTD: Tensor, context: ForwardContext, given_BTK: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """``x_BTD`` -> [B, T, D], and what the router decided; None for a dense layer.

        ``given_BTK``: see ``Gate.forward``.
        """
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), context)
        normed_BTD, routing = self.post_attention_layernorm(x_BTD), None
        if isinstance(self.mlp, MoE):
            out_BTD, routing = self.mlp(normed_BTD, context.valid_BT, given_BTK)
        else:
            out_BTD = self.mlp(normed_BTD)
        return x_BTD + out_BTD, routing


class Transformer(nn.Module):
    """A decoder of shape ``config``.

    Args:
        config: the shape.
        seed: seed of the initial weights; None leaves them unset (they are about to be loaded).

    Attributes:
        activation_checkpointing: where gradients are wanted, layers keep nothing but their input, and compute the rest
            a second time on the way back (Chen et al. 2016, arXiv 1604.06174): the same bits, less memory, more time.
    """

    activation_checkpointing = False

    def __init__(self, config: ModelConfig, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.rotary = RotaryTable(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.head.weight = self.embed_tokens.weight
        blocks = [Block(config, config.num_hidden_layers + depth) for depth in range(config.num_nextn_predict_layers)]
        self.mtp = nn.ModuleList(MTP(config, block) for block in blocks)
        if seed is not None and not self.embed_tokens.weight.is_meta:
            self._initialize(seed)

    @classmethod
    def create(cls, config: ModelConfig, seed: int) -> Self:
        """A model with fresh weights; the same seed gives the same bits."""
        return cls(config, seed=seed)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        segments_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: KVCache | None = None,
        valid_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] in float32; see ``hidden`` for the arguments."""
        out = self.hidden(tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT, cache=cache, valid_BT=valid_BT)
        return self.logits(out.x_BTD)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        segments_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: KVCache | None = None,
        valid_BT: Tensor | None = None,
        routes_BTLK: Tensor | None = None,
    ) -> Hidden:
        """Run the stack.

        Args:
            tokens_BT: long; with a cache, the new tokens only.
            segments_BT: int; a document is a run of equal segments, in which tokens attend (0 is padding, which is
                not counted). Not with a cache.
            positions_BT: long; default 0..T-1, which packed rows may keep since only differences count.
            cache: stores the new tokens and lets them attend to what each row holds.
            valid_BT: bool; False marks right padding, which is neither stored nor counted.
            routes_BTLK: long; the experts to take in each MoE layer, instead of those that the routers choose; -1
                leaves a token to the router.

        Raises:
            EngineError: the cache does not fit the call.
        """
        context = self.context(
            tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT, cache=cache, valid_BT=valid_BT
        )
        x_BTD, routing = self.run_layers(self.embed_tokens(tokens_BT), context, routes_BTLK)
        return Hidden(self.norm(x_BTD), routing)

    def context(
        self,
        tokens_BT: Tensor,
        *,
        segments_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: KVCache | None = None,
        valid_BT: Tensor | None = None,
    ) -> ForwardContext:
        """What the layers share in a pass over ``tokens_BT``; see ``hidden`` for the arguments and errors."""
        return forward_context(
            self.rotary,
            tokens_BT,
            segments_BT=segments_BT,
            positions_BT=positions_BT,
            cache=cache,
            valid_BT=valid_BT,
            # latent attention in float32; ``varlen_metadata`` looks at the rest
            use_varlen=self.config.is_mla and self.config.rope_interleave and self.norm.weight.dtype == torch.float32,
            window=self.config.sliding_window,
        )

    def run_layers(
        self, x_BTD: Tensor, context: ForwardContext, routes_BTLK: Tensor | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """The decoder layers over ``x_BTD``, then the cache moves on -> ([B, T, D], a routing for each MoE layer).

        ``routes_BTLK``: see ``hidden``.
        """
        routing: list[Routing] = []
        for number, layer in enumerate(self.layers):
            inputs: list[Any] = [x_BTD, context]
            if routes_BTLK is not None and self.config.is_moe(number):
                inputs.append(routes_BTLK[:, :, len(routing)])
            if self.activation_checkpointing and torch.is_grad_enabled():
                # nothing here draws, so no random state need be kept
                x_BTD, layer_routing = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD, layer_routing = layer(*inputs)
            if layer_routing is not None:
                routing.append(layer_routing)
        if context.cache is not None:
            context.cache.advance(x_BTD.shape[1], context.valid_BT)
        return x_BTD, routing

    def logits(self, x_BTD: Tensor) -> Tensor:
        """The head of normed ``x_BTD`` [..., D] -> [..., V], in float32."""
        logits: Tensor = self.head(x_BTD)
        return logits.float()

    def mtp_hidden(
        self, hidden: Hidden, tokens_BT: Tensor, *, segments_BT: Tensor | None = None, depth: int = 1
    ) -> Hidden:
        """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2) at ``depth`` (1-based).

        Position ``i`` joins ``hidden.x_BTD[:, i]`` with the embedding of token ``i + depth`` and predicts token
        ``i + depth + 1``. ``hidden`` is the stack's output for depth 1, else the output of the depth before.

        Args:
            hidden: output of the depth before, ``T - depth + 1`` positions long.
            tokens_BT: the tokens given to ``hidden``, all T of them.
            segments_BT: as given to ``hidden``. A pair across a border belongs to no document: it is padding, seen by
                nothing that counts. The caller leaves such positions out of the loss.

        Returns:
            ``T - depth`` positions; ``x_BTD`` is ready for the head.

        Raises:
            ConfigError: the model has no module of that depth.
        """
        if not 1 <= depth <= len(self.mtp):
            what, where = f"no MTP module of depth {depth}", "num_nextn_predict_layers"
            raise ConfigError(what, where=where, todo="raise it in the model config")
        joined_BT = tokens_BT[:, depth:]
        segments_BT = None if segments_BT is None else mtp_segments(segments_BT, depth)
        context = self.context(joined_BT, segments_BT=segments_BT)
        x_BTD, routing = self.mtp[depth - 1](hidden.x_BTD[:, :-1], self.embed_tokens(joined_BT), context)
        return Hidden(x_BTD, [] if routing is None else [routing])

    def moe_layers(self) -> list[MoE]:
        """All expert layers, MTP's included, in order of depth."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        """Fill all parameters in place; the same seed gives the same bits on every device."""
        residual = self.config.initializer_range * (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name else 0.0)
                continue
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            std = residual if "o_proj" in name or "down" in name else self.config.initializer_range
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(std))


def meta_model(config: ModelConfig, shapes: Collection[tuple[int, ...]], where: Path) -> Transformer:
    """The model of ``config`` on the meta device, which costs nothing, if files with such ``shapes`` can fill it.

    Raises:
        CheckpointError: the config (a few foreign numbers) announces more layers, experts or channels than there are.
    """
    advice = "check that config.json and the weights belong together"
    most = max((size for shape in shapes for size in shape), default=0)
    claims = {
        "num_hidden_layers": (config.num_hidden_layers, len(shapes)),
        "num_nextn_predict_layers": (config.num_nextn_predict_layers, len(shapes)),
        "n_routed_experts": (config.n_routed_experts, max(most, len(shapes))),
    }
    if config.is_mla:
        claims["qk_rope_head_dim"] = (config.qk_rope_head_dim, most)
    else:
        claims["head_dim"] = (config.attention_head_dim, most)
    for key, (claimed, bound) in claims.items():
        if claimed > bound:
            raise CheckpointError(f"{key}={claimed} is more than the tensors can hold", where=str(where), todo=advice)
    try:
        with torch.device("meta"):
            return Transformer(config, seed=None)
    except (RuntimeError, OverflowError) as error:  # sizes whose product no computer can count
        what = f"no model has such sizes: {str(error).splitlines()[0]}"
        raise CheckpointError(what, where=str(where), todo=advice) from None
