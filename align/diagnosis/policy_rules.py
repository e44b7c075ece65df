"""Rules about how the policy, the critic and the sampler behave in PPO, and about SFT."""

from align.diagnosis import thresholds
from align.diagnosis.run_figures import RunFigures
from align.diagnosis.verdict import Evidence, Severity, Verdict

TIMES = 3
"""How many times larger or smaller a setting is that a rule suggests."""


def mismatched_sampler(run: RunFigures) -> Verdict | None:
    """The policy that is sampled is not the one that is trained."""
    mean = run.curve("rollout/mismatch_mean")
    share = run.curve("rollout/mismatch_share")
    staleness = run.curve("rollout/staleness")
    if not len(mean) or not len(share):
        return None
    is_on_policy = not len(staleness) or max(staleness.values) == 0
    if is_on_policy:
        found, limit = share, thresholds.LARGE_MISMATCH.value
    else:
        found, limit = mean, thresholds.STALE_MISMATCH.value
    if found.end < limit:
        return None
    return Verdict(
        name="sampler mismatch",
        severity=Severity.SERIOUS,
        stage="ppo",
        text="Sampler and learner give the same tokens different probabilities: the policy that is sampled is not the "
        "one that is trained.",
        evidence=(found.at_start(), found.at_end(limit), mean.at_end()),
        advice=(
            *_unless_set(run, "rollouts.engine", "transformers"),
            *_unless_set(run, "model.dtype", "float32"),
            "ppo.importance_ratio_cap=2",
            "a shorter run with rollouts.workers=0, which samples in the learner's process",
        ),
    )


def truncated_responses(run: RunFigures) -> Verdict | None:
    """Responses are cut at the limit before they end, at the end of PPO or at its start."""
    ended = run.curve("rollout/eos_share")
    if not len(ended) or min(ended.start, ended.end) >= thresholds.ENDED.value:
        return None
    if ended.end < thresholds.ENDED.value:
        text = f"Only {ended.end:.0%} of the responses end by themselves; the others are cut, and scored as they are."
        evidence = ended.at_end(thresholds.ENDED.value)
    else:
        text = f"At the start only {ended.start:.0%} of the responses ended by themselves: the limit is too small for "
        text += "what SFT teaches, and the policy has learned to write less."
        evidence = ended.at_start(thresholds.ENDED.value)
    limit = run.setting("rollouts.max_new_tokens")
    advice = f"rollouts.max_new_tokens={2 * limit}" if limit else "rollouts.max_new_tokens: twice as many"
    return Verdict(
        name="truncated responses",
        severity=Severity.SERIOUS if ended.end < thresholds.HARDLY_ENDED.value else Severity.WARNING,
        stage="ppo",
        text=text,
        evidence=(evidence, run.curve("rollout/length_mean").at_end(limit)),
        advice=(advice, "ppo.truncation_penalty=1", "demonstrations that end within the limit"),
    )


def entropy_collapse(run: RunFigures) -> Verdict | None:
    """The policy gives almost all probability to one token at each place."""
    entropy = run.curve("policy/entropy")
    if len(entropy) < thresholds.SHORTEST.value or entropy.start <= 0:
        return None
    limit = thresholds.ENTROPY_LEFT.value * entropy.start
    step, lowest = entropy.lowest
    if lowest >= limit:
        return None
    return Verdict(
        name="entropy collapse",
        severity=Severity.SERIOUS,
        stage="ppo",
        text=f"The entropy of the policy fell to {lowest / entropy.start:.0%} of what it was: it hardly explored any "
        "more.",
        evidence=(entropy.at_start(), Evidence(entropy.metric, step, lowest, limit, "lowest")),
        advice=(
            *_slower(run),
            "ppo.kl.coefficient: several times larger",
            "ppo.entropy_coefficient=0.01",
        ),
    )


def strong_penalty(run: RunFigures) -> Verdict | None:
    """The KL penalty leaves no room for a gain."""
    coefficient = run.curve("kl/coefficient")
    spread = run.curve("reward/std")
    if not len(coefficient) or not len(spread) or coefficient.end <= 0:
        return None
    room = spread.start / coefficient.end  # the spread shrinks once the policy has learned
    if room >= thresholds.PENALTY.value:
        return None
    suggested = coefficient.end * room / 10
    return Verdict(
        name="KL too strong",
        severity=Severity.SERIOUS,
        stage="ppo",
        text="The KL penalty is so strong that even the best policy could gain only "
        f"{room:.2g} standard deviations of the score.",
        evidence=(
            Evidence(coefficient.metric, coefficient.steps[-1], coefficient.end, spread.start, "at the end"),
            spread.at_start(),
            run.curve("kl/per_sequence").at_end(),
        ),
        advice=(f"ppo.kl.coefficient={suggested:.2g}", "ppo.kl.target: the KL that you want, in nats per sequence"),
    )


