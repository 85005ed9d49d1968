"""What was computed once is not computed again, for the same tenant, model and text, and for nobody else."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sprat.engine import Engine, Sampling, Tenant
from sprat.engine.cache.disk import DiskCache
from sprat.engine.cache.prefix import BlockKeys
from sprat.engine.sequence import Sequence
from sprat.errors import EngineError
from sprat.files import atomic
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake, oracle

HOW = Sampling(temperature=0, max_tokens=5)
PROMPT = [7 + place % 90 for place in range(140)]
ALICE, BOB = Tenant("alice", b"secret of alice"), Tenant("bob", b"secret of bob")


def engine_of(model: Transformer, tokenizer: Tokenizer, **settings: Any) -> Engine:
    return Engine(model, tokenizer, backend=Fake(model.config.vocab_size), **{"frozen": True, **settings})


def hits(engine: Engine, prompt: list[int], tenant: Tenant = ALICE) -> int:
    return engine.generate([prompt], HOW, tenant=tenant)[0].usage.cache_hit_tokens


def test_a_tenant_finds_its_own_prompt_and_never_another_tenants(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = engine_of(model, tokenizer)
    assert hits(engine, PROMPT) == 0
    assert hits(engine, PROMPT) == 139, "all but the last token, whose logits are needed"
    assert hits(engine, PROMPT, BOB) == 0
    assert hits(engine, PROMPT, Tenant("alice", b"stolen name")) == 0
    assert hits(engine, PROMPT, BOB) == 139
    assert engine.stats().cached_tokens == 278 and engine.check() == []


def test_only_what_is_the_same_up_to_there_is_found(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = engine_of(model, tokenizer)
    hits(engine, PROMPT)
    assert hits(engine, PROMPT[:64] + PROMPT[:64]) == 64
    assert hits(engine, [1, *PROMPT[1:]]) == 0
    assert hits(engine, PROMPT[:128]) == 127, "the last token is always computed, its logits are needed"
    assert hits(engine, PROMPT[:129]) == 128
    assert hits(engine, [*PROMPT[:100], 1, 1, 1]) == 100, "a block is shared as far as it goes"
    assert hits(engine, [*PROMPT[:30], 1]) == 30


def test_a_block_is_found_behind_its_own_text_only(model: Transformer, tokenizer: Tokenizer) -> None:
    first, other, shared = ([start + place % 50 for place in range(64)] for start in (10, 100, 200))
    engine = engine_of(model, tokenizer)
    for prompt in ([*first, *shared, 7], [*other, 9, 9]):
        assert hits(engine, prompt) == 0
    asked = [*other, *shared, *shared, 7]
    output = engine.generate([asked], HOW, tenant=ALICE)[0]
    assert output.usage.cache_hit_tokens == 64, "the second block was computed behind another first one"
    assert output.token_ids == oracle(
        asked, 5, model.config.vocab_size, tokenizer.vocab_size, tokenizer.special_ids.eos
    )


def test_what_begins_as_another_tenants_prompt_does_is_not_copied(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = engine_of(model, tokenizer)
    hits(engine, PROMPT[:40], ALICE)
    assert [hits(engine, [*PROMPT[:30], 1, number], BOB) for number in (1, 2)] == [0, 31], "his own only"


def test_the_answer_is_part_of_the_next_turn(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = engine_of(model, tokenizer)
    said = engine.generate([PROMPT[:60]], Sampling(temperature=0, max_tokens=10), tenant=ALICE)[0].token_ids
    assert len(said) == 10
    assert hits(engine, PROMPT[:60] + said) == 69, "what was sampled last was never computed"


def test_weights_that_may_change_are_remembered_while_in_use_only(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = engine_of(model, tokenizer, frozen=False)
    assert hits(engine, PROMPT) == 0 and hits(engine, PROMPT) == 0
    assert engine.stats().blocks_cached == 0


def test_a_cached_answer_is_the_computed_one(drafter: Transformer, tokenizer: Tokenizer) -> None:
    how = Sampling(max_tokens=20, seed=3, logprobs=True)
    engine = Engine(drafter, tokenizer, frozen=True)
    cold, warm = (engine.generate([PROMPT], how)[0] for _ in range(2))
    assert (cold.usage.cache_hit_tokens, warm.usage.cache_hit_tokens) == (0, 139)
    assert warm.token_ids == cold.token_ids
    assert warm.logprobs == pytest.approx(cold.logprobs, abs=1e-4)


def test_a_key_depends_on_everything_that_the_content_depends_on() -> None:
    def key(*digests: str, secret: bytes = b"s", ids: list[int] = PROMPT[:64]) -> bytes:
        one = Sequence(1, ids, HOW, 5, 0, tenant=Tenant("t", secret))
        BlockKeys(*digests).extend(one, 64)
        return one.block_keys[0]

    plain = ("model", "adapter", "tokenizer", "f16")
    others = [key(*plain[:at], "other", *plain[at + 1 :]) for at in range(4)]
    others += [key(*plain, secret=b""), key(*plain, ids=PROMPT[1:65]), key("modela", "dapter", "tokenizer", "f16")]
    assert len({key(*plain), *others}) == 8
    assert key(*plain) == key(*plain)


def test_memory_that_is_short_forgets_the_oldest_first(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = engine_of(model, tokenizer, cache_bytes=7 * Fake.block_bytes)
    prompts = [[number, *PROMPT[1:]] for number in range(4)]
    for prompt in prompts:
        hits(engine, prompt)
    assert hits(engine, prompts[3]) == 139
    assert hits(engine, prompts[0]) == 0
    assert engine.stats().blocks <= 7 and engine.check() == []


def test_blocks_on_disk_survive_a_restart_and_know_their_tenant(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first = engine_of(model, tokenizer, disk=DiskCache(tmp_path, 1 << 20))
    plain = first.generate([PROMPT], HOW, tenant=ALICE)[0].token_ids
    first.stop()
    again = engine_of(model, tokenizer, disk=DiskCache(tmp_path, 1 << 20))
    output = again.generate([PROMPT], HOW, tenant=ALICE)[0]
    assert output.usage.cache_hit_tokens == 128 and output.token_ids == plain
    assert hits(again, PROMPT, BOB) == 0
    assert again.check() == []
    other = engine_of(Transformer.create(model.config, 9), tokenizer, disk=DiskCache(tmp_path, 1 << 20))
    assert hits(other, PROMPT) == 0


def test_what_does_not_fit_into_memory_comes_back_from_disk(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    disk = DiskCache(tmp_path, 1 << 20)
    engine = engine_of(model, tokenizer, disk=disk, cache_bytes=4 * Fake.block_bytes)
    hits(engine, PROMPT)
    hits(engine, [1, *PROMPT[1:]])
    disk.flush()
    assert hits(engine, PROMPT) == 128 and engine.check() == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone", "longer"])
def test_a_torn_file_is_a_miss(model: Transformer, tokenizer: Tokenizer, tmp_path: Path, damage: str) -> None:
    first = engine_of(model, tokenizer, disk=DiskCache(tmp_path, 1 << 20))
    plain = first.generate([PROMPT], HOW)[0].token_ids
    first.stop()
    disk = DiskCache(tmp_path, 1 << 20)
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        flipped = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        damaged = {"cut": content[:-1], "flipped": flipped, "empty": b"", "longer": content + b"x"}
        path.write_bytes(damaged[damage]) if damage != "gone" else path.unlink()
    engine = engine_of(model, tokenizer, disk=disk)
    output = engine.generate([PROMPT], HOW)[0]
    assert output.usage.cache_hit_tokens == 0 and output.token_ids == plain
    assert engine.check() == []


def test_the_disk_tier_keeps_within_its_bytes_and_cleans_up(tmp_path: Path) -> None:
    (tmp_path / ".00.kv.tmp-1").write_bytes(b"half a block")
    disk = DiskCache(tmp_path, 1000)
    for number in range(10):
        disk.write(bytes([number]) * 32, b"x" * 200, wait=True)
    disk.flush()
    kept = sorted(path.name[:2] for path in tmp_path.iterdir())
    assert kept == ["06", "07", "08", "09"] and disk.nbytes <= 1000
    assert disk.read(b"\x06" * 32) == b"x" * 200
    smaller = DiskCache(tmp_path, 500)
    assert smaller.nbytes <= 500 and smaller.read(b"\x06" * 32) == b"x" * 200, "what was read last stays"


def test_a_disk_that_refuses_goes_quiet(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "write_bytes", refuse)
    engine = engine_of(model, tokenizer, disk=(disk := DiskCache(tmp_path, 1 << 20)))
    assert hits(engine, PROMPT) == 0
    engine.stop()
    assert disk.disabled and hits(engine, PROMPT) == 139
    assert DiskCache(tmp_path / "file", 1).disabled is False
    (tmp_path / "plain").write_text("no folder")
    assert DiskCache(tmp_path / "plain", 1).disabled


def test_a_full_disk_fails_no_request(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    mounted = os.geteuid() == 0 and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(tmp_path)], stderr=subprocess.DEVNULL
    )
    if not mounted:
        pytest.skip("no right to mount a small disk")
    try:
        engine = engine_of(model, tokenizer, disk=(disk := DiskCache(tmp_path, 1 << 20)))
        for number in range(4):
            assert hits(engine, [number, *PROMPT[1:]]) == 0
        engine.stop()
        assert disk.disabled and engine.check() == [] and disk.nbytes <= 4096
        assert hits(engine, [0, *PROMPT[1:]]) == 139
    finally:
        subprocess.check_call(["umount", str(tmp_path)])


def test_blocks_on_disk_need_a_model_that_does_not_change(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="do not change"):
        engine_of(model, tokenizer, frozen=False, disk=DiskCache(tmp_path, 1))
