"""Mixtures of the scales' probabilities, weighted by finding: the weights' fit, and what a mixture costs.

Arrays in, arrays out; S scales, N rows, L findings. Touches no files.
"""

from collections.abc import Iterator

import numpy as np

from cxrfast import metrics

EPOCHS, LEARNING_RATE, DECAY = 100, 0.1, 0.96
"""Schedule of the fit. The study gives epochs, rate and "exponential decay"; how fast it decays is our reading."""

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Decay rates and ε of Adam, as in torch and in Kingma and Ba 2015, algorithm 1."""

BLOCK = 4096
"""Rows whose log-odds are computed at a time, to save memory."""

GAP, STEPS = 1e-6, 5000
"""EM stops when it is provably within GAP nats of the optimum, or after STEPS pairs of steps."""


def log_odds(logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log p - log(1 - p) of the mixture p_f = Σ_s w_fs σ(l_fs), float64 (N, L), finite. p is σ of it.

    It tells rows apart where p would be rounded to 1, as above a logit of 37; not those where scales contradict each other
    that strongly, whose p is a sum of weights to the last bit.

    logits: (S, N, L), one slice per scale, finite. weights: (L, S), rows summing to one.
    """
    with np.errstate(divide="ignore"):  # a weight of 0 takes its scale out: log 0 = -inf is meant
        log_weights = np.log(weights).T[:, None, :]
    starts = range(0, max(logits.shape[1], 1), BLOCK)
    return np.concatenate([_log_odds(logits[:, at : at + BLOCK].astype(np.float64), log_weights) for at in starts])


