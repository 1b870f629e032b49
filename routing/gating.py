"""Fitting the gater: the best path of every router sequence, under a capacity, learnt from z (DiPaCo Sec 2.4.2, 7.2.1).

Deterministic (nothing is drawn), float64, one thread, rows sorted by id: the same sample gives the same bits.

Legend: N router sequences, D features, E transformed features, P paths.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64, UInt64

from configs.stages import GaterConfig
from routing.balance import matched_shift
from routing.gater import Gater
from routing.kmeans import CannotFit, capped_choices
from routing.transform import fit_transform, row_products

MAX_ITERATIONS = 1000
TOLERANCE = 1e-5
# The logit of a path that is no label. Those of the others sum to about zero in every row, so that the largest is not
# below it and such a path's posterior never above exp(-30).
ABSENT_LOGIT = -30.0


@dataclass(frozen=True, slots=True)
class FittedGater:
    """A gater and what it makes of the sequences it was fitted to. `labels` stand in the order of the sorted `ids`.

    Losses are mean nats a sequence: each under its best path, its label and its likeliest path. A path that a sequence
    was not scored under counts as the worst of those it was; `unscored_share` says how often the likeliest is such a
    one. Where the regression has not `converged`, features that are standardised or more regularization help.
    """

    gater: Gater
    ids: UInt64[np.ndarray, " N"]
    labels: Int64[np.ndarray, " N"]
    best_shares: Float64[np.ndarray, " P"]
    label_shares: Float64[np.ndarray, " P"]
    gater_shares: Float64[np.ndarray, " P"]
    agreement_with_labels: float
    agreement_with_best: float
    best_loss: float
    label_loss: float
    gater_loss: float
    unscored_share: float
    converged: bool


def fit_gater(
    ids: UInt64[np.ndarray, " N"],
    z: npt.NDArray[Any],
    losses: Float64[np.ndarray, "N P"],
    config: GaterConfig,
    prefix_tokens: int,
) -> FittedGater:
    """The gater of `losses`: summed nats of each sequence under each path, +inf where it was not scored.

    Minimises `sum_n cross entropy(label_n, softmax(x_n @ weights + bias)) + regularization / 2 * sum weights ** 2` over
    the weights (E, P) of transformed features x; the bias is free. Doubling the sample halves the penalty's part. With
    a `temperature` T the label of a row is the distribution softmax(-losses / T) instead of one path. Then, with
    `match_labels`, the bias is shifted until argmax hands out the shares of the labels as nearly as it can. A path that
    is no label gets no weights and a logit so low that no sequence is routed to it. Raises CannotFit.
    """
    import sklearn.linear_model  # noqa: F401  the limit reaches only thread pools that are loaded
    from threadpoolctl import threadpool_limits

    order = np.argsort(ids, kind="stable")
    rows, losses = np.asarray(z, np.float64)[order], losses[order]
    _check(rows, losses)
    labels = best_paths(losses, config.capacity)
    with threadpool_limits(limits=1):
        gater, converged = _fit(rows, labels, losses, config, prefix_tokens)
    return _described(gater, converged, ids[order], rows, labels, losses)


def best_paths(losses: Float64[np.ndarray, "N P"], capacity: float | None) -> Int64[np.ndarray, " N"]:
    """The path of lowest loss of every row (ties: the lower index), none for more than `capacity` fair shares.

    Rows that lose most by their second best come first; with a capacity no path is left without a row. A row whose
    scored paths are all full goes to the emptiest.
    """
    if capacity is None:
        best: npt.NDArray[np.int64] = losses.argmin(axis=1)
        return best
    choices = np.argsort(losses, axis=1, kind="stable")
    ranked = np.take_along_axis(losses, choices, axis=1)
    return capped_choices(choices, ranked - ranked[:, :1], losses.shape[1], capacity)


def _check(rows: Float64[np.ndarray, "N D"], losses: Float64[np.ndarray, "N P"]) -> None:
    num_paths = losses.shape[1]
    if len(rows) < 2 * num_paths:
        raise CannotFit(
            f"{len(rows)} router sequences are too few for {num_paths} paths (at least {2 * num_paths}); raise "
            "corpus.splits.router or the stage's max_sequences, give more documents, or use fewer paths"
        )
    if not np.isfinite(rows).all():
        raise CannotFit("features hold values that are not finite; the base has diverged: lower inner.learning_rate")
    if np.isnan(losses).any() or np.isneginf(losses).any():
        raise CannotFit("losses of router sequences hold NaN; a path has diverged: lower inner.learning_rate")
    lost = int((~np.isfinite(losses)).all(axis=1).sum())
    if lost:
        raise CannotFit(f"{lost} of {len(losses)} router sequences have no finite loss under any path")


def _fit(
    rows: Float64[np.ndarray, "N D"],
    labels: Int64[np.ndarray, " N"],
    losses: Float64[np.ndarray, "N P"],
    config: GaterConfig,
    prefix_tokens: int,
) -> tuple[Gater, bool]:
    num_paths = losses.shape[1]
    mean, matrix = fit_transform(rows, config.transform)
    if not matrix.shape[1]:
        raise CannotFit("all router sequences have the same features; give more documents")
    targets = _targets(labels, losses, config.temperature)
    present = targets.any(axis=0)
    weights, bias, converged = np.zeros((matrix.shape[1], num_paths)), np.full(num_paths, ABSENT_LOGIT), True
    weights[:, present], bias[present], converged = _regression(
        row_products(rows - mean, matrix), targets[:, present], config.regularization, config.temperature is not None
    )
    gater = Gater(mean, matrix, weights, bias, prefix_tokens)
    if config.match_labels:
        shift = matched_shift(gater.logits(rows)[:, present], np.bincount(labels, minlength=num_paths)[present])
        bias = bias.copy()
        bias[present] += shift - shift.mean()
        gater = replace(gater, bias=bias)
    return gater, converged


def _targets(
    labels: Int64[np.ndarray, " N"], losses: Float64[np.ndarray, "N P"], temperature: float | None
) -> Float64[np.ndarray, "N P"]:
    """What every row is to be: its label wholly, or its paths in shares."""
    targets: npt.NDArray[np.float64] = np.eye(losses.shape[1])[labels]
    if temperature is not None:
        targets = np.exp((losses.min(axis=1, keepdims=True) - losses) / temperature)
        targets /= targets.sum(axis=1, keepdims=True)
    return targets


def _regression(
    x: Float64[np.ndarray, "N E"], targets: Float64[np.ndarray, "N K"], regularization: float, soft: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], bool]:
    """Weights (E, K) and bias (K) of the K paths that are targets, and whether they converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    count = targets.shape[1]
    if count == 1:
        return np.zeros((x.shape[1], 1)), np.zeros(1), True
    if soft:
        return _soft_regression(x, targets, regularization)
    # Of two classes sklearn fits the difference d of the weights, which are then -d / 2 and d / 2: the sum of their
    # squares is d ** 2 / 2, so that the same penalty is half as large for d.
    scale = 2.0 if count == 2 else 1.0
    model = LogisticRegression(C=scale / regularization, solver="lbfgs", tol=TOLERANCE, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, targets.argmax(axis=1))
    weights, bias = model.coef_, model.intercept_
    if count == 2:
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return weights.T, bias, bool(model.n_iter_.max() < MAX_ITERATIONS)


