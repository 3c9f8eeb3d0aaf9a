"""A controller that moves the weight of the KL penalty until the measured divergence is near a target."""

from __future__ import annotations

from rlhfkit.validation import require_in


class AdaptiveKLController:
    """Moves ``kl_coef`` so that the measured KL approaches a target.

    kl_coef <- kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n_steps / horizon).

    Args:
        init_kl_coef: first value of the coefficient, reward units per nat, positive.
        target: KL wanted, nats per sequence, positive.
        horizon: number of sequences over which a full error of 0.2 acts, positive.

    Raises:
        ValueError: if an argument is not positive.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        require_in("init_kl_coef", init_kl_coef, 0.0, open_low=True)
        require_in("target", target, 0.0, open_low=True)
        require_in("horizon", horizon, 0.0, open_low=True)
        self.kl_coef, self.target, self.horizon = float(init_kl_coef), float(target), float(horizon)

    def update(self, kl: float, n_steps: int) -> None:
        """Take one step of the rule above.

        Args:
            kl: measured mean KL, nats per sequence. (An estimate may be negative.)
            n_steps: number of sequences it was measured on, not negative.

        Raises:
            ValueError: if ``kl`` is NaN or ``n_steps`` is negative.
        """
        if kl != kl:
            raise ValueError("kl: got nan, expected a number of nats")
        require_in("n_steps", n_steps, 0)
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.kl_coef *= 1.0 + error * n_steps / self.horizon
