"""Whether a device still is what was profiled: a two-sided CUSUM per stage and operation.

Pure arithmetic on logarithms of real over profiled durations, so twice as fast is as far away as twice as slow. Each
side adds up what exceeds the band; noise within it drains the sum. Errors are clipped, so it takes several operations
in a row, not one that took ten times as long. A device that is slow for seconds and quick for seconds would raise the
alarm again and again: every time it ends, the next one needs twice as much.
"""

import math

#: Errors count as at most this, or as so many standard deviations.
_CLIP, _CLIP_SIGMAS = 0.5, 3.0
#: The band is at least so many standard deviations, or noise alone would fill the sum.
_BAND_SIGMAS = 0.5
#: The alarm comes when the sum exceeds this, or so many standard deviations.
_LIMIT, _LIMIT_SIGMAS = 6.0, 24.0
#: An alarm that ended multiplies the limit by this, up to so much; every operation without takes this share back.
_PATIENCE_GAIN, _MOST_PATIENCE, _CALMING = 2.0, 8.0, 0.0005
#: Gain of the running mean, and the share of the band within which it has to be for the alarm to end.
_MEAN_GAIN = 0.01
_CLEAR_SHARE = 0.6


class DriftDetector:
    """Of one operation on one stage. `active`: the alarm; `level`: running mean of log(real / profiled), clipped."""

    __slots__ = ("_above", "_band", "_below", "_patience", "active", "level")

    def __init__(self, band: float) -> None:
        """band: error of the profile that is nothing unusual, a fraction above 0."""
        self._band = math.log1p(band)
        self._above = self._below = 0.0
        self._patience = 1.0
        self.level = 0.0
        self.active = False

    def observe(self, error: float, sigma: float) -> bool:
        """Take one log(real / profiled) in. sigma: standard deviation of such errors about their mean.

        Returns whether the alarm begins or ends.
        """
        if not -_CLIP <= error <= _CLIP:
            most = max(_CLIP, _CLIP_SIGMAS * sigma)
            error = max(-most, min(error, most))
        self.level += _MEAN_GAIN * (error - self.level)
        if self.active:
            if abs(self.level) > _CLEAR_SHARE * self._band:
                return False
            self.active = False
            self._above = self._below = 0.0
            self._patience = min(_MOST_PATIENCE, _PATIENCE_GAIN * self._patience)
            return True
        band = _BAND_SIGMAS * sigma
        if band < self._band:
            band = self._band
        above = self._above + error - band
        below = self._below - error - band
        self._above = above = above if above > 0.0 else 0.0
        self._below = below = below if below > 0.0 else 0.0
        limit = _LIMIT_SIGMAS * sigma
        if limit < _LIMIT:
            limit = _LIMIT
        if self._patience > 1.0:
            limit *= self._patience
            self._patience = max(1.0, self._patience * (1.0 - _CALMING))
        if above <= limit and below <= limit:
            return False
        self.active = True
        # What raised it may be newer than the running mean.
        self.level = max(self.level, band) if above > below else min(self.level, -band)
        return True
