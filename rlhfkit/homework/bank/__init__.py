"""The questions, one module per chapter; importing this package registers them all."""

from rlhfkit.homework.bank import (
    ch01_language_models,
    ch02_policy_gradient,
    ch03_baselines,
    ch04_ppo,
    ch05_reward_models,
    ch06_rlhf,
    ch07_dpo,
    ch08_kl,
    ch09_overoptimisation,
)

__all__ = [
    "ch01_language_models",
    "ch02_policy_gradient",
    "ch03_baselines",
    "ch04_ppo",
    "ch05_reward_models",
    "ch06_rlhf",
    "ch07_dpo",
    "ch08_kl",
    "ch09_overoptimisation",
]
