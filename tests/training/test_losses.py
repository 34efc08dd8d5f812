"""Losses against closed forms: for logits that are linear in a block's result the Fisher matrix is known."""

import pytest

torch = pytest.importorskip("torch")
from vitq_compiler.training import losses  # noqa: E402  # needs torch

pytestmark = pytest.mark.torch
SAMPLES, WIDTH, CLASSES = 3, 4, 5


def linear(seed: int = 0) -> tuple[losses.Suffix, list[torch.Tensor], torch.Tensor]:
    """Logits (x + nudge) W, their x, and the Fisher matrix of every sample."""
    random = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((SAMPLES, WIDTH), (WIDTH, CLASSES)))
    p = (x @ weight).softmax(-1)
    fisher = weight @ (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) @ weight.T
    return lambda nudges: [(x + nudges[0]) @ weight], [x], fisher


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """As near as the mean of so many samples comes."""
    torch.testing.assert_close(found, expected, atol=0.1 * float(expected.abs().max()), rtol=0)


def test_probes_sample_the_fisher_matrix() -> None:
    suffix, results, fisher = linear()
    (found,) = losses.probes(suffix, results, seed=1, count=4000)
    assert_near(torch.einsum("ksi,ksj->sij", found, found) / len(found), fisher)


def test_the_divergence_is_the_quadratic_form_of_the_fisher_matrix() -> None:
    suffix, (x,), fisher = linear()
    d = 1e-3 * torch.ones_like(x)
    found = losses.divergence(suffix([d]), suffix([torch.zeros_like(x)]))
    assert float(found) == pytest.approx(float(torch.einsum("si,sij,sj->s", d, fisher, d).mean() / 2), rel=1e-2)


def test_the_hessian_weights_are_its_row_sums() -> None:
    suffix, results, fisher = linear()
    (found,) = losses.weigh("hessian", suffix, results, seed=0)
    torch.testing.assert_close(found, fisher.sum(2).mean(0, keepdim=True).abs(), rtol=1e-2, atol=1e-4)


def test_only_its_own_result_is_nudged_for_the_hessian() -> None:
    """Of two results in a row, the weights of each are those it has alone."""
    suffix, (x,), _ = linear()
    both = losses.weigh("hessian", lambda nudges: suffix([nudges[0] + 2 * nudges[1]]), [x, x], seed=0)
    torch.testing.assert_close(both[1], 4 * both[0], rtol=1e-2, atol=1e-5)


def test_several_heads_add_up() -> None:
    suffix, results, fisher = linear()
    (found,) = losses.probes(lambda nudges: [*suffix(nudges), *suffix(nudges)], results, seed=1, count=4000)
    assert_near(torch.einsum("ksi,ksj->sij", found, found) / len(found), 2 * fisher)


def test_fisher_is_the_mean_square_of_the_probes() -> None:
    suffix, results, _ = linear()
    (weights,), (found,) = losses.weigh("fisher", suffix, results, seed=3), losses.probes(suffix, results, seed=3)
    torch.testing.assert_close(weights, found.square().mean(0))


def test_errors_by_hand() -> None:
    d = torch.tensor([[1.0, -2.0]])
    assert float(losses.error("mse", d, torch.tensor(2.0))) == pytest.approx((1 + 4) / 2 / 2)
    assert float(losses.error("fisher", d, torch.tensor([[3.0, 0.5]]))) == pytest.approx((3 * 1 + 0.5 * 4) / 2)
    probes = torch.tensor([[[1.0, 1.0]], [[0.0, 2.0]]])
    diagonal, along = (0.5 * 1 + 2.5 * 4) / 2, ((1 - 2) ** 2 + (-4) ** 2) / 2 / 2
    assert float(losses.error("low-rank", d, probes)) == pytest.approx(diagonal + along)


@pytest.mark.parametrize("metric", losses.METRICS)
def test_nothing_lost_costs_nothing_and_gradients_are_those_of_differences(metric: str) -> None:
    suffix, results, _ = linear()
    weights = torch.tensor(2.0) if metric == "mse" else losses.weigh(metric, suffix, results, seed=0)[0]
    assert float(losses.error(metric, torch.zeros_like(results[0]), weights)) == 0
    d = results[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: losses.error(metric, t, weights), (d,))
