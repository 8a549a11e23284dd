"""Kunlun's mechanisms one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foundation_model.heads import ObjectiveHeads
from foundation_model.kunlun_config import KunlunConfig
from foundation_model.layers.context import ContextTokens
from foundation_model.layers.gdpa_pffn import GdpaPffn
from foundation_model.layers.hsp import HierarchicalSeedPooling, SeedPooling, SumKronLinear
from foundation_model.layers.rote import Rote, rotate
from foundation_model.layers.running_norm import RunningNorm
from foundation_model.layers.swa import SlidingWindowAttention
from foundation_model.layers.tower import LayerPlan, plan_layers
from foundation_model.layers.weight_gen import WeightGen
from foundation_model.layers.wukong import WukongBlock, WukongExperts

OFFSETS = torch.tensor([0, 3, 3, 8], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_sum_kron_linear_is_a_sum_of_kronecker_products() -> None:
    layer = SumKronLinear(num_in=5, num_out=3, width=4, num_terms=2)
    h_BNW = torch.randn(2, 5, 4)
    z = layer.z_NKM.view(5, 2, 3)
    w = layer.w_KWW.view(2, 4, 4)
    expected = sum(z[:, k].T @ h_BNW @ w[k] for k in range(2))
    close(layer(h_BNW), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU computes in another order without a gradient")
def test_sum_kron_linear_without_a_gradient_is_the_same_map() -> None:
    layer = SumKronLinear(num_in=5, num_out=3, width=4, num_terms=2).cuda().double()
    h_BNW = torch.randn(2, 5, 4, device="cuda", dtype=torch.float64)
    with torch.no_grad():
        apart = layer(h_BNW)
    torch.testing.assert_close(apart, layer(h_BNW))


def pffn(**changes: object) -> GdpaPffn:
    options = {"activation": "gelu_tanh", "inner_scale": None, "outer_scale": 1.0, "backend": "reference", **changes}
    return GdpaPffn(8, 2, 6, num_summary=3, n_kv=5, **options)  # type: ignore[arg-type]


def test_gdpa_pffn_is_the_deployed_block() -> None:
    block, s_TW, x_sum = pffn(), torch.randn(8, 8), torch.randn(3, 3, 6)
    q = torch.nn.functional.layer_norm(s_TW, (8,))
    key, value = block.key_value(torch.einsum("nm,bmd->bnd", block.rows.weight, x_sum)).chunk(2, dim=-1)
    example = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2])
    out = torch.empty(8, 8)
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        scores = torch.einsum("td,tnd->tn", q[:, part], key[example][..., part]) / math.sqrt(4)
        hidden = torch.nn.functional.gelu(scores, approximate="tanh")
        out[:, part] = torch.einsum("tn,tnd->td", hidden, value[example][..., part])
    g = out + q
    expected = g / (g.square().mean(-1, keepdim=True) + 1e-5).sqrt() + s_TW
    close(block(s_TW, OFFSETS, x_sum), expected)


def test_gdpa_pffn_reads_the_context_of_its_own_row() -> None:
    block, s_TW, x_sum = pffn(), torch.randn(8, 8), torch.randn(3, 3, 6)
    before = block(s_TW, OFFSETS, x_sum)
    x_sum[2] += 1
    after = block(s_TW, OFFSETS, x_sum)
    assert torch.equal(before[:3], after[:3])
    assert not torch.allclose(before[3:], after[3:])


def test_gdpa_pffn_passes_its_scales_on() -> None:
    s_TW, x_sum = torch.randn(8, 8), torch.randn(3, 3, 6)
    outputs = []
    for changes in ({}, {"inner_scale": 3.0}, {"outer_scale": 3.0}, {"activation": "identity"}):
        torch.manual_seed(0)
        outputs.append(pffn(**changes)(s_TW, OFFSETS, x_sum))
    for other in outputs[1:]:
        assert not torch.allclose(outputs[0], other)


def test_rote_scores_depend_on_distance_and_relative_age_only() -> None:
    rote = Rote(8, 86_400.0, time=True)
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    offsets = torch.tensor([0, 6], dtype=torch.int32)
    angles = rote.angles(offsets, torch.full((6,), 500.0))

    def score(i: int, j: int) -> float:
        return ((rotate(q, angles[i : i + 1]) * rotate(k, angles[j : j + 1])).sum()).item()

    assert score(1, 3) == pytest.approx(score(2, 4), abs=1e-5)
    assert score(1, 3) != pytest.approx(score(1, 4), abs=1e-3)
    close(rotate(q, angles[:1]).norm(), q.norm())


def test_rote_angle_is_position_and_log_age() -> None:
    rote = Rote(4, 100.0, time=True)
    angles = rote.angles(OFFSETS, torch.tensor([900.0, 50.0, 0.0, 7.0, 6.0, 5.0, 4.0, 3.0]))
    theta = torch.tensor([1.0, 10_000.0**-0.5])
    close(angles[1], (1 + math.log(1.5)) * theta)
    close(angles[3], math.log(1.07) * theta)
    still = Rote(4, 100.0, time=False).angles(OFFSETS, torch.rand(8))
    close(still[7], 4 * theta)


def test_rotary_embedding_needs_an_even_head() -> None:
    with pytest.raises(ValueError, match="must be even"):
        Rote(3, 1.0, time=True)


def test_attention_sees_only_its_window() -> None:
    layer = SlidingWindowAttention(8, 2, window=1, backend="reference")
    offsets, angles = torch.tensor([0, 5], dtype=torch.int32), torch.zeros(5, 2)
    s_TW = torch.randn(5, 8)
    moved = s_TW.clone()
    moved[4] = torch.randn(8)
    before, after = layer(s_TW, offsets, angles), layer(moved, offsets, angles)
    assert torch.equal(before[:3], after[:3])
    assert not torch.allclose(before[3], after[3])
    layer.window = None
    assert not torch.allclose(layer(s_TW, offsets, angles)[0], layer(moved, offsets, angles)[0])


def test_attention_feels_the_angles() -> None:
    layer = SlidingWindowAttention(8, 2, window=None, backend="reference")
    s_TW, offsets = torch.randn(5, 8), torch.tensor([0, 5], dtype=torch.int32)
    assert not torch.allclose(layer(s_TW, offsets, torch.zeros(5, 2)), layer(s_TW, offsets, torch.randn(5, 2)))


@pytest.mark.parametrize("kind", ["hsp", "pma"])
def test_pooling_is_defined_without_events(kind: str) -> None:
    if kind == "hsp":
        pool: torch.nn.Module = HierarchicalSeedPooling(8, 2, n_seed=6, n_tok=3, num_terms=2, backend="reference")
    else:
        pool = SeedPooling(8, 2, n_tok=3, backend="reference")
    s_TW = torch.randn(8, 8, requires_grad=True)
    out = pool(s_TW, OFFSETS)
    assert out.shape == (3, 3, 8)
    assert torch.isfinite(out).all()
    out[1].sum().backward()
    assert s_TW.grad is not None
    assert torch.equal(s_TW.grad, torch.zeros_like(s_TW))
    assert all(torch.isfinite(p.grad).all() for p in pool.parameters() if p.grad is not None)


def test_a_row_without_events_gets_learned_tokens() -> None:
    pool = HierarchicalSeedPooling(8, 2, n_seed=6, n_tok=3, num_terms=2, backend="reference")
    with torch.no_grad():
        pool.nothing_MW.fill_(7.0)
    out = pool(torch.randn(8, 8), OFFSETS)
    assert torch.equal(out[1], torch.full((3, 8), 7.0))
    assert not (out[0] == 7.0).any()


def test_weight_gen_gate_starts_half_open_and_closes() -> None:
    layer = WeightGen(4, 2, 8)
    x_BND = torch.randn(3, 4, 8)
    mixed = layer.tokens.weight @ x_BND
    summary = mixed + layer.transform(mixed)
    gate = torch.sigmoid(layer.gate[-1].bias)
    close(layer(x_BND), summary * gate)
    with torch.no_grad():
        layer.gate[-1].bias.fill_(-100.0)
    close(layer(x_BND), torch.zeros(3, 2, 8))


@pytest.mark.parametrize("num_out", [5, 4])
def test_wukong_block_is_its_formula(num_out: int) -> None:
    block = WukongBlock(5, num_out, 8, rank=3, hidden=16)
    x = torch.randn(2, 5, 8)
    products = torch.einsum("bnd,bmd,mk->bnk", x, x, block.y_NK)
    fmb = block.factor(torch.nn.functional.layer_norm(products.flatten(1), (15,))).view(2, -1, 8)
    lcb = torch.einsum("ln,bnd->bld", block.linear.weight, x)
    residual = x if block.residual is None else torch.einsum("on,bnd->bod", block.residual.weight, x)
    assert (block.residual is None) == (num_out == 5)
    close(block(x), torch.nn.functional.layer_norm(torch.cat([fmb, lcb], 1) + residual, (8,)))


def test_experts_see_only_their_tokens() -> None:
    experts = WukongExperts(6, 6, 8, num_experts=2, rank=3, hidden=16)
    x = torch.randn(1, 6, 8)
    moved = x.clone()
    moved[:, 2] += 1
    before, after = experts(x), experts(moved)
    assert not torch.allclose(before[:, :3], after[:, :3])
    assert torch.equal(before[:, 3:], after[:, 3:])
    with pytest.raises(ValueError, match="experts need"):
        WukongExperts(6, 6, 8, num_experts=4, rank=3, hidden=16)


def test_context_tokens_are_one_per_feature_a_few_numbers_and_a_domain() -> None:
    context = ContextTokens(2, 3, 5, 8, num_numeric_tokens=4, num_domains=3, normalize=False)
    embedded, num, domain = torch.randn(6, 2, 3), torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    out = context(embedded, num, domain)
    assert out.shape == (6, context.num_tokens, 8)
    assert context.num_tokens == 2 + 4 + 1
    close(out[:, 1], embedded[:, 1] @ context.weight_CED[1] + context.bias_CD[1])
    assert context.numeric is not None
    close(out[:, 2:6].flatten(1), context.numeric(num))
    assert context.domain is not None
    close(out[:, 6], context.domain.weight[domain])
    bare = ContextTokens(2, 3, 0, 8, num_numeric_tokens=4, num_domains=0, normalize=True)
    assert bare(embedded, num[:, :0], domain).shape == (6, 2, 8) == (6, bare.num_tokens, 8)


@pytest.mark.parametrize("kind", ["none", "bias", "adapter"])
def test_domains_start_as_one_and_may_part(kind: str) -> None:
    heads = ObjectiveHeads(6, (8, 4), num_heads=2, num_domains=3, domain_head=kind)  # type: ignore[arg-type]
    flat, domain = torch.randn(1, 6).expand(3, 6), torch.arange(3)
    same = heads(flat, domain)
    assert same.shape == (3, 2)
    close(same[0], same[2])
    heads(flat, domain)[1, 0].backward()
    for name in ("bias_DK", "adapter_DKJ"):
        parameter = getattr(heads, name)
        assert (parameter is not None) == (kind == "adapter" or (kind == "bias" and name == "bias_DK"))
        if parameter is not None:
            assert parameter.grad[1, 0].abs().sum() > 0
            assert parameter.grad[[0, 2]].abs().sum() == 0
            assert parameter.grad[1, 1].abs().sum() == 0


def test_objectives_have_heads_of_their_own() -> None:
    heads = ObjectiveHeads(6, (8,), num_heads=2, num_domains=3, domain_head="adapter")
    heads(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))[:, 0].sum().backward()
    assert heads.out[0].weight.grad is not None
    assert heads.out[0].weight.grad.any()
    for parameter in (*heads.out[1].parameters(), *heads.trunks[1].parameters()):
        assert parameter.grad is None or not parameter.grad.any()


POOL, PFFN_POOL = LayerPlan(True, False, False), LayerPlan(True, True, False)
ATTEND, NOTHING, ALL = LayerPlan(False, False, True), LayerPlan(False, False, False), LayerPlan(True, True, True)


@pytest.mark.parametrize(
    ("changes", "depth", "expected"),
    [
        ({}, 4, [PFFN_POOL, ATTEND, PFFN_POOL, ATTEND, POOL]),
        ({}, 0, [POOL]),
        ({"compute_skip": False}, 2, [ALL, ALL, POOL]),
        ({"final_pool": False}, 3, [PFFN_POOL, ATTEND, POOL, NOTHING]),
        ({"final_pool": False}, 2, [POOL, NOTHING, NOTHING]),
        ({"final_pool": False, "compute_skip": False}, 2, [ALL, POOL, NOTHING]),
        ({"final_pool": False}, 0, [POOL]),
    ],
)
def test_compute_skip_goes_by_parity_and_nothing_is_built_unread(changes: dict, depth: int, expected: list) -> None:
    assert plan_layers(KunlunConfig(**changes), depth) == expected


def test_running_norm_holds_the_statistics_of_all_rows_before() -> None:
    norm = RunningNorm(3)
    x = torch.randn(5_000, 3) * torch.tensor([1.0, 50.0, 1e-2]) + torch.tensor([0.0, -400.0, 7.0])
    first = norm(x[:10])
    close(first, x[:10].clamp(-5, 5))
    for start in range(10, 4_000, 190):
        norm(x[start : start + 190])
    # The start counts as one row of mean 0 and variance 1.
    seen = torch.cat([x[:4_000].double(), torch.zeros(1, 3).double()])
    second_moment = (seen.square().sum(0) + 1) / len(seen)
    torch.testing.assert_close(norm.mean_N.double(), seen.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.variance_N.double(), second_moment - seen.mean(0).square(), rtol=1e-3, atol=1e-4)
    before = norm.mean_N
    later = norm.eval()(x[4_000:])
    assert torch.equal(norm.mean_N, before)
    assert later[:, 1].std() == pytest.approx(1.0, abs=0.1)
    assert norm(torch.full((1, 3), 1e6)).max() == 5.0


def test_running_norm_of_a_row_does_not_depend_on_its_batch() -> None:
    norm, x = RunningNorm(3), torch.randn(8, 3)
    norm(x * 3)
    alone = RunningNorm(3)
    alone.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x)[:1], alone(x[:1]))


def test_running_norm_survives_a_column_that_is_not_finite() -> None:
    norm = RunningNorm(2)
    norm(torch.tensor([[1.0, 2.0], [float("nan"), 4.0]]))
    assert norm.mean_N[0] == 0
    assert norm.mean_N[1] == pytest.approx(2.0)
    assert torch.isfinite(norm(torch.ones(1, 2))).all()
