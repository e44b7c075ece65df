"""AdaMix in SFT: random routes, the consistency loss, and the average that is kept."""

from pathlib import Path

import pytest
import torch

from align.learner.likelihood import collate_demonstrations, likelihood_objective
from align.roles.build import SFT_ROLE
from align.supervised.learner import SupervisedLearner
from align.supervised.sft_objective import SftObjective
from policies.logprobs import symmetric_divergence
from policies.schema import PolicySettings
from rewards.schema import FitSettings
from tests.align.supervised.small import demonstrations, sft_blueprint
from tests.policies.gradients import flat_gradients

POLICY = PolicySettings(method="adamix", bottleneck=4, experts=3)
CPU = torch.device("cpu")


def moved_objective(model: Path) -> SftObjective:
    """An objective whose experts all differ."""
    objective = sft_blueprint(model, POLICY).build()
    generator = torch.Generator().manual_seed(0)
    mixtures = objective.module.trunk.encoder(SFT_ROLE)
    assert mixtures is not None
    for parameter in mixtures.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    objective.module.train()
    return objective


def test_the_divergence_is_half_the_sum_of_both_kl_divergences() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 7, generator=generator)
    p, q = (torch.log_softmax(states.double(), dim=-1) for states in (first, second))
    expected = 0.5 * ((p.exp() * (p - q)).sum(-1) + (q.exp() * (q - p)).sum(-1))
    divergence = symmetric_divergence(first, second, lambda states: states)
    torch.testing.assert_close(divergence, expected.float())


def test_the_loss_is_that_of_the_first_route_and_the_divergence_of_both(tiny_model: Path) -> None:
    objective = moved_objective(tiny_model)
    module = objective.module
    trunk = module.trunk
    (batch,) = collate_demonstrations(demonstrations(3), CPU)
    trunk.start_step(SFT_ROLE, progress=0.5, seed=1)
    loss, statistics = objective.loss(module, batch, None)
    logprobs = []
    for route in range(2):
        trunk.take_route(SFT_ROLE, route)
        states = trunk.hidden_packed(batch.ids, batch.lengths, SFT_ROLE)[batch.predictors]
        logprobs.append(torch.log_softmax(trunk.head(states, SFT_ROLE).double(), dim=-1))
    first, second = logprobs
    likelihood = first.gather(1, batch.response_ids.unsqueeze(1)).sum()
    divergence = 0.5 * ((first.exp() - second.exp()) * (first - second)).sum()
    assert divergence > 0.1
    torch.testing.assert_close(statistics.double(), -likelihood[None], rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), divergence - likelihood, rtol=1e-5, atol=0)


def test_routes_change_with_the_step_and_not_with_the_microbatch(tiny_model: Path) -> None:
    objective = moved_objective(tiny_model)
    module = objective.module
    (batch,) = collate_demonstrations(demonstrations(3), CPU)

    def loss(seed: int) -> float:
        module.trunk.start_step(SFT_ROLE, progress=0.5, seed=seed)
        return float(objective.loss(module, batch, None)[0].detach())

    losses = {seed: loss(seed) for seed in range(4)}
    assert len(set(losses.values())) == 4
    assert losses == {seed: loss(seed) for seed in range(4)}


def test_recomputed_activations_are_of_their_own_route(tiny_model: Path) -> None:
    gradients = []
    for recomputes in (False, True):
        objective = moved_objective(tiny_model)
        module = objective.module
        if recomputes:
            module.trunk.enable_gradient_checkpointing()
        module.trunk.start_step(SFT_ROLE, progress=0.5, seed=2)
        (batch,) = collate_demonstrations(demonstrations(3), CPU)
        objective.loss(module, batch, None)[0].backward()
        mixtures = module.trunk.encoder(SFT_ROLE)
        assert mixtures is not None
        gradients.append(flat_gradients(mixtures.parameters()))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("process_group")
def test_the_product_is_the_average_that_is_evaluated(tiny_model: Path) -> None:
    learner = SupervisedLearner(moved_objective(tiny_model), FitSettings(batch_size=2), zero=0, seed=0)
    for step in range(2):
        learner.train([step, step + 2], step, 1.0)
    module = learner.objective.module
    heldout = learner.heldout_metrics()["heldout_loss"]
    adapter = learner.product().adapters[SFT_ROLE]
    learner.close()
    module.trunk.write_adapter(SFT_ROLE, adapter)
    assert module.trunk.encoder(SFT_ROLE) is None
    (batch,) = collate_demonstrations(learner.objective.heldout, CPU)
    loss, _ = likelihood_objective(module, batch, SFT_ROLE)
    assert heldout == pytest.approx(
        float(loss.detach()) / learner.objective.weight(learner.objective.heldout), rel=1e-5
    )
