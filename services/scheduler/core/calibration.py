"""The coefficients of one operation's latency model, corrected by what its operations really take.

Every form is a sum of at most three terms (constant; per sequence, or with the square of the length; per token). Their
coefficients are estimated by recursive least squares on the relative error: each observation is divided by what the
profile says, so that long operations do not drown short ones. A coefficient is counted in units of its profiled value.

* Part of the prior is common to all coefficients: a device is faster or slower as a whole until operations of different
  sizes have told the shape.
* Forgetting pulls the covariance back to the prior (P += rate * (P0 - P)) instead of inflating it: where nothing new is
  seen - decoding at one batch for an hour - plain exponential forgetting lets it grow without bound, and then jumps.
* An error counts as at most 2.5 standard deviations of the residuals (Huber), so that one operation that took ten
  times as long moves a prediction by a percent or two. Four such errors in a row are a change: it starts again.
"""

import math

from services.latency import LatencyModel

Terms = tuple[float, float, float, float]

#: Form name -> position of its coefficients in (a, b, c, d) of a + C * (b + l * (c + l * d)).
_POSITIONS = {
    "constant": (0,),
    "affine": (0, 2),
    "quadratic": (3,),
    "full": (0, 2, 3),
    "full_decode": (0, 1, 2),
}

#: Where in the upper triangle of the covariance each coefficient is.
_PLACES = ((0, 1, 2), (1, 3, 4), (2, 4, 5))

#: Prior variances, of the scale of all coefficients and of each for itself; the variance of one observation is 1.
_PRIOR_SCALE = 1.0
_PRIOR_OWN = 9.0
#: Share of the way back to the prior per observation.
_FORGETTING = 0.0004
#: A coefficient stays within these bounds, in units of its profiled value.
_LEAST, _MOST = 0.05, 20.0
#: Prior variance and bounds of a coefficient that is alone, as the difference from its profiled value.
_SINGLE_PRIOR = _PRIOR_SCALE + _PRIOR_OWN
_SINGLE_LEAST, _SINGLE_MOST = _LEAST - 1.0, _MOST - 1.0
#: What a coefficient that the profile found to be 0 adds to the first operation that is large for it, at most.
_MOST_LEAP = 0.5
#: A prediction stays above this share of the profile's.
_LEAST_RATIO = 0.02
#: Errors (logarithms of real over predicted) count as at most this, or as so many standard deviations.
_CLIP, _CLIP_SIGMAS = 0.2, 2.5
#: So many errors beyond that in a row are a change; they count as at most this.
_CHANGED = 4
_MOST_ERROR = 1.0


def is_polynomial(model: LatencyModel) -> bool:
    """Whether its durations are a + C * (b + l * (c + l * d))."""
    return model.form in _POSITIONS


def terms_of(model: LatencyModel | None) -> Terms:
    """Coefficients as (a, b, c, d), zeros without a model. Of a form that is no polynomial a is the ratio of real to
    profiled durations."""
    terms = [0.0, 0.0, 0.0, 0.0]
    if model is not None and not is_polynomial(model):
        return (1.0, 0.0, 0.0, 0.0)
    if model is not None:
        for position, coefficient in zip(_POSITIONS[model.form], model.coefficients, strict=True):
            terms[position] = coefficient
    return (terms[0], terms[1], terms[2], terms[3])


def coefficients_of(model: LatencyModel) -> "Coefficients":
    """What learns the coefficients of this form."""
    return SingleCoefficient(model) if len(_POSITIONS.get(model.form, (0,))) == 1 else Coefficients(model)


