"""The keys of a foreign ``config.json``, each checked as it is read and named where it does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sprat.errors import ConfigError

MOST = 2**31  # of any size
_DEEPSEEK = {"q_lora_rank": 1536, "n_shared_experts": 1, "first_k_dense_replace": 3}
# What a key is that a file leaves out, as transformers' configuration of the family has it; null means something else.
DEFAULTS: dict[str, dict[str, int]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096},
    "gpt_oss": {"num_key_value_heads": 8, "sliding_window": 128, "head_dim": 64},
    "deepseek_v2": {**_DEEPSEEK, "n_shared_experts": 2, "first_k_dense_replace": 0},
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "kimi_k2"), _DEEPSEEK),
    "deepseek_v4": {"n_shared_experts": 1},
    "nemotron_h": {"num_key_value_heads": 8, "head_dim": 128},
}


class ConfigKeys:
    """The keys of a ``config.json``, each checked as it is read."""

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        self.table, self.where = {**DEFAULTS.get(str(table.get("model_type")), {}), **table}, where

    def fault(self, what: str, todo: str) -> ConfigError:
        """The error that says ``what`` is wrong in this file."""
        return ConfigError(what, where=self.where, todo=todo)

    def size(self, *names: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """The number at the first of ``names`` that is there."""
        name = next((each for each in names if self.table.get(each) is not None), names[0])
        value = self.table.get(name)
        if value is None:
            if default is None:
                raise self.fault(f"{name} is missing", "add it: the shape of the model follows from it")
            return default
        if type(value) is not int or not least <= value < most:
            raise self.fault(f"{name} is {str(value)[:40]!r}", f"give a whole number from {least} to {most - 1}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """The truth value at ``name``."""
        value = self.table.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.fault(f"{name} is {str(value)[:40]!r}", "give true or false")
        return default if value is None else value

    def words(self, name: str, count: int | None = None) -> list[Any] | None:
        """The list at ``name``, ``count`` long; None where there is none."""
        value = self.table.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or (count is not None and len(value) != count):
            raise self.fault(f"{name} does not describe the layers", f"give a list of {count or 'them'}")
        return value

    def letters(self, name: str) -> list[str]:
        """The letters of the text at ``name``; none where there is none."""
        value = self.table.get(name)
        if value is not None and not isinstance(value, str):
            raise self.fault(f"{name} is {str(value)[:40]!r}", "give a text, one letter for each layer")
        return list(value or "")
