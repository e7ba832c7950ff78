"""The definitions, naively, in float64: what every result is compared with.

A statistic is one integer for each element of x: the group whose mean and variance the element
takes part in and is normalised with. Every method is one such statistic, SwitchableNorm a mixture
of several. Nothing here knows of strides, blocks or threads.
"""

import math
from typing import NamedTuple

import numpy as np


class Statistic(NamedTuple):
    """The group of each element, and the sizes of the kept axes (groups counted in C order)."""

    ids: np.ndarray
    sizes: tuple[int, ...]
    batch_kept: bool

    @property
    def size(self):
        return math.prod(self.sizes)


def statistic(shape, axes, groups=1, axis=1):
    """Number the groups of a reduction over `axes`, with `axis` split into `groups` parts."""
    ndim = len(shape)
    reduced = {a % ndim for a in axes}
    ids, sizes = np.zeros((1,) * ndim, dtype=np.int64), []
    for a, index in enumerate(np.indices(shape, sparse=True)):
        if a in reduced and (groups == 1 or a != axis % ndim):
            continue
        if a in reduced:
            index, size = index // (shape[a] // groups), groups
        else:
            size = shape[a]
        ids = ids * size + index
        sizes.append(size)
    return Statistic(np.broadcast_to(ids, shape), tuple(sizes), 0 not in reduced)


def channel_statistic(kind, shape, groups=1, axis=1):
    """Number the groups of "bn", "in", "ln" or "gn" for the channel axis `axis`."""
    kept = {"bn": {axis % len(shape)}, "in": {0, axis % len(shape)}, "ln": {0}, "gn": {0}}[kind]
    axes = tuple(a for a in range(len(shape)) if a not in kept)
    return statistic(shape, axes, groups if kind == "gn" else 1, axis)


def moments(x, stat, mask=None):
    """Give count, mean and biased variance of each group, zeros for a group with nothing in it."""
    counted = np.broadcast_to(True if mask is None else mask, x.shape)
    ids, values = stat.ids[counted], x[counted].astype(np.float64)

    def total(v):
        return np.bincount(ids, v, minlength=stat.size)

    n = np.bincount(ids, minlength=stat.size)
    mean = total(values) / np.maximum(n, 1)
    mean += total(values - mean[ids]) / np.maximum(n, 1)  # what the first sum has rounded away
    return n, mean, total((values - mean[ids]) ** 2) / np.maximum(n, 1)


def softmax(logits):
    e = np.exp(logits - np.max(logits))
    return e / e.sum()