def _log_odds(logits: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """`log_odds` of float64 logits, from the logarithms of the weights (S, 1, L)."""
    below = np.log1p(np.exp(-np.abs(logits)))  # log σ(l) = min(l, 0) - this, log σ(-l) = -max(l, 0) - this
    shares = log_weights - below
    return _log_sum(shares + np.minimum(logits, 0.0)) - _log_sum(shares - np.maximum(logits, 0.0))


def _log_sum(terms: np.ndarray) -> np.ndarray:
    """log Σ_s exp(t_s) of terms (S, N, L), without underflow."""
    largest = terms.max(axis=0)
    return np.log(np.exp(terms - largest).sum(axis=0)) + largest


def vote(logits: np.ndarray) -> np.ndarray:
    """Log-odds of the plain mean of the scales' probabilities, float64 (N, L), from logits (S, N, L).

    Rows whose scales gave the same logits are tied exactly, whichever scale gave which: a sum depends on its order.
    """
    return log_odds(np.sort(logits, axis=0), uniform(logits))


def uniform(logits: np.ndarray) -> np.ndarray:
    """Equal weights (L, S) for logits (S, N, L)."""
    return np.full((logits.shape[2], logits.shape[0]), 1.0 / logits.shape[0])


def fit_weights(
    logits: np.ndarray, targets: np.ndarray, mask: np.ndarray | None = None, epochs: int = EPOCHS
) -> np.ndarray:
    """The study's stacking (Haque et al. 2023): weights float64 (L, S), rows summing to one.

    w = softmax(v) over the scales of each finding; v starts at 0, which is voting, and minimises the binary
    cross-entropy of Σ_s w_fs σ(l_fs). Published: learning rate 0.1 with exponential decay, 100 epochs. Our
    reading: Adam, full batch, rate × 0.96 per epoch. Findings do not influence each other.

    logits: (S, N, L), finite. targets: (N, L) in {0, 1}. mask: bool (N, L), True where an entry counts; None:
    all do. A finding without positives or without negatives keeps equal weights.
    """
    weights = uniform(logits)
    for j, likelihood in _likelihoods(logits, targets, mask):
        (v, mean, square), rate = np.zeros((3, len(logits))), LEARNING_RATE
        for step in range(1, epochs + 1):
            w = _softmax(v)
            gradient = w * (1.0 - _gain(likelihood, w))
            mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
            square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
            spread = np.sqrt(square / (1 - BETAS[1] ** step)) + EPSILON
            v = v - rate * mean / (1 - BETAS[0] ** step) / spread
            rate *= DECAY
        weights[j] = _softmax(v)
    return weights


def fit_weights_by_em(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The optimum of what `fit_weights` minimises, by expectation maximisation: float64 (L, S), rows summing to one.

    The likelihood of a target is a mixture Σ_s w_s L_s of those by scale: its logarithm is concave in
    w. A step multiplies w_s by g_s, the mean of L_s / Σ_t w_t L_t (Dempster et al. 1977, section 4.3). By
    concavity no weights are better by more than max_s g_s - 1: it stops when that is below 1e-6 nats.

    Arguments and undefined findings as in `fit_weights`.
    """
    weights = uniform(logits)
    for j, likelihood in _likelihoods(logits, targets, mask):
        w = weights[j]
        for _ in range(STEPS):
            gain = _gain(likelihood, w)
            if gain.max() - 1.0 < GAP:
                break
            first = w * gain
            second = first * _gain(likelihood, first)
            w = _extrapolated(w, first, second)
        weights[j] = w / w.sum()
    return weights


def _extrapolated(start: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Weights further along the way of two steps of EM, (S,), above 0, of sum one: SQUAREM, scheme S3, of Varadhan and
    Roland 2008, which takes ten steps where EM takes a thousand."""
    step, change = first - start, second - 2 * first + start
    size, curvature = float(np.linalg.norm(step)), float(np.linalg.norm(change))
    # 1: just the two steps; 1 / size crosses all weights there are, also where two steps of one size leave no curvature
    length = max(1.0, size / max(curvature, size**2, 1e-300))
    w = np.maximum(start + 2 * length * step + length**2 * change, second / 10)
    return w / w.sum()


def _gain(likelihood: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Mean over rows of L_s / Σ_t w_t L_t, (S,): minus the derivative of the mixture's cross-entropy with respect to w_s."""
    return (likelihood @ (1.0 / (w @ likelihood))) / likelihood.shape[1]


def _softmax(v: np.ndarray) -> np.ndarray:
    powers = np.exp(v - v.max())
    return powers / powers.sum()


def mixture_bce(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray | None, weights: np.ndarray) -> np.ndarray:
    """Binary cross-entropy of the mixture, nats, mean over unmasked entries, float64 (L,); NaN where none is.

    log p = logsumexp_s(log w_s + log σ(l_s)) and log(1 - p) with σ(-l_s): p is never rounded to 0 or 1.
    """
    with np.errstate(divide="ignore"):  # a weight of 0 takes its scale out: log 0 = -inf is meant
        terms = np.log(weights).T[:, None, :] + _log_likelihood(logits, targets)
    losses = -np.logaddexp.reduce(terms, axis=0)
    counted = np.ones(losses.shape, bool) if mask is None else mask
    return np.ma.masked_array(losses, ~counted).mean(axis=0).filled(np.nan)


def _log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log of the probability that each scale gives to the actual target, float64, of the shape of `logits`."""
    return metrics.log_sigmoid(np.where(np.asarray(targets) > 0.5, logits, -np.asarray(logits)))


def _likelihoods(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
    """Each finding that has positives and negatives, by number, and its rows' likelihoods, (S, n) in [0, 1].

    They are those over the best scale's, which keeps logsumexp from underflow and changes no gain.
    """
    for j in np.flatnonzero(has_both_classes(targets, mask)):
        counted = slice(None) if mask is None else mask[:, j]
        terms = _log_likelihood(logits[:, counted, j], np.asarray(targets)[counted, j])
        yield int(j), np.exp(terms - terms.max(axis=0))


def has_both_classes(targets: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """bool (L,): the finding has positives and negatives."""
    positives, negatives = metrics.counts(targets, mask)
    return (positives > 0) & (negatives > 0)
