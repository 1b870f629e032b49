"""The numbers of a cloze: the share of items whose true ending is found, and its standard error. Pure numpy.

An ending is found by likelihood, or by gain: how much likelier the context makes it than it is behind BOS alone (the
pointwise mutual information of Holtzman et al. 2021, 2104.08315), as some texts are likely whatever stands before.

Legend: n items, K paths of a route, P paths.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64, UInt64

from dipaco.cloze_items import ClozeItems
from dipaco.cloze_routes import Chosen

# What a cloze says of every model and route; without `gain_` by likelihood.
KEYS = ("accuracy", "standard_error", "gain_accuracy", "gain_standard_error")
Numbers = dict[str, float]


def likelihoods(losses: Float64[np.ndarray, "n 4 P"], chosen: Chosen) -> Float64[np.ndarray, "n 4"]:
    """Log-likelihood of every ending under the mixture of the chosen paths, from their losses (nats)."""
    of_paths = np.take_along_axis(losses, chosen.paths[:, None, :], axis=2)  # (n, 4, K)
    mixed: np.ndarray = np.logaddexp.reduce(chosen.log_weights[:, None, :] - of_paths, axis=2)
    return mixed


def credits(likelihood: Float64[np.ndarray, "n 4"]) -> Float64[np.ndarray, " n"]:
    """1 where the first ending is the likeliest, a share of 1 where it ties with others, else 0: guessing earns 1/4."""
    best = likelihood == likelihood.max(axis=1, keepdims=True)
    shares: np.ndarray = best[:, 0] / best.sum(axis=1)
    return shares


def standard_error(credit: Float64[np.ndarray, " n"], documents: UInt64[np.ndarray, " n"]) -> float:
    """Of the mean credit, where items of one document go alike: errors are summed by document before they are squared.

    The cluster-robust estimate of a mean (Liang and Zeger 1986), D / (D - 1) for D documents; nan of one document.
    """
    _, document = np.unique(documents, return_inverse=True)
    sums = np.bincount(document, credit - credit.mean())
    count = len(sums)
    if count < 2:
        return math.nan
    return math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(credit)


def scores(
    items: ClozeItems, likelihood: Float64[np.ndarray, "n 4"], alone: Float64[np.ndarray, "n 4"]
) -> tuple[Numbers, dict[str, Numbers]]:
    """KEYS of one model and route, overall and by domain, from log-likelihoods behind the context and behind BOS."""
    by_likelihood, by_gain = credits(likelihood), credits(likelihood - alone)
    by_domain = {
        name: _numbers(by_likelihood[mine], by_gain[mine], items.documents[mine])
        for index, name in enumerate(items.domain_names)
        if (mine := items.domains == index).any()
    }
    return _numbers(by_likelihood, by_gain, items.documents), by_domain


def _numbers(
    by_likelihood: Float64[np.ndarray, " n"], by_gain: Float64[np.ndarray, " n"], documents: UInt64[np.ndarray, " n"]
) -> Numbers:
    values = (
        float(by_likelihood.mean()),
        standard_error(by_likelihood, documents),
        float(by_gain.mean()),
        standard_error(by_gain, documents),
    )
    return dict(zip(KEYS, values, strict=True))
