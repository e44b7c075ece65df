"""Losses of preference optimisation: pure functions of log-probabilities of whole responses.

Those of DPO and SimPO are the losses of reward models (`rewards.losses`, `rewards.rankings`) at other rewards.

Shapes: R responses, C comparisons of two of them.
"""

import torch
from torch import Tensor


def ipo_loss(difference: Tensor, beta: float, preference: Tensor) -> Tensor:
    """Squared distance of a difference of log-ratios from where a preference should be, ½/β.

        p (h - 1/(2β))² + (1 - p) (h + 1/(2β))²         Azar et al. 2023, "A General Theoretical Paradigm", eq. 17

    Args:
        difference: h `[C]`, log(π(c)/π_ref(c)) - log(π(r)/π_ref(r)) of chosen and rejected response, in nats.
        beta: β, the paper's τ: strength of the KL penalty.
        preference: p `[C]`, the probability that the label is right; ½ for a tie.

    Returns:
        Losses `[C]`, in nats².
    """
    target = 1 / (2 * beta)
    return preference * (difference - target).square() + (1 - preference) * (difference + target).square()


def kto_loss(log_ratios: Tensor, desirable: Tensor, kl: float, beta: float, weights: tuple[float, float]) -> Tensor:
    """Loss of single responses, good or bad: a value function around the KL, in which losses loom as gains do.

        λ_D (1 - σ(β (r - z))) of a desirable response, λ_U (1 - σ(β (z - r))) of another
                                                                        Ethayarajh et al. 2024, "KTO", eq. 8

    Args:
        log_ratios: r `[R]`, log(π(y|x)/π_ref(y|x)), in nats.
        desirable: `[R]` bool.
        kl: z, an estimate of the KL of the policy to the reference, not negative, in nats; without a gradient.
        beta: β, how fast the value saturates.
        weights: λ_D and λ_U, those of desirable and of other responses.

    Returns:
        Losses `[R]`, from 0 to λ.
    """
    gain = beta * (log_ratios - kl)  # [R]
    for_desirable, for_others = weights
    return torch.where(desirable, for_desirable * torch.sigmoid(-gain), for_others * torch.sigmoid(gain))
