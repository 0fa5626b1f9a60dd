"""Thresholds that turn logits into verdicts: one per finding, chosen by a rule on validation rows. Arrays in, arrays out.

A film is positive for a finding if its logit is at or above the threshold. Nothing here reads a file, and nothing asks
which rows are validation rows: that is the caller's promise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, get_args

import msgspec
import numpy as np

from cxrfast import metrics
from cxrfast.errors import RunError

Kind = Literal["youden", "sensitivity", "specificity"]

RULES = "youden, sensitivity=VALUE or specificity=VALUE"

MARGIN = 0.01
"""Log-odds between a threshold that all validation rows are above (or below) and the nearest of them."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a threshold is chosen from validation rows.

    youden: the largest J = sensitivity + specificity - 1 (Youden 1950, Cancer 3:32-35).
    sensitivity: the highest threshold whose sensitivity is at least `value`: of those, it has the highest specificity.
    specificity: the lowest threshold whose specificity is at least `value`: of those, it has the highest sensitivity.

    Raises RunError unless `value` is above 0 and at most 1, or None for youden.
    """

    kind: Kind = "youden"
    value: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise RunError(f"{self.kind!r} is not a rule for thresholds: use {RULES}")
        if self.kind == "youden" and self.value is not None:
            raise RunError("the rule youden takes no value")
        if self.kind != "youden" and not (self.value is not None and 0 < self.value <= 1):
            raise RunError(
                f"the rule {self.kind} needs a value above 0 and at most 1, such as {self.kind}=0.9, not {self.value}"
            )

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """The rule of `youden`, `sensitivity=0.9` or `specificity=0.95`. Raises RunError for other text."""
        kind, equals, value = text.partition("=")
        if kind not in get_args(Kind):
            raise RunError(f"{text!r} is not a rule for thresholds: use {RULES}")
        try:
            return cls(kind=kind, value=float(value) if equals else None)  # type: ignore[arg-type]
        except ValueError as error:
            raise RunError(f"{text!r} is not a rule for thresholds: {value!r} is not a number") from error

    def __str__(self) -> str:
        """Text that `parse` reads."""
        return self.kind if self.value is None else f"{self.kind}={self.value!r}"


YOUDEN = Rule(kind="youden")
"""The rule unless another is asked for."""

Count = Annotated[int, msgspec.Meta(ge=0)]
Ratio = Annotated[float, msgspec.Meta(ge=0, le=1)]


class ThresholdsJson(TypedDict):
    """`Thresholds` as JSON; see there."""

    rule: str
    logits: list[float | None]
    positives: list[Count]
    negatives: list[Count]
    sensitivity: list[Ratio | None]
    specificity: list[Ratio | None]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """A threshold for each finding, (L,), and what it does on the validation rows that it was chosen on."""

    rule: Rule
    logits: tuple[float | None, ...]
    """Log-odds at or above which a film is positive; float32 values. None: the finding gets no verdict."""
    positives: tuple[int, ...]
    """Validation rows that hold the finding, masked ones not counted."""
    negatives: tuple[int, ...]
    sensitivity: tuple[float | None, ...]
    """On the validation rows; None where there is no threshold."""
    specificity: tuple[float | None, ...]

    def __post_init__(self) -> None:
        lengths = {len(each) for each in (self.positives, self.negatives, self.sensitivity, self.specificity)}
        if lengths != {len(self.logits)}:
            raise ValueError("its lists differ in length")
        if not all(threshold is None or math.isfinite(threshold) for threshold in self.logits):
            raise ValueError("a threshold is not finite")

    def json(self) -> ThresholdsJson:
        return {
            "rule": str(self.rule),
            "logits": list(self.logits),
            "positives": list(self.positives),
            "negatives": list(self.negatives),
            "sensitivity": list(self.sensitivity),
            "specificity": list(self.specificity),
        }

    @classmethod
    def from_json(cls, value: Any) -> "Thresholds":
        """What `json` returned, checked, since it may come from elsewhere. Raises ValueError or RunError."""
        known = msgspec.convert(value, ThresholdsJson)
        lists = {name: tuple(known[name]) for name in ThresholdsJson.__annotations__ if name != "rule"}  # type: ignore[literal-required]
        return cls(rule=Rule.parse(known["rule"]), **lists)

    @property
    def array(self) -> np.ndarray:
        """`logits` as float64 (L,), NaN where there is no verdict."""
        return np.array(self.logits, np.float64)  # of None it makes NaN

    @property
    def probabilities(self) -> np.ndarray:
        """`logits` as probabilities, float64 (L,), NaN where there is no verdict."""
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            return metrics.sigmoid(self.array)

    def verdicts(self, logits: np.ndarray) -> np.ndarray:
        """Verdicts float32 (N, L) on logits or log-odds (N, L): 1 positive, 0 negative, NaN none.

        None: the finding has no threshold, or the logit is NaN.
        """
        unknown = np.isnan(self.array) | np.isnan(logits)
        return np.where(unknown, np.nan, metrics.is_positive(logits, self.array)).astype(np.float32)


WORDS = {1.0: "positive", 0.0: "negative"}


def in_words(verdicts: np.ndarray) -> np.ndarray:
    """Verdicts as text, an object array of their shape: `positive`, `negative`, or empty for none."""
    return np.vectorize(lambda verdict: WORDS.get(verdict, ""), otypes=[object])(verdicts)


def choose(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray | None, rule: Rule = YOUDEN) -> Thresholds:
    """The threshold of each finding by `rule`, on validation rows.

    It lies halfway between the lowest logit that it calls positive and the highest one that it calls negative, so that the
    rounding of another device changes no verdict on these rows. Equal logits are never told apart. Of several thresholds
    with the same J, the highest is taken, as scikit-learn's `roc_curve` with `argmax` does. Logits are compared in float32.

    A finding gets none (None) if its rows lack positives or negatives, or if by `youden` no threshold has J > 0.
    `sensitivity` and `specificity` always find one: at worst it calls all rows positive, or none.

    logits: (N, L), log-odds or logits. targets: (N, L) in {0, 1}. mask: bool (N, L), True where an entry counts; None: all
    do. Raises RunError if a logit that counts is NaN.
    """
    logits, positive = np.asarray(logits), np.asarray(targets) > 0.5
    mask = np.ones(positive.shape, bool) if mask is None else mask
    if np.isnan(logits[mask]).any():
        raise RunError("a logit is NaN: no threshold can be chosen")
    cuts = [_choose(metrics.compared(s[m]), p[m], rule) for s, p, m in zip(logits.T, positive.T, mask.T, strict=True)]
    positives, negatives = metrics.counts(positive, mask)
    return Thresholds(
        rule=rule,
        logits=tuple(cut[0] if cut else None for cut in cuts),
        positives=tuple(positives.tolist()),
        negatives=tuple(negatives.tolist()),
        sensitivity=tuple(cut[1] if cut else None for cut in cuts),
        specificity=tuple(cut[2] if cut else None for cut in cuts),
    )


def _choose(scores: np.ndarray, positive: np.ndarray, rule: Rule) -> tuple[float, float, float] | None:
    """Threshold, sensitivity and specificity of one finding; scores float32 (n,), finite."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return None
    values, at = np.unique(scores, return_inverse=True)
    held = np.bincount(at[positive], minlength=len(values)), np.bincount(at[~positive], minlength=len(values))
    # cut i calls the rows of values[i:] positive; the last cut calls none
    missed, true_negatives = (np.concatenate([[0], np.cumsum(n)]) for n in held)
    sensitivity, specificity = (positives - missed) / positives, true_negatives / negatives
    wanted = rule.value or 0.0  # youden has none
    match rule.kind:
        case "youden":
            index = (positives - missed) * negatives + (true_negatives - negatives) * positives  # J · P · N, exact
            if index.max() <= 0:
                return None
            cut = np.flatnonzero(index == index.max())[-1]
        case "sensitivity":
            cut = np.flatnonzero(sensitivity >= wanted)[-1]
        case "specificity":
            cut = np.flatnonzero(specificity >= wanted)[0]
    return _between(values, int(cut)), float(sensitivity[cut]), float(specificity[cut])


