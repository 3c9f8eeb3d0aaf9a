"""The questions, one module per chapter; importing this package registers them all."""

from rlhfkit.homework.bank import ch02_policy_gradient, ch03_baselines

__all__ = ["ch02_policy_gradient", "ch03_baselines"]
