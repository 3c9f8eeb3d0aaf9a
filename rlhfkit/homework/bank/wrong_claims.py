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
    "W-LM-1": WrongClaim(
        "Seen as reinforcement learning, the state of a language model is the prompt.",
        "The state is the prompt and the tokens written so far: it changes with every token.",
        1,
    ),
    "W-LM-2": WrongClaim(
        "p = σ(x · w + b) is a multi-layer perceptron.",
        "One linear map and a sigmoid are logistic regression; a multi-layer perceptron has a hidden layer between two "
        "linear maps.",
        1,
    ),
    "W-LM-3": WrongClaim(
        "The gradient of log π(y) in the unembedding matrix is (p − 1_y) hᵀ, and one ascends along it.",
        "It is (1_y − p) hᵀ; a step up along (p − 1_y) hᵀ lowers log π(y).",
        1,
    ),
    "W-LM-4": WrongClaim(
        "Maximum likelihood minimises the divergence of the policy from the teacher, KL(π‖teacher).",
        "It minimises KL(teacher‖π): the teacher writes the responses over which the mean is taken.",
        1,
    ),
    "W-LM-5": WrongClaim(
        "Imitation and reinforcement learning see responses from the same joint distribution.",
        "In imitation the teacher writes the responses and each has weight 1; in reinforcement learning the policy "
        "itself writes them and the reward is the weight.",
        1,
    ),
    "W-LM-6": WrongClaim(
        "π(y | x) of a response is the softmax probability of one token, or an average over the tokens of the sequence.",
        "It is the product over the response's tokens, each given everything before it: log π(y | x) is the sum of "
        "their log-probabilities, read one position earlier, without the prompt's.",
        1,
    ),
    "W-LM-7": WrongClaim(
        "The residual stream of a transformer accumulates batch by batch.",
        "It accumulates layer by layer, at each position of each sequence; batches do not meet.",
        1,
    ),
    "W-LM-8": WrongClaim(
        "Sampling at temperature 1 is very random.",
        "Temperature 1 is the model's own distribution; the uniform one is the limit of high temperatures.",
        1,
    ),
    "W-LM-9": WrongClaim(
        "A GPU of CUDA capability 12.1 needs a build for CUDA 12.1.",
        "The compute capability numbers the architecture of the chip (sm_121), not the version of the toolkit; the build "
        "must know that architecture.",
        1,
    ),
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
    "W-RM-1": WrongClaim(
        "The loss of a reward model pulls the difference of the two scores towards 0.",
        "The loss falls for every larger difference: the push fades, with slope −σ(−Δ), and never turns round.",
        5,
    ),
    "W-RM-2": WrongClaim(
        "The derivative of σ is 1 − σ, which is 0 for a large difference.",
        "1 − σ is the derivative of log σ; that of σ is σ (1 − σ). Both tend to 0 for a large positive difference, and "
        "neither is 0.",
        5,
    ),
    "W-RM-3": WrongClaim(
        "Since the gradient vanishes, rewards stay small: they are pushed towards 0.",
        "Only differences enter the loss: adding any c(x) to all rewards of a prompt leaves it as it was, so nothing "
        "pulls a reward to 0.",
        5,
    ),
    "W-RM-4": WrongClaim(
        "To reach σ(A − B), e^A / (e^A + e^B) is turned into 1 / (e^A / e^B + 1 − 1) and 1 / (1 + (e^A / (e^A + e^B) − 1)).",
        "The first drops the 1 and inverts the ratio, the second is 1/P (0.368 and 1.368 at A = 1, B = 0, where 0.731 is right). Divide by e^A: 1 / (1 + e^(B − A)).",
        5,
    ),
    "W-RM-5": WrongClaim(
        "The score is read at the last position of the sequence.",
        "At the last real token: in a padded batch the last position of most rows is padding.",
        5,
    ),
}