def _soft_regression(
    x: Float64[np.ndarray, "N E"], targets: Float64[np.ndarray, "N K"], regularization: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], bool]:
    """The same for distributions; sklearn would take them only as N times K weighted rows."""
    from scipy.optimize import minimize

    shape = (x.shape[1] + 1, targets.shape[1])  # the bias is the last row
    penalty = np.full(shape, regularization / len(x))
    penalty[-1] = 0.0

    def mean_loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        both = flat.reshape(shape)
        logits = x @ both[:-1] + both[-1]
        logits -= logits.max(axis=1, keepdims=True)
        totals = np.exp(logits).sum(axis=1, keepdims=True)
        loss = (np.log(totals).sum() - (targets * logits).sum()) / len(x) + 0.5 * (penalty * both**2).sum()
        residual = (np.exp(logits) / totals - targets) / len(x)
        slope = penalty * both + np.concatenate([x.T @ residual, residual.sum(axis=0, keepdims=True)])
        return float(loss), slope.ravel()

    options = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "gtol": TOLERANCE, "ftol": 0.0}
    found = minimize(mean_loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options)
    both = found.x.reshape(shape)
    return both[:-1], both[-1], bool(found.nit < MAX_ITERATIONS)


def _described(
    gater: Gater,
    converged: bool,
    ids: UInt64[np.ndarray, " N"],
    rows: Float64[np.ndarray, "N D"],
    labels: Int64[np.ndarray, " N"],
    losses: Float64[np.ndarray, "N P"],
) -> FittedGater:
    """The gater beside the numbers that say how good it is."""
    best, likeliest = losses.argmin(axis=1), gater.paths(rows)
    scored = np.isfinite(losses)
    filled = np.where(scored, losses, np.where(scored, losses, -np.inf).max(axis=1, keepdims=True))

    def shares(paths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return np.bincount(paths, minlength=losses.shape[1]) / len(paths)

    def mean_of(table: npt.NDArray[Any], paths: npt.NDArray[np.int64]) -> float:
        return float(np.take_along_axis(table, paths[:, None], axis=1).mean())

    return FittedGater(
        gater,
        ids,
        labels,
        best_shares=shares(best),
        label_shares=shares(labels),
        gater_shares=shares(likeliest),
        agreement_with_labels=float((likeliest == labels).mean()),
        agreement_with_best=float((likeliest == best).mean()),
        best_loss=mean_of(filled, best),
        label_loss=mean_of(filled, labels),
        gater_loss=mean_of(filled, likeliest),
        unscored_share=1.0 - mean_of(scored, likeliest),
        converged=converged,
    )