def weak_penalty(run: RunFigures) -> Verdict | None:
    """The policy is so far from the reference that the reward model has seen nothing like it."""
    distance = run.curve("kl/per_token")
    if not len(distance) or distance.end <= thresholds.FAR.value:
        return None
    coefficient = run.curve("kl/coefficient")
    suggested = f"ppo.kl.coefficient={TIMES * coefficient.end:.2g}" if coefficient.end else "ppo.kl.coefficient=0.05"
    return Verdict(
        name="KL too weak",
        severity=Severity.WARNING,
        stage="ppo",
        text=f"The policy is {distance.end:.2g} nats per token from the reference, farther than a reward model can "
        "judge.",
        evidence=(distance.at_end(thresholds.FAR.value), coefficient.at_end()),
        advice=(suggested, *_slower(run)),
    )


def large_updates(run: RunFigures) -> Verdict | None:
    """The policy changes more in an update than the clipped objective is meant for."""
    clipped = run.curve("policy/clip_fraction")
    moved = run.curve("policy/approximate_kl")
    if not len(clipped) or not len(moved):
        return None
    if clipped.end < thresholds.CLIPPED.value and moved.end < thresholds.UPDATE_KL.value:
        return None
    return Verdict(
        name="updates too large",
        severity=Severity.WARNING,
        stage="ppo",
        text="The policy changes more in an update than the clipped objective is meant for.",
        evidence=(clipped.at_end(thresholds.CLIPPED.value), moved.at_end(thresholds.UPDATE_KL.value)),
        advice=(*_slower(run), "ppo.epochs: fewer", "ppo.target_kl=0.02"),
    )


def dead_critic(run: RunFigures) -> Verdict | None:
    """The critic explains nothing of the returns, and does not get better."""
    explained = run.curve("value/explained_variance")
    if len(explained) < thresholds.CRITIC_STEPS.value:
        return None
    best = max(explained.values)  # once scores differ little, it can be below 0 again
    newer = explained.from_position(len(explained) // 2)
    gets_better = 1 - newer.end < thresholds.UNEXPLAINED_LEFT.value * (1 - newer.start)
    if best >= thresholds.EXPLAINED.value or gets_better:
        return None
    policy_rate = run.curve("policy/learning_rate")
    rate = run.curve("value/learning_rate")
    rates = (10 * rate.end, policy_rate.end) if len(rate) and len(policy_rate) else ()
    advice = f"learner.critic_learning_rate={max(rates):.2g}" if rates else "learner.critic_learning_rate: larger"
    return Verdict(
        name="critic does not learn",
        severity=Severity.SERIOUS,
        stage="ppo",
        text="The critic explains nothing of the returns, so that its advantages are no better than without it.",
        evidence=(
            Evidence(
                explained.metric,
                explained.steps[explained.values.index(best)],
                best,
                thresholds.EXPLAINED.value,
                "highest",
            ),
        ),
        advice=(
            advice,
            "ppo.critic.warmup=2",
            "an estimator that needs no critic: ppo.estimator=rloo and ppo.samples_per_prompt=4",
        ),
    )


def skipped_updates(run: RunFigures) -> Verdict | None:
    """Gradients are not finite."""
    skipped = run.curve("learner/skipped_steps")
    if not len(skipped):
        return None
    share = sum(value > 0 for value in skipped.values) / len(skipped)
    if share < thresholds.SKIPPED.value:
        return None
    return Verdict(
        name="skipped updates",
        severity=Severity.SERIOUS,
        stage="ppo",
        text=f"In {share:.0%} of the steps a gradient was not finite, and the update was skipped.",
        evidence=(
            Evidence(skipped.metric, skipped.steps[-1], share, thresholds.SKIPPED.value, "share of steps with any"),
        ),
        advice=(*_unless_set(run, "model.dtype", "float32"), *_slower(run), "learner.max_grad_norm=0.5"),
    )


def overfitted_sft(run: RunFigures) -> Verdict | None:
    """SFT continues after its held-out loss has stopped falling."""
    heldout = run.curve("sft/heldout_loss", "sft")
    if len(heldout) < 2:
        return None
    lowest = min(heldout.values)
    limit = thresholds.OVERFITTING.value * lowest
    if heldout.values[-1] < limit:
        return None
    best = heldout.steps[heldout.values.index(lowest)]
    return Verdict(
        name="SFT overfits",
        severity=Severity.WARNING,
        stage="sft",
        text=f"The held-out loss of SFT has risen since step {best}: the model memorises its demonstrations.",
        evidence=(
            Evidence(heldout.metric, best, lowest, meaning="lowest"),
            Evidence(heldout.metric, heldout.steps[-1], heldout.values[-1], limit, "at the end"),
        ),
        advice=("sft.epochs: fewer", "sft.patience: 1, with sft.evaluate_every", "more demonstrations"),
    )


def _unless_set(run: RunFigures, key: str, value: str) -> tuple[str, ...]:
    """A setting as advice, unless the run has it."""
    return () if run.setting(key) == value else (f"{key}={value}",)


def _slower(run: RunFigures) -> tuple[str, ...]:
    """A smaller learning rate of the policy."""
    rate = run.curve("policy/learning_rate")
    return (f"learner.policy_learning_rate={max(rate.values) / TIMES:.2g}",) if len(rate) else ()
