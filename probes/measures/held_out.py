"""Predictors of experts, learned from some texts and judged on others, so that what they memorise counts for nothing.

The texts are dealt out to folds. A token of fold g is predicted from all texts but those of g; how much a predictor is
smoothed is chosen for it on the other folds, each of them predicted from what is then left.

T tokens, K experts per token, E experts, G folds, N different keys, R features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

FOLDS = 5
LEAST_TEXTS = 3  # one to judge on, one to choose on, one to learn from
PSEUDO_TOKENS = (0.1, 1.0, 4.0, 16.0, 64.0)  # with which a key falls back on the predictor below it
POWERS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of a factor in a product of predictors
PENALTIES = (1e-5, 1e-3, 1e-1)  # of a ridge, over the features' mean square
SHARPNESS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of scores over their standard deviation


class Split(NamedTuple):
    """Which text is learned from when.

    Args:
        fold: (T,) of each token.
        folds: G.
        learned: (T,) bool, tokens that may be learned from.
    """

    fold: np.ndarray
    folds: int
    learned: np.ndarray


def split_of(domain: np.ndarray, sequence: np.ndarray) -> Split | None:
    """The texts of these domains (B,), of which tokens (T,) are, dealt out domain after domain; None of too few."""
    present = np.unique(sequence)
    if len(present) < LEAST_TEXTS:
        return None
    count = min(FOLDS, len(present))
    of_text = np.zeros(len(domain), np.int64)
    of_text[present[np.argsort(domain[present], kind="stable")]] = np.arange(len(present)) % count
    return Split(of_text[sequence], count, np.ones(len(sequence), dtype=bool))


class Choices:
    """Experts that tokens went to.

    Args:
        chosen: (T, K), -1 where a token has no further one.
        experts: E.
    """

    def __init__(self, chosen: np.ndarray, experts: int) -> None:
        self.chosen, self.experts = chosen, experts
        self._there = chosen >= 0
        self._all = bool(self._there.all())
        self._flat = np.where(self._there, chosen, 0) + np.arange(len(chosen))[:, None] * experts
        self.number = self._there.sum(axis=1)  # (T,) experts of each token
        self.share = np.zeros((len(chosen), experts), np.float32)  # (T, E), 1 over their number for each of them
        weight = 1 / np.maximum(self.number, 1)
        self.share.ravel()[self._flat[self._there]] = np.broadcast_to(weight[:, None], chosen.shape)[self._there]

    def taken(self, order: np.ndarray) -> Choices:
        """Those of other tokens."""
        return Choices(self.chosen[order], self.experts)

    def of_chosen(self, values: np.ndarray) -> np.ndarray:
        """Of values (T, E) of all experts those of the chosen ones (T, K)."""
        return values.take(self._flat)

    def mean_loss(self, logs: np.ndarray) -> np.ndarray:
        """(T,) mean over a token's experts of less their log probabilities (T, K)."""
        if not self._all:
            logs = np.where(self._there, logs, 0.0)
        return -logs.sum(axis=1, dtype=np.float64) / np.maximum(self.number, 1)

    def loss(self, logs: np.ndarray) -> np.ndarray:
        """(T,) the same, of log probabilities of all experts (T, E)."""
        return self.mean_loss(self.of_chosen(logs))

    def recall(self, logs: np.ndarray) -> np.ndarray:
        """(T,) share of a token's experts among as many that have the largest probabilities."""
        place = np.empty(logs.shape, np.int64)
        np.put_along_axis(place, np.argsort(-logs, axis=1, kind="stable"), np.arange(logs.shape[1])[None], axis=1)
        found = (self.of_chosen(place) < self.number[:, None]) & self._there
        return found.sum(axis=1) / np.maximum(self.number, 1)


class Keys:
    """How often tokens with a key went to each expert, by fold.

    A key that is in one fold alone tells the others nothing, and takes no memory.

    Args:
        key: (T,) of each token, -1 for none.
        split: Which text is learned from when.
        choices: Where tokens went.
    """

    def __init__(self, key: np.ndarray, split: Split, choices: Choices) -> None:
        every, number = np.unique(key, return_inverse=True)
        in_fold = np.zeros((len(every), split.folds), dtype=bool)
        in_fold[number[split.learned], split.fold[split.learned]] = True
        shared = (in_fold.sum(axis=1) > 1) & (every >= 0)
        self._row = np.where(shared, shared.cumsum() - 1, shared.sum())[number]  # (T,), the last row of all others
        self._split = split
        self._count = np.zeros((int(shared.sum()) + 1, split.folds, choices.share.shape[1]), np.float32)
        used = split.learned & shared[number]
        np.add.at(self._count, (self._row[used], split.fold[used]), choices.share[used])
        self._total = self._count.sum(axis=1)
        self.seen = in_fold.sum(axis=1)[number] - in_fold[number, split.fold] > 0  # (T,) in another fold
        self.seen &= key >= 0

    def without(self, fold: int) -> np.ndarray:
        """(T, E) counts of each token's key, in all folds but this one and the token's own."""
        found = self._total[self._row] - self._count[self._row, fold]
        others = np.flatnonzero(self._split.fold != fold)
        found[others] -= self._count[self._row[others], self._split.fold[others]]
        return np.maximum(found, 0.0)


