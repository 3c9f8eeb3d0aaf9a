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
    "W-PPO-1": WrongClaim(
        "Outside [1 − ε, 1 + ε] the gradient is 0, so the probability ratio cannot leave the interval.",
        "The clip removes that sample's own push and nothing else: one step can jump over the edge, and other samples "
        "move a clipped one through the weights that they share, from 1.226 to above 1.5 in the homework's example.",
        4,
    ),
    "W-PPO-2": WrongClaim(
        "The clipped objective is the smallest of r A, (1 − ε) A and (1 + ε) A, so the gradient is 0 at r = 0.9.",
        "It is the smaller of two terms, r A and clip(r) A. Inside the interval they are equal and the gradient in r is A; "
        "it is 0 only for A > 0 above 1 + ε and for A < 0 below 1 − ε.",
        4,
    ),
    "W-PPO-3": WrongClaim(
        "The importance weight is the quotient of the log-probabilities, log π / log π_old.",
        "It is π / π_old = exp(log π − log π_old): 1.25 for π = 0.5, π_old = 0.4, where the quotient is 0.756. As log π_old < 0, "
        "the quotient's gradient even has the wrong sign.",
        4,
    ),
    "W-PPO-4": WrongClaim(
        "The clip keeps the model from being too sure.",
        "The clip looks at change alone: 0.95 → 0.99 has the ratio 1.04 and is left alone, 0.1 → 0.13 has 1.3 and is "
        "clipped, though both probabilities are small.",
        4,
    ),
    "W-PPO-5": WrongClaim(
        "The entropy bonus makes the model rigid.",
        "The entropy is maximised, and its gradient moves probability from likely tokens to unlikely ones: the policy "
        "stays flexible.",
        4,
    ),
    "W-PPO-6": WrongClaim(
        "PPO maximises L_policy + c L_value + c′ H.",
        "It maximises L_policy − c L_value + c′ H: a squared error is minimised. With the plus, 50 steps of size 0.1 take a "
        "value from 0 to −116 where the target is 1.",
        4,
    ),
    "W-PPO-7": WrongClaim(
        "With importance weights, samples of any policy give the right expectation.",
        "The sampler must be able to write every response that contributes: where π(y) f(y) ≠ 0 it needs a positive "
        "probability. What it never writes is missing from the mean, and no weight brings it back.",
        4,
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
    "W-RLHF-1": WrongClaim(
        "The term −β log(π/π_SFT) is a policy-gradient term that prefers answers to those of the SFT model.",
        "Its mean is −β KL(π‖π_SFT), never positive and 0 only at the SFT model: a penalty for leaving it, −0.275 for "
        "π = (0.5, 0.3, 0.2), π_SFT = (0.2, 0.3, 0.5), β = 1.",
        6,
    ),
    "W-RLHF-2": WrongClaim(
        "The pretraining term γ E[log π] is entropy regularisation.",
        "It is the log-likelihood of pretraining text, with gradient γ (data − π) in the logits; the entropy of the "
        "policy does not contain the data.",
        6,
    ),
    "W-RLHF-3": WrongClaim(
        "The expectation of the pretraining term is over the policy's own responses.",
        "It is over pretraining text. Over the policy, E[log π] is minus the entropy, and going up along it collapses "
        "the policy.",
        6,
    ),
    "W-RLHF-4": WrongClaim(
        "The reward depends on the policy's parameters through its input, so its derivative in them exists.",
        "A given response has a reward without any parameters in it; they act through the probability of sampling that "
        "response, and the gradient is E[r ∇ log π].",
        6,
    ),
    "W-RLHF-5": WrongClaim(
        "One multiplier is enough for the constraint that the integral over prompts and responses is 1.",
        "It fixes the average over prompts only: with Z = 1.859 and 10.543 the two totals are 0.300 and 1.700. Each "
        "prompt needs its own, λ(x) = β (log Z(x) − 1).",
        6,
    ),
    "W-RLHF-6": WrongClaim(
        "Setting the derivative of the Lagrangian to 0 gives π = π_ref exp(r/β − 1), without the multiplier.",
        "π = π_ref exp(r/β − 1 − λ/β): without λ the line sums to Z/e, not to 1, and nothing is left to normalise with.",
        6,
    ),
    "W-RLHF-7": WrongClaim(
        "From the optimum follows log(π/π_ref) + β log Z = r/β.",
        "log(π/π_ref) + log Z = r/β: the β in front of log Z appears only when the line is multiplied by β.",
        6,
    ),
    "W-RLHF-8": WrongClaim(
        "log Z = Σ π_ref exp(r/β).",
        "That sum is Z. With Z for log Z all rewards of a prompt shift by a constant, which their differences do not show.",
        6,
    ),
    "W-RLHF-9": WrongClaim(
        "RLHF maximises E_y[r − KL(π‖π_ref)].",
        "β is missing in front of the KL, and the KL is a mean over y already: E_y[r] − β KL(π‖π_ref).",
        6,
    ),
    "W-RLHF-10": WrongClaim(
        "Setting the derivative to 0 gives the maximum over the probabilities.",
        "Without a multiplier the point does not sum to 1, and a derivative of 0 is only a candidate: in the logits it "
        "is 0 at every policy that always gives one answer, too. The maximum follows from concavity.",
        6,
    ),
}