class Coefficients:
    """Of one operation on one stage; begins with the profile's. `terms`: what predicts now.

    A form that is no polynomial (`tabulated`) has one coefficient, the ratio of real to tabulated durations; durations
    are given as such ratios.
    """

    __slots__ = ("_base", "_forms", "_h", "_high", "_low", "_p", "_p0", "_run", "_squared", "_units", "ratio", "terms")

    def __init__(self, model: LatencyModel) -> None:
        positions = _POSITIONS.get(model.form, (0,))
        self.terms = terms_of(model)
        a, b, c, d = self.terms
        #: Whether the middle term grows with the square of the length, or with the number of sequences.
        self._squared = 3 in positions
        #: Profiled coefficients: constant, the middle one, per token; and which of them the form has.
        self._base = (a, d if self._squared else b, c)
        self._forms = (0 in positions, 1 in positions or self._squared, 2 in positions)
        #: Coefficient = base + unit * h.
        self._h = (0.0, 0.0, 0.0)
        self._units: tuple[float, float, float] | None = None
        self._low = self._high = self._h
        #: Covariance of h, upper triangle: 00, 01, 02, 11, 12, 22; and its prior.
        self._p = self._p0 = (0.0,) * 6
        #: Errors beyond the clip in a row; negative when the operations took less.
        self._run = 0
        #: Real over profiled duration as predicted for the newest operation.
        self.ratio = 1.0

    def profiled_s(self, batch: float, length: float, cached: float) -> float:
        """What the profile said, seconds; may be negative like the profile's polynomial."""
        x1 = batch * length * (length + 2.0 * cached) if self._squared else batch
        b0, b1, b2 = self._base
        return b0 + b1 * x1 + b2 * batch * length

    def observe(
        self, profiled_s: float, actual_s: float, sigma: float, batch: float, length: float, cached: float
    ) -> float:
        """Learn from a real duration. profiled_s: what the profile says, above 0. sigma: standard deviation of the
        residuals. Returns the residual before learning: the logarithm of real over predicted."""
        x1 = batch * length * (length + 2.0 * cached) if self._squared else batch
        x2 = batch * length
        if self._units is None:
            self._begin(profiled_s, x1, x2)
        u0, u1, u2 = self._units  # type: ignore[misc]
        w0, w1, w2 = u0 / profiled_s, u1 * x1 / profiled_s, u2 * x2 / profiled_s
        if w0 > 1.0 or w1 > 1.0 or w2 > 1.0:
            w0, w1, w2 = self._smaller_units((w0, w1, w2))
            u0, u1, u2 = self._units  # type: ignore[misc]
        h0, h1, h2 = self._h
        ratio = 1.0 + w0 * h0 + w1 * h1 + w2 * h2
        if ratio < _LEAST_RATIO:
            ratio = _LEAST_RATIO
        residual = math.log(actual_s / (profiled_s * ratio))
        error = residual
        if -_CLIP <= residual <= _CLIP:
            self._run = 0
        else:
            error = self._clipped(residual, sigma)
        error *= ratio  # in units of the profile's duration, like w and h
        p00, p01, p02, p11, p12, p22 = self._p
        q00, q01, q02, q11, q12, q22 = self._p0
        p00 += _FORGETTING * (q00 - p00)
        p01 += _FORGETTING * (q01 - p01)
        p02 += _FORGETTING * (q02 - p02)
        p11 += _FORGETTING * (q11 - p11)
        p12 += _FORGETTING * (q12 - p12)
        p22 += _FORGETTING * (q22 - p22)
        v0 = p00 * w0 + p01 * w1 + p02 * w2
        v1 = p01 * w0 + p11 * w1 + p12 * w2
        v2 = p02 * w0 + p12 * w1 + p22 * w2
        s = 1.0 + w0 * v0 + w1 * v1 + w2 * v2
        k0, k1, k2 = v0 / s, v1 / s, v2 / s
        self._p = (p00 - k0 * v0, p01 - k0 * v1, p02 - k0 * v2, p11 - k1 * v1, p12 - k1 * v2, p22 - k2 * v2)
        l0, l1, l2 = self._low
        m0, m1, m2 = self._high
        h0 += k0 * error
        h1 += k1 * error
        h2 += k2 * error
        h0 = l0 if h0 < l0 else m0 if h0 > m0 else h0
        h1 = l1 if h1 < l1 else m1 if h1 > m1 else h1
        h2 = l2 if h2 < l2 else m2 if h2 > m2 else h2
        self._h = (h0, h1, h2)
        self.ratio = ratio
        b0, b1, b2 = self._base
        if self._squared:
            self.terms = (b0 + u0 * h0, 0.0, b2 + u2 * h2, b1 + u1 * h1)
        else:
            self.terms = (b0 + u0 * h0, b1 + u1 * h1, b2 + u2 * h2, 0.0)
        return residual

    def _clipped(self, residual: float, sigma: float) -> float:
        """What an error of more than `_CLIP` counts as. Several beyond the clip in a row, all to one side, are no
        outliers but a change: then they count in full, and what was learnt before counts as little as the profile."""
        most = max(_CLIP, _CLIP_SIGMAS * sigma)
        if -most <= residual <= most:
            self._run = 0
            return residual
        sign = 1 if residual > 0.0 else -1
        self._run = self._run + sign if self._run * sign > 0 else sign
        if abs(self._run) < _CHANGED:
            return sign * most
        if abs(self._run) == _CHANGED:
            self._doubt()
        return max(-_MOST_ERROR, min(residual, _MOST_ERROR))

    def _doubt(self) -> None:
        """The covariance is the prior's again."""
        self._p = self._p0

    def _smaller_units(self, weights: tuple[float, float, float]) -> tuple[float, float, float]:
        """A coefficient without a profiled value would explain more than the whole of this operation: its unit shrinks
        to what explains the whole. In the old one the noise of small operations would be a multiple of this one, now
        and for ever. Little of what they said of it counts here. Returns the new weights."""
        units, h, p, new = list(self._units or ()), list(self._h), list(self._p), list(weights)
        for index, (weight, places) in enumerate(zip(weights, _PLACES, strict=True)):
            if weight <= 1.0 or self._base[index]:
                continue
            units[index] /= weight
            h[index] = max(h[index], min(h[index] * weight, _MOST_LEAP))
            new[index] = 1.0
            for place in places:
                p[place] = self._p0[place]
        self._units, self._h = (units[0], units[1], units[2]), (h[0], h[1], h[2])
        self._p = (p[0], p[1], p[2], p[3], p[4], p[5])
        return new[0], new[1], new[2]

    def _begin(self, profiled_s: float, x1: float, x2: float) -> None:
        """Units of the coefficients. One that the profile found to be 0 has none: it is measured by what would explain
        the whole of the first operation, later of the one that it would explain most of."""
        units, signs, low, high = [], [], [], []
        for base, feature, has in zip(self._base, (1.0, x1, x2), self._forms, strict=True):
            unit = abs(base) or (profiled_s / feature if has and feature > 0.0 else 0.0)
            sign = base / unit if unit else 0.0
            units.append(unit)
            signs.append(sign)
            if sign > 0.0:
                bounds = (_LEAST - 1.0, _MOST - 1.0)
            elif sign < 0.0:
                bounds = (1.0 - _MOST, 1.0 - _LEAST)
            else:
                bounds = (0.0, _MOST) if unit else (0.0, 0.0)
            low.append(bounds[0])
            high.append(bounds[1])
        self._units = (units[0], units[1], units[2])
        self._low, self._high = (low[0], low[1], low[2]), (high[0], high[1], high[2])
        s0, s1, s2 = signs
        own0, own1, own2 = (_PRIOR_OWN if unit else 0.0 for unit in units)
        self._p = self._p0 = (
            _PRIOR_SCALE * s0 * s0 + own0,
            _PRIOR_SCALE * s0 * s1,
            _PRIOR_SCALE * s0 * s2,
            _PRIOR_SCALE * s1 * s1 + own1,
            _PRIOR_SCALE * s1 * s2,
            _PRIOR_SCALE * s2 * s2 + own2,
        )