class Features:
    """Ridge regressions of choices, and of what else is given of tokens, on features; sums by fold.

    Args:
        features: (T, R).
        split: Which text is learned from when.
        *targets: (T, ·) each, what is regressed.
    """

    def __init__(self, features: np.ndarray, split: Split, *targets: np.ndarray) -> None:
        self._x = np.concatenate([features.astype(np.float64), np.ones((len(features), 1))], axis=1)
        self._targets = [target.astype(np.float64) for target in targets]
        y = np.concatenate(self._targets, axis=1)
        self._split = split
        rows = [np.flatnonzero((split.fold == fold) & split.learned) for fold in range(split.folds)]
        self._gram = np.stack([self._x[some].T @ self._x[some] for some in rows])  # (G, R + 1, R + 1)
        self._answer = np.stack([self._x[some].T @ y[some] for some in rows])  # (G, R + 1, ·)

    def without(self, fold: int) -> list[np.ndarray]:
        """(T, ·) what is predicted for each target, of each token from all folds but this one and the token's own.

        Of each target by the penalty that errs least on the other folds.
        """
        apart, found = self._split.fold != fold, []
        every = [self._predicted(fold, penalty) for penalty in PENALTIES]
        for target, *options in zip(self._targets, *every, strict=True):
            found.append(min(options, key=lambda of, target=target: float(np.square(of - target)[apart].sum())))  # type: ignore[misc]
        return found

    def _predicted(self, fold: int, penalty: float) -> list[np.ndarray]:
        found = np.zeros((len(self._x), self._answer.shape[2]))
        for other in range(self._split.folds):
            left = [one for one in range(self._split.folds) if one not in (fold, other)]
            gram, answer = self._gram[left].sum(axis=0), self._answer[left].sum(axis=0)
            size = np.trace(gram[:-1, :-1]) / max(1, len(gram) - 1)
            ridge = np.full(len(gram), penalty * size + 1e-9)
            ridge[-1] = 1e-9  # the mean is free
            rows = np.flatnonzero(self._split.fold == other)
            found[rows] = self._x[rows] @ np.linalg.solve(gram + np.diag(ridge), answer)
        return np.split(found, np.cumsum([target.shape[1] for target in self._targets])[:-1], axis=1)


