"""The engine that answers are drawn from: the policy itself, or a copy of it in fewer bits.

Sampling waits for the weights to be read, so a policy of half the bytes, or an eighth, samples faster. It is another
policy, too. What it samples is off policy by as much as rounding changes it, and training on it as if it were not
biases the gradient ("Your efficient RL framework secretly brings you off-policy RL training", Yao et al. 2025). The
correction is theirs as well, truncated importance sampling: each token is weighed by ``min(p_trainer / p_sampler,
importance_cap)``, where p_sampler is what the rounded policy sampled with (``update``). A config that rounds and does
not correct is refused, and ``max_mismatch`` stops a run whose copy is too far away to be corrected.

``bfloat16``: the matrices; norms and routers stay float32 where the native engine computes, which reads both. The copy
is written over in place. ``int4``: codes of four bits, nearest, a scale and a minimum for each 32 channels; embedding
and head have eight bits (``sprat.quant``). Without minimums SmolLM2, whose file has some, was eight times as far away.
Codes are laid out anew for each version of the weights, so the engine is made anew with them.

Held-out problems are asked of the policy in float32, which is what comes of the run.
"""

from __future__ import annotations

import torch

from sprat.config.quant import QuantizeConfig
from sprat.config.rl import RLRunConfig
from sprat.engine import Engine
from sprat.engine.backends.native import NativeBackend
from sprat.model import Transformer
from sprat.model.layers import linears
from sprat.post.rl.merged_copy import plain_copy
from sprat.quant import quantize_model
from sprat.tokens import Tokenizer

INT4 = QuantizeConfig(rounding="nearest", symmetric=False)


class RolloutEngine:
    """See the module's text.

    Args:
        policy: float32, without adapters.
        max_batch: answers at once.
        exact: an engine of ``policy`` that is there already, for ``rollout.precision = "float32"``.

    Attributes:
        engine: what to sample from; another one after ``take_over``, where it must be.
    """

    def __init__(
        self,
        policy: Transformer,
        tokenizer: Tokenizer,
        config: RLRunConfig,
        max_batch: int,
        exact: Engine | None = None,
    ) -> None:
        self._policy, self._tokenizer, self._max_batch = policy, tokenizer, max_batch
        self._precision = config.rollout.precision
        if self._precision == "float32" and exact is not None:
            self.engine = exact
        else:
            self.engine = self._new_engine()

    def take_over(self) -> Engine:
        """Sample with what the policy is now."""
        if self._precision == "int4":
            self.engine = self._new_engine()
        elif self._precision == "bfloat16":
            with torch.no_grad():
                for name, copied in self.engine.model.named_parameters():
                    copied.copy_(self._policy.get_parameter(name))
        return self.engine

    def _new_engine(self) -> Engine:
        model = self._policy
        if self._precision == "bfloat16":
            model = _in_bfloat16(model)
        elif self._precision == "int4":
            model = quantize_model(model, INT4, materialize=False)
        return Engine(model, self._tokenizer, max_batch=self._max_batch)


def _in_bfloat16(model: Transformer) -> Transformer:
    """A copy of ``model`` whose matrices are bfloat16, or where torch computes all of its parameters."""
    copied = plain_copy(model)
    for _, linear in linears(copied):
        for leaf in linear.weight_names:
            weight = linear.get_parameter(leaf)
            weight.data = weight.data.to(torch.bfloat16)
    if NativeBackend.accepts(copied) is not None:
        for parameter in copied.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return copied
