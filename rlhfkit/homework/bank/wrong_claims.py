"""Common wrong claims, by the ids that the book's pages and the planted wrong answers cite."""

from __future__ import annotations

from typing import NamedTuple


class WrongClaim(NamedTuple):
    """A claim often met in notes and lectures, and what is true instead.

    Attributes:
        claim: the claim, in one neutral sentence.
        verdict: what holds instead.
        chapter: number of the chapter that shows it.
    """

    claim: str
    verdict: str
    chapter: int


WRONG_CLAIMS: dict[str, WrongClaim] = {
    "W-PG-1": WrongClaim(
        "The gradient of the expected reward is the expected gradient of the reward.",
        "The reward of a given response does not contain the parameters, so the expected gradient of the reward is 0; "
        "the parameters act through the sampling distribution.",
        2,
    ),
    "W-PG-2": WrongClaim(
        "The sum of r(y) ∇π(y) over all responses equals the expectation of r(y) ∇π(y) under the policy.",
        "The sum equals the expectation of r(y) ∇ log π(y); with ∇π inside the expectation the policy enters twice.",
        2,
    ),
    "W-PG-3": WrongClaim(
        "By the product rule the gradient is E_π[r ∇1] + E_π[r ∇π], for one prompt as for all.",
        "The first part is 0, the second has one π too many, and the mean over prompts must stay.",
        2,
    ),
    "W-PG-4": WrongClaim(
        "Gradient ascent moves the parameters along the gradient of J′.",
        "It moves them along J′ itself: the gradient of J′ is the second derivative.",
        2,
    ),
    "W-PG-5": WrongClaim(
        "The Monte Carlo gradient is the sum over the N sampled trajectories.",
        "It is their mean: the sum has N times the expectation.",
        2,
    ),
    "W-PG-6": WrongClaim(
        "An estimator is unbiased if it converges to the true value as the number of samples grows.",
        "Unbiased means that its expectation is right at every N; convergence (consistency) is another property, and "
        "neither implies the other.",
        2,
    ),
    "W-PG-7": WrongClaim(
        "The estimate with rewards-to-go is (sum of the score functions) × (sum of the rewards-to-go).",
        "Each score function is multiplied by its own reward-to-go, inside the sum over time.",
        2,
    ),
    "W-PG-8": WrongClaim(
        "The score function at time t is weighted with the sum of Q over the later steps.",
        "Q at time t already is the sum of the rewards to come; summing it again counts late rewards several times.",
        2,
    ),
    "W-PG-9": WrongClaim(
        "Tokens are discrete, so the expected reward cannot be differentiated and gradient ascent is impossible.",
        "The expected reward is a smooth function of the parameters; only the path through a sampled token has no "
        "gradient, and the score function needs none.",
        2,
    ),
    "W-PG-10": WrongClaim(
        "The reward of a trajectory may stand inside the logarithm.",
        "log(R π) = log R + log π: the reward drops out of the gradient. It must multiply the log-probability.",
        2,
    ),
    "W-BL-1": WrongClaim(
        "Subtracting any baseline leaves the expected gradient as it was.",
        "Only if the baseline does not depend on the response: b = r makes the gradient 0, b = r/2 halves it.",
        3,
    ),
    "W-BL-2": WrongClaim(
        "The value function is the baseline with the least variance.",
        "The best constant baseline weighs rewards with the squared norm of the score function; the value can raise the "
        "variance, 64-fold for π = (0.9, 0.1), r = (1, 0).",
        3,
    ),
    "W-BL-3": WrongClaim(
        "The mean of a group of responses is a baseline that leaves the expected gradient as it was.",
        "The own score is inside the mean, so the gradient comes out (G − 1)/G times too small.",
        3,
    ),
    "W-BL-4": WrongClaim(
        "V(s) is the expected return of being in s and taking the action a.",
        "That is Q(s, a); V(s) is its average over the policy's actions.",
        3,
    ),
    "W-BL-5": WrongClaim(
        "The policy's Q is the reward plus the discounted Q of the best next action.",
        "That is the fixed point of the greedy policy; the policy's own Q averages the next action over the policy.",
        3,
    ),
    "W-BL-6": WrongClaim(
        "The advantage compares an action with one chosen uniformly at random.",
        "It compares with the policy's own average: A = Q − V, so that its mean under the policy is 0.",
        3,
    ),
    "W-BL-7": WrongClaim(
        "Cutting the sum early (small λ) gives high variance, the full sum (λ = 1) gives high bias.",
        "It is the other way round: small λ leans on the critic and takes over its bias; λ = 1 has the variance of "
        "all rewards.",
        3,
    ),
    "W-BL-8": WrongClaim(
        "GAE weighs every k-step estimate with (1 − λ) λ^(k−1).",
        "In a finite episode the last estimate takes all the remaining weight, λ^(T−1), or the weights do not sum "
        "to 1.",
        3,
    ),
    "W-BL-9": WrongClaim(
        "Dividing the advantages of a group by their standard deviation only changes the scale of the step.",
        "Each prompt is divided by its own number, so prompts that nearly always fail or succeed gain weight.",
        3,
    ),
    "W-BL-10": WrongClaim(
        "Padding is 0, so it does no harm when advantages are whitened.",
        "Zeros pull the mean to 0 and change the variance, and the whitened padding is no longer 0.",
        3,
    ),
}