class SingleCoefficient(Coefficients):
    """Of a form with one term: the same estimate, to the last digit, in a fraction of the time.

    The term is the whole of the profiled duration, so its weight is 1 in every operation and its size does not matter.
    """

    __slots__ = ("_scale", "_unit", "_variance")

    def __init__(self, model: LatencyModel) -> None:
        super().__init__(model)
        self._unit = sum(self.terms)
        #: Coefficient = unit + unit * scale; and the variance of that.
        self._scale = 0.0
        self._variance = _SINGLE_PRIOR

    def observe(
        self, profiled_s: float, actual_s: float, sigma: float, batch: float, length: float, cached: float
    ) -> float:
        """See Coefficients.observe."""
        del batch, length, cached
        scale = self._scale
        ratio = 1.0 + scale
        if ratio < _LEAST_RATIO:
            ratio = _LEAST_RATIO
        residual = math.log(actual_s / (profiled_s * ratio))
        error = residual
        if -_CLIP <= residual <= _CLIP:
            self._run = 0
        else:
            error = self._clipped(residual, sigma)
        variance = self._variance
        variance += _FORGETTING * (_SINGLE_PRIOR - variance)
        gain = variance / (1.0 + variance)
        self._variance = variance - gain * variance
        scale += gain * (error * ratio)
        scale = _SINGLE_LEAST if scale < _SINGLE_LEAST else _SINGLE_MOST if scale > _SINGLE_MOST else scale
        self._scale = scale
        self.ratio = ratio
        coefficient = self._unit + self._unit * scale
        if self._squared:
            self.terms = (0.0, 0.0, 0.0, coefficient)
        else:
            self.terms = (coefficient, 0.0, 0.0, 0.0)
        return residual

    def _doubt(self) -> None:
        self._variance = _SINGLE_PRIOR
