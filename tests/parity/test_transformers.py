"""What users get: DeepSeek-V2/V3, Llama, Mistral, Qwen2 and Qwen3 folders compute here what they do in transformers."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sprat.config.model import HF_CLASS, ModelConfig
from sprat.formats.hf import load_folder, save_folder
from sprat.model import Transformer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
TOLERANCE = 1e-4
check = functools.partial(
    settings,
    max_examples=34,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

ROPE = st.sampled_from(
    [
        None,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1},
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        },
    ]
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@st.composite
def deepseek(draw: st.DrawFn, architecture: str) -> ModelConfig:
    """A random tiny DeepSeek config."""
    groups = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    heads = draw(st.sampled_from([1, 2, 4]))
    three = architecture == "deepseek_v3"
    layers = draw(st.integers(1, 3))
    return ModelConfig(
        architecture=architecture,
        vocab_size=draw(st.integers(11, 40)),
        hidden_size=heads * draw(st.sampled_from([8, 12])),
        intermediate_size=draw(st.integers(5, 40)),
        moe_intermediate_size=draw(st.sampled_from([4, 8, 12])),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        q_lora_rank=draw(st.sampled_from([None, 6, 16])),
        kv_lora_rank=draw(st.sampled_from([4, 12])),
        qk_nope_head_dim=draw(st.sampled_from([4, 6])),
        qk_rope_head_dim=draw(st.sampled_from([2, 4, 8])),
        v_head_dim=draw(st.sampled_from([3, 8])),
        rope_interleave=draw(st.booleans()) if three else True,
        n_routed_experts=groups * per_group,
        n_shared_experts=draw(st.integers(1, 3)),
        num_experts_per_tok=draw(st.integers(1, min(3, kept * per_group))),
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=draw(st.booleans()) if three else False,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        scoring_func="sigmoid" if three else "softmax",
        topk_method="noaux_tc" if three else draw(st.sampled_from(["greedy", "group_limited_greedy"])),
        first_k_dense_replace=draw(st.integers(0, layers)),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        rope_scaling=draw(ROPE),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )


@st.composite
def windows(draw: st.DrawFn, architecture: str, layers: int) -> dict[str, Any]:
    """A sliding window for families that have one: every layer's of Mistral, of some layers of Qwen."""
    window = None if architecture == "llama" else draw(st.sampled_from([None, 1, 3, 8, 30]))
    if architecture == "mistral" or window is None:
        return {"sliding_window": window}
    sliding = draw(st.sets(st.integers(0, layers - 1), min_size=1))
    types = ["sliding_attention" if layer in sliding else "full_attention" for layer in range(layers)]
    return {"sliding_window": window, "layer_types": types}


@st.composite
def dense(draw: st.DrawFn, architecture: str) -> ModelConfig:
    """A random tiny dense config."""
    groups, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    layers = draw(st.integers(1, 3))
    return ModelConfig(
        architecture=architecture,
        vocab_size=draw(st.integers(11, 40)),
        hidden_size=groups * heads * draw(st.sampled_from([4, 8])),
        intermediate_size=draw(st.integers(5, 40)),
        num_hidden_layers=layers,
        num_attention_heads=groups * heads,
        num_key_value_heads=groups,
        head_dim=0 if architecture == "qwen2" else draw(st.sampled_from([0, 6, 8])),
        attention_bias=architecture == "qwen2" or (architecture != "mistral" and draw(st.booleans())),
        **draw(windows(architecture, layers)),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        rope_scaling=draw(st.sampled_from([None, LLAMA3, {"rope_type": "linear", "factor": 2.0}]) | ROPE),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=0.3,
    )


FAMILY: dict[str, st.SearchStrategy[ModelConfig]] = {
    name: deepseek(name) if name.startswith("deepseek") else dense(name) for name in HF_CLASS
}
kinds = pytest.mark.parametrize("kind", list(FAMILY))


def disturb(model: torch.nn.Module, seed: int) -> None:
    """Random values for what starts at zero or one: biases, gains and the router's correction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 and "inv_freq" not in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)


def foreign(config: ModelConfig) -> Any:
    """The transformers model class of ``config``."""
    return getattr(transformers, HF_CLASS[config.architecture])


@torch.no_grad()
def agree(ours: Transformer, theirs: Any, seed: int) -> None:
    """Assert that both give the same logits on random tokens."""
    tokens = torch.randint(ours.config.vocab_size, (2, 23), generator=torch.Generator().manual_seed(seed))
    difference = (ours(tokens) - theirs.eval()(input_ids=tokens).logits.float()).abs().max()
    assert difference <= TOLERANCE, f"{difference} for {ours.config}"


@kinds
def test_what_sprat_saves_transformers_reads_with_equal_logits(kind: str) -> None:
    @check()
    @given(config=FAMILY[kind], seed=st.integers(0, 2**20))
    def run(config: ModelConfig, seed: int) -> None:
        ours = Transformer.create(config, seed)
        disturb(ours, seed)
        with TemporaryDirectory() as folder:
            save_folder(ours, folder)
            theirs, report = foreign(config).from_pretrained(
                folder, output_loading_info=True, attn_implementation="eager"
            )
        assert not any(report.values()), report
        agree(ours, theirs, seed)

    run()


@kinds
def test_what_transformers_saves_sprat_reads_with_equal_logits(kind: str) -> None:
    @check()
    @given(config=FAMILY[kind], seed=st.integers(0, 2**20))
    def run(config: ModelConfig, seed: int) -> None:
        torch.manual_seed(seed)
        table = {key: value for key, value in config.to_hf().items() if key not in ("architectures", "model_type")}
        theirs = foreign(config)(foreign(config).config_class(**table, attn_implementation="eager"))
        disturb(theirs, seed)
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("error")  # a key that we do not know
            theirs.save_pretrained(folder)
            ours, read = load_folder(folder)
        same = config.replace(num_key_value_heads=read.num_key_value_heads, head_dim=read.head_dim)
        fields = {"initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "attention_bias", "topk_method"}
        assert read.model_dump(exclude=fields) == same.model_dump(exclude=fields)
        agree(ours, theirs, seed)

    run()


def test_mtp_drafts_what_transformers_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_layers import MtpModel

    config = ModelConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, num_nextn_predict_layers=2,
        initializer_range=0.3,
    )  # fmt: skip
    ours = Transformer.create(config, 5)
    disturb(ours, 6)
    save_folder(ours, tmp_path)
    theirs = foreign(config).from_pretrained(tmp_path, attn_implementation="eager").eval()
    # transformers looks for MTP modules where DeepSeek-V3 has them, in layer 61
    places = [rf"model\.layers\.{layer}.*" for layer in (2, 3)]
    monkeypatch.setattr(theirs, "_keys_to_ignore_on_load_unexpected", places)
    drafter = MtpModel.from_pretrained(theirs)
    tokens = torch.randint(31, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = ours.hidden(tokens)
        first = ours.mtp_hidden(hidden, tokens)
        second = ours.mtp_hidden(first, tokens, depth=2)
        states = theirs.model(input_ids=tokens).last_hidden_state
        for depth, mine in ((1, first), (2, second)):
            joined = tokens[:, depth:]
            positions = torch.arange(joined.shape[1])[None]
            states = drafter.forward_layer(depth - 1, states[:, :-1], positions, None, input_ids=joined)
            assert (states - mine.x_BTD).abs().max() <= TOLERANCE
