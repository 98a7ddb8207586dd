"""Each equation against the naive float64 twin."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_abpem import functional as F
from tests import reference

LOGITS = 3 * torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def close(a, b, bound=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(a), torch.as_tensor(b, dtype=torch.as_tensor(a).dtype), rtol=0, atol=bound
    )


def test_entropy():
    close(F.entropy(LOGITS), reference.entropies(LOGITS))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_principal_entropy(k):
    close(F.principal_entropy(LOGITS, k), reference.principal_entropies(LOGITS, k))


def test_balances():
    close(F.marginal_balance(LOGITS), reference.marginal_balance(LOGITS))
    close(F.read_balance(LOGITS), reference.read_balance(LOGITS))


# ---------------------------------------------------------------------------------------- classes with a logit of -inf

COUNTS = [3.0, 0.0, 12.0, 1.0, 0.5, 4.0, 2.0, 7.0, 0.0]
LOSSES = {
    "entropy": (F.entropy, reference.entropies),
    "principal_entropy": (lambda x: F.principal_entropy(x, 3), lambda x: reference.principal_entropies(x, 3)),
    "marginal_balance": (F.marginal_balance, reference.marginal_balance),
    "read_balance": (F.read_balance, reference.read_balance),
    "stream_balance": (
        lambda x: F.stream_balance(x, torch.tensor(COUNTS).double()),
        lambda x: reference.stream_balance(x, COUNTS, 10.0),
    ),
    "confidence_loss": (F.confidence_loss, reference.confidence_losses),
}


def hidden(where):
    """(7, 9) bool: which logits are -inf."""
    mask = torch.zeros(LOGITS.shape, dtype=torch.bool)
    if where == "in all samples":
        mask[:, [0, 4, 5]] = True
    elif where == "in some samples":
        mask[::2, [1, 5]] = True
        mask[3, :4] = True
    else:  # all but one class; in the first sample that one is impossible in all others
        mask[0], mask[4] = True, True
        mask[0, 8] = mask[4, 2] = False
        mask[1:, 8] = True
    return mask


def loss_and_gradient(loss, logits):
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    total = (value * (1 + torch.arange(value.numel()).reshape(value.shape))).sum()  # each sample has its own weight
    return value.detach(), torch.autograd.grad(total, logits)[0]


def naive_gradient(loss, logits, mask, step=1e-5):
    """By central differences; zero where a logit is -inf."""

    def total(x):
        value = torch.tensor(loss(x), dtype=torch.float64)
        return (value * (1 + torch.arange(value.numel()).reshape(value.shape))).sum()

    gradient = torch.zeros_like(logits)
    for place in (~mask).nonzero().tolist():
        moved = torch.zeros_like(logits)
        moved[tuple(place)] = step
        gradient[tuple(place)] = (total(logits + moved) - total(logits - moved)) / (2 * step)
    return gradient


@pytest.mark.parametrize("where", ["in all samples", "in some samples", "all but one"])
@pytest.mark.parametrize("name", LOSSES)
def test_classes_at_minus_infinity_have_probability_0(name, where):
    ours, naive = LOSSES[name]
    mask = hidden(where)
    logits = LOGITS.masked_fill(mask, -math.inf)
    value, gradient = loss_and_gradient(ours, logits)
    close(value, naive(logits))
    assert gradient[mask].abs().sum() == 0
    close(gradient, naive_gradient(naive, logits, mask), 1e-8)
    far, near = loss_and_gradient(ours, LOGITS.masked_fill(mask, -800.0))  # exp is 0 there as well
    close(value, far, 0)
    close(gradient, near, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_gradients_are_finite_under_a_large_loss_scale(name):
    mask = hidden("in some samples")
    logits = LOGITS.float().masked_fill(mask, -math.inf)
    _, exact = loss_and_gradient(LOSSES[name][0], logits)
    _, scaled = loss_and_gradient(lambda x: LOSSES[name][0](x) * 2.0**40, logits)
    torch.testing.assert_close(scaled / 2.0**40, exact, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_without_any_possible_class_has_no_loss(name):
    logits = LOGITS.clone()
    logits[2] = -math.inf
    value = LOSSES[name][0](logits)
    assert value.isnan().tolist() == (True if value.dim() == 0 else [i == 2 for i in range(7)])


def test_a_stream_without_prior_in_which_a_class_never_came():
    logits = LOGITS.masked_fill(hidden("in all samples"), -math.inf)
    counts = logits.softmax(1).sum(0)
    value, gradient = loss_and_gradient(lambda x: F.stream_balance(x, counts, prior=0.0), logits)
    close(value, reference.marginal_balance(logits))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_log_changes_no_ordinary_loss(dtype):
    """Not by a bit, nor its gradient: the recorded results are those of the plain forms."""

    def plain_entropy(x):
        log_p = x.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    def plain_balance(x):
        log_p = x.log_softmax(-1).logsumexp(0) - math.log(len(x))
        return -(log_p.exp() * log_p).sum()

    for scale in (1, 20, 500):
        for ours, plain in ((F.entropy, plain_entropy), (F.marginal_balance, plain_balance)):
            pairs = zip(*(loss_and_gradient(f, scale * LOGITS.to(dtype)) for f in (ours, plain)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------------------------------------------------- the rest


def test_marginal_balance_has_a_finite_gradient_where_a_class_underflows():
    logits = torch.tensor([[200.0, 0.0, -200.0], [180.0, 10.0, -150.0]], requires_grad=True)
    F.marginal_balance(logits).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_gaussian_kl():
    for a, s, b, t in ((0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -1.0, 2.0), (5.0, 3.0, 4.0, 0.1)):
        ours = F.gaussian_kl(*(torch.tensor(x, dtype=torch.float64) for x in (a, s, b, t)))
        close(ours, reference.gaussian_kl(a, s, b, t))


def test_gaussian_kl_against_torch_distributions():
    p, q = torch.distributions.Normal(0.4, 1.3), torch.distributions.Normal(-2.0, 0.7)
    ours = F.gaussian_kl(p.loc, p.scale, q.loc, q.scale)
    close(ours, torch.distributions.kl_divergence(p, q), 1e-5)


def moments(q, k, scale):
    return F.moment_score_statistics(F.token_moments(q), F.token_moments(k), scale)


@pytest.mark.parametrize("statistics", [F.dense_score_statistics, moments])
@pytest.mark.parametrize(("n_q", "n_k", "heads"), [(5, 5, 1), (3, 11, 2), (40, 7, 4)])
def test_score_statistics(statistics, n_q, n_k, heads):
    torch.manual_seed(n_q)
    q, k = torch.randn(3, n_q, 8, dtype=torch.float64), torch.randn(3, n_k, 8, dtype=torch.float64) + 1
    scores = reference.mean_scores(q, k, heads)
    expected = reference.block_statistics(scores, slice(None), slice(None))
    ours = statistics(q, k, (8 // heads) ** -0.5 / heads)
    close(torch.stack(ours[:2], dim=1), expected, 1e-13)
    assert ours.seen is None


def test_both_forms_have_the_same_gradients():
    torch.manual_seed(0)
    q, k = (torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True) for n in (9, 5))
    gradients = [
        torch.autograd.grad(torch.stack([x.sum() for x in form(q, k, 0.3)[:2]]).sum(), (q, k))
        for form in (F.dense_score_statistics, moments)
    ]
    for dense, moment in zip(*gradients, strict=True):
        close(dense, moment)


ROWS = torch.tensor([[True, False, True, True], [False, False, True, False], [False] * 4])
COLUMNS = torch.tensor([[True, True, False], [False, True, False], [True, True, True]])


def masked_dense(q, k):
    return F.dense_score_statistics(q, k, 0.3, keep=ROWS[:, :, None] & COLUMNS[:, None])


def masked_moments(q, k):
    return F.moment_score_statistics(F.token_moments(q, ROWS), F.token_moments(k, COLUMNS), 0.3)


@pytest.mark.parametrize("statistics", [masked_dense, masked_moments])
def test_padded_tokens_do_not_count(statistics):
    torch.manual_seed(0)
    q, k = (torch.randn(3, n, 6, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    with torch.no_grad():
        q[0, 1], k[0, 2] = float("nan"), float("inf")  # what a padded token holds is nobody's business
    ours = statistics(q, k)
    assert ours.seen.tolist() == [True, False, False]  # the second has one score left, the third none
    scores = 0.3 * q[:1, ROWS[0]] @ k[:1, COLUMNS[0]].mT
    [(mean, std)] = reference.block_statistics(scores, slice(None), slice(None))
    close(ours.mean[0], mean, 1e-13)
    close(ours.std[0], std, 1e-13)


def test_masked_forms_have_the_same_gradients():
    torch.manual_seed(0)
    q, k = (torch.randn(3, n, 6, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    gradients = [
        torch.autograd.grad(sum(x[form(q, k).seen].sum() for x in form(q, k)[:2]), (q, k))
        for form in (masked_dense, masked_moments)
    ]
    for dense, moment in zip(*gradients, strict=True):
        close(dense, moment)
        assert dense.isfinite().all()
        assert dense[1:].abs().sum() == 0
    assert gradients[0][0][0, 1].abs().sum() == 0


def test_moment_statistics_do_not_cancel():
    """A mean far larger than the spread: float32 keeps the spread to five digits."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 64, 8, dtype=torch.float64) + 300, torch.randn(1, 64, 8, dtype=torch.float64) - 300
    exact = F.dense_score_statistics(q, k, 0.1)
    single = moments(q.float(), k.float(), 0.1)
    torch.testing.assert_close(single.std.double(), exact.std, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    half = LOGITS.to(dtype)
    for ours, expected in (
        (F.entropy(half), F.entropy(half.float())),
        (F.principal_entropy(half, 3), F.principal_entropy(half.float(), 3)),
        (F.marginal_balance(half), F.marginal_balance(half.float())),
        (
            F.dense_score_statistics(half[None], half[None], 0.1).std,
            F.dense_score_statistics(half[None].float(), half[None].float(), 0.1).std,
        ),
        (moments(half[None], half[None], 0.1).std, moments(half[None].float(), half[None].float(), 0.1).std),
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


def test_read_balance_of_the_authors():
    record = np.load(Path(__file__).parent / "golden" / "read.npz")
    for step, (_, balance) in enumerate(record["losses"]):
        close(F.read_balance(torch.from_numpy(record[f"before_{step}"])), balance, 1e-12)
