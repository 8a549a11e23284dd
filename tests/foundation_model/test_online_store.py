"""What the running teacher stores beyond float16 logits: float32 by option, and embeddings of the same forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from teacher_case import SCHEMA, messages, teacher_config
from teacher_process import Spec, publish
from teacher_rig import COUNTS, SpecMaker, read_blocks, run_teacher

from das import fault
from das.embedding_block import EmbeddingBlock, decode_embeddings
from das.errors import ConfigError, Retryable
from das.examples import decode_examples
from das.logit_block import LogitBlock, decode_block
from foundation_model.trainer import TeacherTrainer

WIDTH = 24


def read_pairs(spec: Spec) -> dict[tuple[int, int], tuple[LogitBlock, EmbeddingBlock]]:
    """Every message's logits and embeddings, fetched together."""
    store = spec.store()
    fetched = store.fetch_pairs({partition: range(count) for partition, count in enumerate(COUNTS)})
    store.close()
    return {
        (partition, offset): (decode_block(raw), decode_embeddings(beside))
        for partition, found in fetched.items()
        for offset, (raw, beside) in enumerate(zip(found.blocks, found.embeddings, strict=True))
        if raw is not None and beside is not None
    }


def replayed(config: dict[str, object]) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Logits and what the heads read, of an independent teacher that scores each message before it trains on it."""
    trainer = TeacherTrainer(teacher_config(**config), SCHEMA)
    values = {(p, o): v for p, count in enumerate(COUNTS) for o, v in enumerate(messages(count, seed=p))}
    read_by_heads: list[torch.Tensor] = []
    trainer.model.heads.register_forward_pre_hook(lambda _, args: read_by_heads.append(args[0].detach()))
    found = {}
    for at in sorted(values, key=lambda at: (at[1], at[0])):
        batch = trainer.encoder.encode(decode_examples(values[at], SCHEMA, trainer.encoder.columns))
        logits_BK = trainer.score(batch)
        found[at] = logits_BK.detach().numpy().copy(), read_by_heads[-1].numpy()
        trainer.step(logits_BK, batch)
    return found


def test_logits_are_float32_by_option(make_spec: SpecMaker) -> None:
    spec = make_spec(logit_dtype="float32")
    publish(spec, COUNTS)
    run_teacher(spec)
    blocks, expected = read_blocks(spec), replayed({"logit_dtype": "float32"})
    assert blocks.keys() == expected.keys()
    for at, block in blocks.items():
        assert block is not None
        np.testing.assert_array_equal(block.logits, expected[at][0])
    assert any((b.logits != b.logits.astype(np.float16)).any() for b in blocks.values() if b)


def test_embeddings_of_the_scoring_forward_are_stored_beside_the_logits(make_spec: SpecMaker) -> None:
    spec = make_spec(embedding_width=WIDTH)
    publish(spec, COUNTS)
    _, telemetry = run_teacher(spec)
    assert telemetry.total("exfm_logit_blocks_total", outcome="written") == sum(COUNTS)
    pairs, expected = read_pairs(spec), replayed({})  # storing embeddings changes nothing of the training
    assert pairs.keys() == expected.keys()
    kept = []
    for at, (block, beside) in pairs.items():
        logits_BK, flat_BI = expected[at]
        np.testing.assert_array_equal(block.logits, logits_BK.astype(np.float16))
        assert beside.belongs_to(block)
        assert beside.embeddings.shape == (16, WIDTH)
        assert 0 <= beside.trained_offset <= at[1]
        distances = [np.linalg.norm(x[:8] - x[8:], axis=1) for x in (flat_BI, beside.embeddings)]
        kept.append(distances[1] / distances[0])
    # a projection of 24 signs keeps distances, up to its one scale: sqrt(24 / what the heads read)
    scale = np.sqrt(WIDTH / expected[0, 0][1].shape[1])
    assert 0.8 < np.median(np.concatenate(kept)) / scale < 1.25


def test_a_restarted_teacher_writes_the_same_embeddings_again(make_spec: SpecMaker) -> None:
    spec = make_spec(embedding_width=WIDTH)
    publish(spec, COUNTS)
    fault.arm("teacher.after_put:4:raise")
    with pytest.raises(Retryable):
        run_teacher(spec)
    fault.arm(None)
    _, telemetry = run_teacher(spec)
    assert telemetry.total("exfm_logit_blocks_total", outcome="identical") == 4
    assert telemetry.total("exfm_logit_blocks_total", outcome="refused") == 0
    assert len(read_pairs(spec)) == sum(COUNTS)


def test_without_the_option_nothing_is_stored_beside(make_spec: SpecMaker) -> None:
    spec = make_spec()
    publish(spec, COUNTS)
    run_teacher(spec)
    assert read_pairs(spec) == {}


def test_more_values_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="embedding_width: 1000, the model has 512"):
        TeacherTrainer(teacher_config(embedding_width=1000), SCHEMA)