def _between(values: np.ndarray, cut: int) -> float:
    """A float32 number above values[cut - 1] and at most values[cut]; halfway, if float32 has such a number."""
    if cut == 0:
        return float(np.float32(values[0] - np.float32(MARGIN)))
    below = values[cut - 1]
    above = values[cut] if cut < len(values) else below + np.float32(2 * MARGIN)
    halfway = np.float32((np.float64(below) + np.float64(above)) / 2)
    return float(halfway if halfway > below else np.nextafter(below, np.float32(np.inf)))


def mean_over_folds(folds: Sequence[Thresholds]) -> Thresholds:
    """Thresholds for the mean of several folds' predictions: the mean of theirs as log-odds, over the folds that have one.

    Counts are sums; sensitivity and specificity are means, those of the single folds. Raises RunError if the rules differ.
    """
    if len(rules := {str(each.rule) for each in folds}) > 1:
        raise RunError(f"thresholds were chosen by different rules ({', '.join(sorted(rules))}): choose them by one")

    def mean(lists: Sequence[tuple[float | None, ...]]) -> tuple[float | None, ...]:
        known = [[value for value in values if value is not None] for values in zip(*lists, strict=True)]
        return tuple(math.fsum(values) / len(values) if values else None for values in known)

    return Thresholds(
        rule=folds[0].rule,
        logits=mean([each.logits for each in folds]),
        positives=tuple(map(sum, zip(*(each.positives for each in folds), strict=True))),
        negatives=tuple(map(sum, zip(*(each.negatives for each in folds), strict=True))),
        sensitivity=mean([each.sensitivity for each in folds]),
        specificity=mean([each.specificity for each in folds]),
    )