class Naive:
    """One forward pass: `y`, `counts`, `means`, `variances`, then `backward(dy)`.

    `running[k]`, where given, is the stored (mean, variance) of statistic k by group: evaluation.
    """

    def __init__(
        self,
        x,
        statistics,
        weight=None,
        bias=None,
        *,
        feature_axes=(),
        eps=1e-5,
        center=True,
        mask=None,
        mean_weight=None,
        var_weight=None,
        running=None,
    ):
        self.x = x = np.asarray(x, dtype=np.float64)
        self.statistics, self.running, self.center = statistics, running or {}, center
        self.counted = np.broadcast_to(True if mask is None else mask, x.shape)
        self.over_features = tuple(
            a for a in range(x.ndim) if a not in {f % x.ndim for f in feature_axes}
        )
        features = tuple(1 if a in self.over_features else s for a, s in enumerate(x.shape))
        self.feature_shape = tuple(s for a, s in enumerate(x.shape) if a not in self.over_features)
        self.has_weight, self.has_bias = weight is not None, bias is not None
        self.weight = (
            np.asarray(weight, dtype=np.float64).reshape(features) if self.has_weight else 1.0
        )
        offset = np.asarray(bias, dtype=np.float64).reshape(features) if self.has_bias else 0.0
        self.logits = mean_weight is not None
        one = np.ones(1)
        self.p = softmax(np.asarray(mean_weight, dtype=np.float64)) if self.logits else one
        self.q = softmax(np.asarray(var_weight, dtype=np.float64)) if self.logits else one

        self.counts, self.means, self.variances = [], [], []
        nothing = np.ones(x.shape, dtype=bool)  # no statistic of the element has anything in it
        for k, stat in enumerate(statistics):
            n, mean, var = moments(x, stat, mask)
            if not center:  # RMSNorm: the mean square about zero
                mean, var = np.zeros_like(mean), var + mean**2
            if k in self.running:
                mean, var = self.running[k]
                nothing[...] = False
            self.counts.append(n)
            self.means.append(mean)
            self.variances.append(var)
            nothing &= n[stat.ids] == 0
        self.mean = sum(
            p * m[s.ids] for p, m, s in zip(self.p, self.means, statistics, strict=True)
        )
        var = sum(q * v[s.ids] for q, v, s in zip(self.q, self.variances, statistics, strict=True))
        flat = nothing | (var + eps == 0)  # then y is the bias
        self.rstd = np.where(flat, 0.0, 1.0 / np.sqrt(np.where(flat, 1.0, var + eps)))
        self.x_hat = (x - self.mean) * self.rstd
        self.y = self.x_hat * self.weight + offset
        # By how much the rounding of a mean to float64 is magnified.
        self.magnified = np.maximum(1, np.abs(self.mean * self.rstd))
        size = self.over_groups(np.abs(self.x_hat * self.weight) + np.abs(offset))
        self.scale = {"y": np.minimum(size, max(1, np.abs(self.y).max(initial=0)))}

    def over_groups(self, size):
        """Give, for each element, the largest size in its group; in the smallest one of several."""
        found = np.full(self.x.shape, np.inf)
        for stat in self.statistics:
            largest = np.zeros(stat.size)
            np.maximum.at(largest, stat.ids, size)
            found = np.minimum(found, largest[stat.ids])
        return found

    def backward(self, dy):
        """Give dx and the gradient of each parameter.

        `scale` is the size of what was added up, of each group or entry.
        """
        dy = np.asarray(dy, dtype=np.float64)
        g = dy * self.weight * self.rstd
        dmean = -g if self.center else np.zeros_like(g)  # of each element's mixed mean
        dvar = -0.5 * g * (self.x - self.mean) * self.rstd**2
        dx, size = g.copy(), np.abs(g)
        terms_p, terms_q = [], []
        for k, stat in enumerate(self.statistics):
            terms_p.append(dmean * self.means[k][stat.ids])
            terms_q.append(dvar * self.variances[k][stat.ids])
            if k in self.running:
                continue

            def average(v, stat=stat, n=self.counts[k]):
                total = np.bincount(stat.ids.ravel(), v.ravel(), stat.size)
                return (total / np.maximum(n, 1))[stat.ids]

            centred = 2 * (self.x - self.means[k][stat.ids])
            by_mean, by_var = self.p[k] * dmean, self.q[k] * dvar
            dx += np.where(self.counted, average(by_mean) + average(by_var) * centred, 0.0)
            size += average(np.abs(by_mean)) + average(np.abs(by_var)) * np.abs(centred)
        gradients = {"dx": dx}
        self.scale["dx"] = self.over_groups(size)
        if self.has_weight:
            factor = np.abs(dy) * self.rstd
            # A mean is rounded as is what was added up for it, however small itself.
            summed = sum(
                np.abs(p * mean)[stat.ids] if k in self.running or not self.center
                else p * moments(np.abs(self.x), stat, self.counted)[1][stat.ids]
                for k, (p, mean, stat) in enumerate(
                    zip(self.p, self.means, self.statistics, strict=True)
                )
            )  # fmt: skip
            self._feature_sum(
                gradients, "weight", dy * self.x_hat, factor * (np.abs(self.x) + summed)
            )
            most = self._root(factor * (np.abs(self.x) + np.abs(self.mean))).max(initial=0)
            self.scale["weight"] = np.minimum(self.scale["weight"], most)
        if self.has_bias:
            self._feature_sum(gradients, "bias", dy, dy)
        if self.logits:
            self._logit_sum(gradients, "mean_weight", self.p, terms_p)
            self._logit_sum(gradients, "var_weight", self.q, terms_q)
        return gradients

    def _feature_sum(self, gradients, name, terms, added):
        gradients[name] = terms.sum(self.over_features).reshape(self.feature_shape)
        self.scale[name] = self._root(added).reshape(self.feature_shape)

    def _root(self, added):
        return np.sqrt((added**2).sum(self.over_features))

    def _logit_sum(self, gradients, name, p, terms):
        d = np.array([t.sum() for t in terms])
        gradients[name] = p * (d - p @ d)
        sizes = np.sqrt([(t**2).sum() for t in terms])
        self.scale[name] = np.minimum(p * (sizes + p @ sizes), sizes.max())


def track(running_mean, running_var, naive, k=0, momentum=0.1, batches=1):
    """Give the running statistics after the batch of `naive`; `batches` counts it as well.

    Where axis 0 is kept they are averaged over it. A group with nothing in it takes no part.
    """
    stat, n = naive.statistics[k], naive.counts[k]
    unbiased = naive.variances[k] * n / np.maximum(n - 1, 1)
    rows = stat.sizes[0] if stat.batch_kept else 1
    rest = math.prod(stat.sizes[1:]) if stat.batch_kept else stat.size
    seen = (n > 0).reshape(rows, rest)
    momentum = 1 / batches if momentum is None else momentum

    def step(running, batch):
        average = np.where(seen, batch.reshape(rows, rest), 0).sum(0) / np.maximum(seen.sum(0), 1)
        old = np.asarray(running, dtype=np.float64).ravel()
        new = np.where(seen.any(0), old + momentum * (average - old), old)
        return new.reshape(np.shape(running))

    return step(running_mean, naive.means[k]), step(running_var, unbiased)


def central_difference(f, value, step=1e-5):
    """Give the gradient of the scalar f() with respect to the array `value`, changed in place."""
    gradient = np.empty(value.shape)
    for i in np.ndindex(value.shape):
        kept = value[i]
        value[i] = kept + step
        up = f()
        value[i] = kept - step
        down = f()
        value[i] = kept
        gradient[i] = (up - down) / (2 * step)
    return gradient