class Column:
    """All predictors of one fold's tokens: learned, and smoothed, without any of them.

    Each gives log probabilities (T, E); of the tokens of other folds they are what the smoothing is chosen on.

    Args:
        fold: The fold.
        split: Which text is learned from when.
        choices: Where tokens went.
    """

    def __init__(self, fold: int, split: Split, choices: Choices) -> None:
        self._fold, self._choices = fold, choices
        self._apart = split.fold != fold
        used, experts = split.learned, choices.share.shape[1]
        by_fold = np.zeros((split.folds, experts))
        np.add.at(by_fold, split.fold[used], choices.share[used])
        left = by_fold.sum(axis=0) - by_fold[fold] - np.where(np.arange(split.folds)[:, None] == fold, 0.0, by_fold)
        left = np.maximum(left, 0.0) + 1 / experts
        self.marginal = np.log(left / left.sum(axis=1, keepdims=True)).astype(np.float32)[split.fold]

    def by_key(self, keys: Keys, below: np.ndarray) -> np.ndarray:
        """By counts of a key, which fall back on a predictor below."""
        count, base = keys.without(self._fold), np.exp(below)
        size = count.sum(axis=1, keepdims=True)
        seen, else_ = self._choices.of_chosen(count), self._choices.of_chosen(base)  # (T, K), all that a loss looks at

        def missed(pseudo: float) -> float:
            logs = np.log((seen + pseudo * else_) / (size + pseudo))
            return float(self._choices.mean_loss(logs)[self._apart].sum())

        pseudo = min(PSEUDO_TOKENS, key=missed)
        return np.log((count + pseudo * base) / (size + pseudo))

    def times(self, below: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """A predictor times another factor, in logarithms, to some power."""
        return self._best(normalised(below + power * factor) for power in POWERS)

    def by_set(self, before: Choices, split: Split, choices: Choices) -> np.ndarray:
        """By the set of experts of another layer: the product over its experts, to some power."""
        chosen = (before.share > 0).astype(np.float32)
        rows = [np.flatnonzero((split.fold == fold) & split.learned) for fold in range(split.folds)]
        count = np.stack([chosen[some].T @ choices.share[some] for some in rows])  # (G, E', E)
        factor = np.zeros_like(choices.share)
        for other in range(split.folds):
            left = [one for one in range(split.folds) if one not in (self._fold, other)]
            here = np.flatnonzero(split.fold == other)
            if len(here):
                base = np.exp(self.marginal[here[0]])
                total = count[left].sum(axis=0) + base
                told = np.log(total / total.sum(axis=1, keepdims=True)) - self.marginal[here[0]]
                factor[here] = chosen[here] @ told.astype(np.float32)
        return self.times(self.marginal, factor)

    def by_features(self, features: Features) -> np.ndarray:
        """By ridge regressions of who is chosen and of the router's logits, the scores of which are made sharp.

        Either with a softmax, or as far as they are above what lies between the last score that is chosen and the next.
        """
        return self._best(self._sharpened([scores.astype(np.float32) for scores in features.without(self._fold)]))

    def _sharpened(self, every: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        yield self.marginal
        chosen = max(1, round(float(self._choices.number.mean())))
        for scores in every:
            scores = scores / max(float(scores.std()), 1e-9)
            if chosen < scores.shape[1]:
                ordered = np.partition(scores, (-chosen - 1, -chosen), axis=1)
                above = scores - ordered[:, [-chosen, -chosen - 1]].mean(axis=1, keepdims=True)
                yield from (normalised(-np.logaddexp(0, -sharp * above)) for sharp in SHARPNESS)
            yield from (normalised(self.marginal + sharp * scores) for sharp in SHARPNESS)

    def _best(self, candidates: Iterable[np.ndarray]) -> np.ndarray:
        """The one that fits the other folds best."""
        return min(candidates, key=lambda logs: float(self._choices.loss(logs)[self._apart].sum()))


def normalised(logs: np.ndarray) -> np.ndarray:
    """Log probabilities (T, E) of logs up to a constant."""
    logs = logs - logs.max(axis=1, keepdims=True)
    return logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))


def half_of(split: Split, position: np.ndarray, sequence: np.ndarray) -> Split:
    """The same, but learned from the first half of each text alone."""
    length = np.bincount(sequence)[sequence]
    return split._replace(learned=split.learned & (2 * position < length))


def in_sample(key: np.ndarray, choices: Choices) -> np.ndarray:
    """(T,) losses by counts of a key that were made of these very tokens: what memory alone does."""
    number = np.unique(key, return_inverse=True)[1]
    count = np.zeros((number.max() + 1, choices.share.shape[1]), np.float32)
    np.add.at(count, number, choices.share)
    base = np.maximum(choices.share.mean(axis=0), 1e-9)
    logs = np.log((count + base) / (count.sum(axis=1, keepdims=True) + 1))
    return choices.loss(logs[number])


def pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A key (T,) of each pair of keys, both from 0 on; -1 where one is none."""
    joined = first.astype(np.int64) * (int(second.max(initial=0)) + 1) + second
    return np.where((first >= 0) & (second >= 0), joined, -1)


def accuracy(features: np.ndarray, label: np.ndarray, split: Split, labels: int) -> np.ndarray:
    """(T,) whether a ridge read-out names a token's label, of labels (T,) from 0 on; learned from other texts."""
    sums = Features(features, split, Choices(label[:, None], labels).share)
    found = np.zeros(len(label), dtype=bool)
    for fold in range(split.folds):
        mine = split.fold == fold
        found[mine] = sums.without(fold)[0][mine].argmax(axis=1) == label[mine]
    return found


def most_common(label: np.ndarray, split: Split) -> np.ndarray:
    """(T,) whether a token's label is the most common one of the other folds."""
    found = np.zeros(len(label), dtype=bool)
    for fold in range(split.folds):
        mine = split.fold == fold
        found[mine] = label[mine] == np.bincount(label[~mine]).argmax()
    return found
