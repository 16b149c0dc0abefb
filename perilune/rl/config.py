"""Settings of reinforcement learning, curation and long2short; what the paper leaves open is this project's choice.

No postponed annotations here: recipe validation reads them.
"""

from dataclasses import dataclass, field
from typing import Literal

from perilune.checks import require
from perilune.engine import RepetitionRule


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled from the current policy."""

    group_size: int = 8
    """k, responses per prompt."""
    prompts_per_iteration: int = 16
    """Q, prompts per iteration."""
    temperature: float = 1.0
    """Sampling temperature; the trainer divides its logits by the same number."""
    max_response_tokens: int = 256
    """Longest response; a longer one is cut and earns nothing."""
    stop_on_repetition: bool = True
    """End a response early that repeats itself (see `repetition`)."""
    repetition: RepetitionRule = field(default_factory=RepetitionRule)
    """What counts as repeating itself."""
    repetition_penalty: float = 0.2
    """Subtracted from the reward of a response that was stopped for repetition, whose own reward becomes 0."""

    def __post_init__(self) -> None:
        require(self.group_size >= 2, "group_size", ">= 2 (a baseline needs a group)", self.group_size)
        require(self.prompts_per_iteration >= 1, "prompts_per_iteration", ">= 1", self.prompts_per_iteration)
        require(0 < self.temperature < float("inf"), "temperature", "finite and > 0", self.temperature)
        require(self.max_response_tokens >= 1, "max_response_tokens", ">= 1", self.max_response_tokens)
        require(self.repetition_penalty >= 0, "repetition_penalty", ">= 0", self.repetition_penalty)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """What is minimized."""

    kind: Literal["k15", "policy_gradient", "rest"] = "k15"
    """`k15`: squared surrogate of online mirror descent; `policy_gradient`: REINFORCE with the group-mean baseline and
    no regularizer; `rest`: imitate the correct samples only."""
    tau: float = 0.1
    """Temperature of the mirror-descent step, > 0; used by `k15`."""
    baseline: Literal["mean", "log_z"] = "mean"
    """What the reward is compared with: the group's mean (the paper's choice) or tau log Z; used by `k15`."""
    scale: Literal["eq3", "k2_squared"] = "eq3"
    """`eq3` divides the squares by 2 tau so that the gradient is the paper's equation 3; `k2_squared` does not."""
    max_abs_logratio: float = 20.0
    """Sequence log-ratios are clamped to this in metrics; the loss uses them as they are."""

    def __post_init__(self) -> None:
        require(0 < self.tau < float("inf"), "tau", "finite and > 0", self.tau)
        require(self.max_abs_logratio > 0, "max_abs_logratio", "> 0", self.max_abs_logratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """How an iteration's groups become optimizer steps."""

    minibatches_per_iteration: int = 4
    """Optimizer steps per pass over the groups; with 1 the log-ratio is always zero and tau does nothing."""
    epochs: int = 1
    """Passes over the groups of an iteration."""
    micro_batch_tokens: int = 8192
    """Most tokens (prompts and responses) of one forward and backward; a longer single sequence goes alone."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    optimizer_reset: Literal["state", "none"] = "state"
    """`state` clears moments and step counts at the start of every iteration, because the objective has changed."""
    iter_warmup_steps: int = 1
    """Steps over which the learning rate rises inside an iteration; the first of w steps uses 1 / (w + 1) of it."""
    final_lr_ratio: float = 1.0
    """The learning rate falls linearly from 1 to this share of itself over the run."""
    zero_signal: Literal["skip", "keep"] = "skip"
    """Whether groups in which all rewards are equal are left out of the training forward."""
    max_bad_steps: int = 3
    """Steps in a row with a non-finite loss or gradient before the run stops; each such step is skipped."""

    def __post_init__(self) -> None:
        for name, value in (
            ("minibatches_per_iteration", self.minibatches_per_iteration),
            ("epochs", self.epochs),
            ("micro_batch_tokens", self.micro_batch_tokens),
            ("max_bad_steps", self.max_bad_steps),
        ):
            require(value >= 1, name, ">= 1", value)
        require(self.grad_clip > 0, "grad_clip", "> 0", self.grad_clip)
        require(self.iter_warmup_steps >= 0, "iter_warmup_steps", ">= 0", self.iter_warmup_steps)
        require(0 <= self.final_lr_ratio <= 1, "final_lr_ratio", "in [0, 1]", self.final_lr_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthConfig:
    """The length reward."""

    weight: float = 0.2
    """w, 0 for none; above 1 a long right answer can score below a short wrong one of another group, and 2 would
    invert the order inside a group."""
    start: float = 0.4
    """Share of the run after which the length reward is on; 0 for the whole run."""

    def __post_init__(self) -> None:
        require(0 <= self.weight < 2, "length weight", "in [0, 2)", self.weight)
        require(0 <= self.start <= 1, "length start", "in [0, 1]", self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Which prompts an iteration draws."""

    strategy: tuple[Literal["curriculum", "prioritized"], ...] = ("curriculum", "prioritized")
    """Empty for uniform; `curriculum` picks the pool, `prioritized` the weights, and they compose."""
    warmup: float = 0.5
    """Curriculum: share of the run that draws from all prompts before only hard ones are drawn."""
    hard_below: float = 0.5
    """Curriculum: a prompt is hard when its curated pass rate is below this."""
    floor: float = 0.02
    """Prioritized: added to the weight 1 - s of every prompt, so that none is lost for ever."""
    decay: float = 0.9
    """Prioritized: factor on a prompt's counts at each visit."""
    prior_visits: float = 2.0
    """Prioritized: weight of the curated pass rate, in responses."""
    hard_zero_from: float = 1.0
    """Share of the run after which prompts that curation never saw solved are drawn; 1 for never."""

    def __post_init__(self) -> None:
        require(len(set(self.strategy)) == len(self.strategy), "strategy", "without repetition", self.strategy)
        require(0 <= self.warmup <= 1, "warmup", "in [0, 1]", self.warmup)
        require(0 < self.hard_below <= 1, "hard_below", "in (0, 1]", self.hard_below)
        require(0 <= self.floor < float("inf"), "floor", "finite and >= 0", self.floor)
        require(0 < self.decay <= 1, "decay", "in (0, 1]", self.decay)
        require(self.prior_visits > 0, "prior_visits", "> 0", self.prior_visits)
        require(0 <= self.hard_zero_from <= 1, "hard_zero_from", "in [0, 1]", self.hard_zero_from)


@dataclass(frozen=True, slots=True, kw_only=True)
class RLConfig:
    """One phase of reinforcement learning."""

    iterations: int = 60
    """Most iterations."""
    budget_s: float | None = None
    """Wall-clock limit in seconds; progress is then the larger of the shares of iterations and time used."""
    min_iterations: int = 1
    """Iterations that run even when the time is over."""
    seed: int = 0
    """Decides prompts, draws and the order of training."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling from the policy."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss."""
    update: UpdateConfig = field(default_factory=UpdateConfig)
    """Optimizer steps."""
    length: LengthConfig = field(default_factory=LengthConfig)
    """Length reward."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Choice of prompts."""
    max_verifier_error_rate: float = 0.05
    """Share of failed verifications in an iteration above which the run stops."""
    shuffle_rewards: bool = False
    """Negative control: give each iteration's rewards to random responses; nothing may be learned then."""
    eval_interval: int = 0
    """Iterations between evaluations; 0 for none (the last iteration is evaluated too otherwise)."""
    checkpoint_interval: int = 10
    """Iterations between checkpoints; the last iteration is always saved."""

    def __post_init__(self) -> None:
        require(self.iterations >= 1, "iterations", ">= 1", self.iterations)
        require(self.budget_s is None or self.budget_s > 0, "budget_s", "> 0 or absent", self.budget_s)
        require(
            1 <= self.min_iterations <= self.iterations, "min_iterations", "in [1, iterations]", self.min_iterations
        )
        require(
            0 <= self.max_verifier_error_rate <= 1,
            "max_verifier_error_rate",
            "in [0, 1]",
            self.max_verifier_error_rate,
        )
        require(self.eval_interval >= 0, "eval_interval", ">= 0", self.eval_interval)
        require(self.checkpoint_interval >= 1, "checkpoint_interval", ">= 1", self.checkpoint_interval)


@dataclass(frozen=True, slots=True, kw_only=True)
class CurationConfig:
    """Which problems become prompts of reinforcement learning."""

    passes: int = 10
    """Samples per problem that estimate its pass rate (the paper's number)."""
    temperature: float = 1.0
    """Sampling temperature of the estimate."""
    max_response_tokens: int = 256
    """Longest response of the estimate."""
    drop_at_or_above: float = 0.9
    """Problems with at least this pass rate are dropped as trivial."""
    guess_n: int = 8
    """Guesses without reasoning per problem; one right guess drops it; 0 switches the filter off (the paper: 8)."""
    guess_tokens: int = 32
    """Longest guess; a longer one is taken for reasoning and does not count."""
    allow_choice: bool = False
    """Keep multiple-choice, true/false and proof problems."""
    check_verifier: bool = True
    """Drop problems whose verifier refuses the right answer or accepts a wrong one."""
    file_problems: int = 256
    """Problems per file, the unit of resuming."""
    seed: int = 0
    """Decides the samples."""

    def __post_init__(self) -> None:
        require(self.passes >= 1, "passes", ">= 1", self.passes)
        require(0 < self.temperature < float("inf"), "temperature", "finite and > 0", self.temperature)
        require(self.max_response_tokens >= 1, "max_response_tokens", ">= 1", self.max_response_tokens)
        require(self.drop_at_or_above > 0, "drop_at_or_above", "> 0 (above 1 keeps all)", self.drop_at_or_above)
        require(self.guess_n >= 0, "guess_n", ">= 0", self.guess_n)
        require(self.guess_tokens >= 1, "guess_tokens", ">= 1", self.guess_tokens)
        require(self.file_problems >= 1, "file_problems", ">= 1", self.file_problems)
