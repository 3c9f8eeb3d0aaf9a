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
    "W-PG-11": WrongClaim(
        "The probability of a trajectory is a product because its steps are independent.",
        "Each step is conditioned on the state, which the steps before it made. The product is the chain rule; given the state, the past "
        "adds nothing.",
        2,
    ),
    "W-PG-12": WrongClaim(
        "The environment drops out of the gradient because nobody can differentiate it, and so does what comes after the first action.",
        "The start and the transitions drop out because they do not contain the parameters: the gradient of their logarithms is 0, known or "
        "not. Every later action of the policy contains them and stays.",
        2,
    ),
    "W-PG-13": WrongClaim(
        "The return is a discounted infinite sum, and the discount may be left out of the formulas that follow.",
        "Without γ a formula is that of another objective, γ = 1, which needs episodes that end. With γ < 1 every later reward carries its power of γ.",
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
    "W-PPO-8": WrongClaim(
        "A loss whose value is right trains the policy.",
        "Training reads the gradient alone. With the ratio detached the value is right to the last digit and nothing is learned; a test of values "
        "passes it.",
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
    "W-DPO-1": WrongClaim(
        "With the pair y₂ over y₁ and a uniform reference, π = (0.3, 0.2, 0.5) has π(y₂)/π(y₁) = 3/2 and so a lower DPO loss "
        "than the reference.",
        "The ratio of chosen to rejected is 0.2/0.3 = 2/3: the policy prefers the rejected response, and its loss is 0.916, above "
        "log 2 = 0.693.",
        7,
    ),
    "W-DPO-2": WrongClaim(
        "The DPO loss is log σ(β × ratio), with the ratio of the two probabilities in the sigmoid.",
        "It is −log σ(β × log-ratio) = log(1 + ratio^(−β)): with a ratio of 1 it is log 2, and it is never negative.",
        7,
    ),
    "W-DPO-3": WrongClaim(
        "The policy with π(y₂) = 22/69 and π(y₁) = 2/11 has the same DPO loss as one with ratio 1.75.",
        "Its ratio is 1.7536 and its probabilities sum to 1.0007. Ratio 1.75 with π(y₁) = 2/11 needs π(y₂) = 7/22.",
        7,
    ),
    "W-DPO-4": WrongClaim(
        "Policies with equal ratios tie in the DPO loss because only one pair was sampled.",
        "The loss reads nothing but the log-ratio of each pair, so no number of copies of the pair tells such policies apart: "
        "what was never compared stays invisible.",
        7,
    ),
    "W-DPO-5": WrongClaim(
        "The DPO loss can be 0 while the KL divergence is infinite.",
        "Both hold only as limits. With a policy and a reference that give every response some probability, the loss is positive and KL(π‖π_ref) is at "
        "most log(1/min π_ref); it grows without bound only as the reference's least probability goes to 0.",
        7,
    ),
    "W-DPO-6": WrongClaim(
        "DPO maximises E[r_w − r_l] − β KL(π_ref‖π_ref) and trains the reward model.",
        "KL(π_ref‖π_ref) is 0 and the margin alone is unbounded. DPO minimises −log σ of the margin of implicit rewards, and it "
        "trains the policy.",
        7,
    ),
    "W-DPO-7": WrongClaim(
        "The gradient of DPO is an expectation of ∇ log π (r − β(1 + log π − log π_ref)) over the reward's own distribution.",
        "With samples of the policy that is the gradient of the RL objective. DPO's is −β σ(r̂_l − r̂_w)(∇ log π_w − ∇ log π_l), "
        "averaged over the pairs of the data.",
        7,
    ),
    "W-DPO-8": WrongClaim(
        "The gradient of DPO has three terms: reward, entropy, and KL.",
        "It has one weight, σ(r̂_l − r̂_w), and one difference of score functions.",
        7,
    ),
    "W-DPO-9": WrongClaim(
        "DPO weighs a pair with σ(A), A the implicit reward margin: well-ordered pairs count most.",
        "The weight is 1 − σ(A) = σ(−A): 0.953, 0.5 and 0.047 at A = −3, 0, 3. Pairs in the wrong order count most.",
        7,
    ),
    "W-DPO-10": WrongClaim(
        "Whether the chosen response stands first or second in the Bradley-Terry probability does not matter.",
        "P(y₂ over y₁) = e^(r₂)/(e^(r₁) + e^(r₂)): with the two exchanged, or the denominator lost, the loss teaches the opposite order, or is "
        "no probability.",
        7,
    ),
    "W-DPO-11": WrongClaim(
        "The last line of DPO is −E log[β log(π/π_ref)(y_w) + β log(π/π_ref)(y_l)].",
        "It is −E log σ[β log(π/π_ref)(y_w) − β log(π/π_ref)(y_l)]: without σ the argument can be negative, and the two implicit "
        "rewards are subtracted.",
        7,
    ),
    "W-DPO-12": WrongClaim(
        "−log(σ(x)) may be computed as it is written.",
        "σ(−900) rounds to 0 and its logarithm is infinite, where the loss is 900 and its slope −1. One function must do both: logsigmoid.",
        7,
    ),
    "W-DPO-13": WrongClaim(
        "A larger β always keeps the policy nearer to the reference.",
        "At the optimum it does. After a few steps of gradient descent the order is the reverse, since the step is proportional to β, "
        "and with Adam it is not.",
        7,
    ),
    "W-DPO-14": WrongClaim(
        "DPO raises the probability of the chosen responses.",
        "It raises the difference to the rejected ones. Both can fall, and what they lose goes to responses that nobody compared.",
        7,
    ),
    "W-DPO-15": WrongClaim(
        "log Z cancels in the DPO loss whatever two responses are compared.",
        "It cancels because both answer the same prompt. For responses to two prompts log Z(x) − log Z(x′) would remain.",
        7,
    ),
    "W-DPO-16": WrongClaim(
        "DPO must mask the prompt's tokens, and padding takes care of itself.",
        "It is the other way round: the prompt's log-probabilities are the same in both responses and cancel; those of padding differ "
        "with its length and do not.",
        7,
    ),
    "W-KL-1": WrongClaim(
        "k₂, half the mean squared log-ratio, estimates the KL divergence without bias.",
        "It is an approximation of second order: for unit Gaussians at distance m its bias is KL m²/4, 0.25 KL at m = 1.",
        8,
    ),
    "W-KL-2": WrongClaim(
        "k₂ has less variance than k₁ because squaring tames the extremes.",
        "Squaring makes extremes larger. k₂ gains where the two distributions are close, since the first-order term of mean 0 is gone, and "
        "is noisier than k₁ beyond m = 1.112.",
        8,
    ),
    "W-KL-3": WrongClaim(
        "The KL divergence is hard to compute because samples from the policy are hard to get.",
        "Sampling from the policy is what a rollout does. What is out of reach is the sum over all responses.",
        8,
    ),
    "W-KL-4": WrongClaim(
        "k₂ is biased by Jensen's inequality, since E[X²] is not (E X)².",
        "E[X²] − (E X)² is a variance. The bias is E[l²]/2 − E[l], l the log-ratio; m⁴/8 for unit Gaussians at distance m.",
        8,
    ),
    "W-KL-5": WrongClaim(
        "The mean log-ratio minus λ/2 times its empirical variance over N corrects the bias of the estimate.",
        "The mean log-ratio has no bias to correct; the correction adds one of −λ(N − 1)/(2N²) Var l.",
        8,
    ),
    "W-KL-6": WrongClaim(
        "k₃ is unbiased for whatever samples it is given.",
        "The mean of its ratio must be 1. Where the sampler leaves out part of the reference's support, as top-k does, it is less: 0.023 for a "
        "divergence of 0.223, while k₁ is right.",
        8,
    ),
    "W-KL-7": WrongClaim(
        "An unbiased estimator of the KL divergence, used as a loss, has the gradient of the KL divergence.",
        "On samples held fixed the expected gradient of k₁ is 0, of k₂ that of KL(π‖π_ref), and of k₃ that of KL(π_ref‖π).",
        8,
    ),
    "W-KL-8": WrongClaim(
        "A KL loss on every token covers the divergence of the whole response.",
        "It misses what an early token does to the divergence of the later ones: 0 where the gradient is ±1.4926 in the chapter's example.",
        8,
    ),
    "W-KL-9": WrongClaim(
        "exp(d) − 1 − d is computed well for small d.",
        "The digits cancel: in single precision it is off by a factor at d = 1e-4 and negative at 1e-6. expm1(d) − d is never negative.",
        8,
    ),
    "W-KL-10": WrongClaim(
        "Multiplying k₃ by a detached importance ratio corrects its gradient for samples of an older policy.",
        "The value is corrected, not the gradient: the ratio must be differentiated too. With k₂, which is a loss and not a value, the detached ratio "
        "is right.",
        8,
    ),
    "W-KL-11": WrongClaim(
        "With the KL divergence as the only term, a policy that starts at the reference stays there.",
        "In expectation. With k₁ as the loss each sample pushes in a random direction and nothing pulls back, so the policy drifts on noise.",
        8,
    ),
    "W-OO-1": WrongClaim(
        "The KL divergence of best-of-n from the reference is log n − (n − 1)/n.",
        "That is an upper bound, reached only without ties and with many responses: for two equally likely responses the divergence never exceeds log 2.",
        9,
    ),
    "W-OO-2": WrongClaim(
        "Best-of-n beats one sample of the reference in a share n/(n + 1) of the cases.",
        "That is the limit in which no two draws tie. A finite list has ties, if only a response drawn twice: counted one half they never exceed "
        "n/(n + 1), counted as wins they do.",
        9,
    ),
    "W-OO-3": WrongClaim(
        "A higher score of the reward model means a better response.",
        "Only as far as the reward model was right. Along the optimal path for a reward that is wrong somewhere the gold score can rise, peak and fall, "
        "or fall from the start.",
        9,
    ),
    "W-OO-4": WrongClaim(
        "Best-of-n cannot over-optimise, since it only ever returns what the reference writes.",
        "It moves the distribution by up to log n − (n − 1)/n nats towards whatever the proxy overrates. Where the proxy's favourites are worse than a typical "
        "draw, its gold score peaks at a finite n and then falls.",
        9,
    ),
}
