"""Muon's arithmetic, the master weights and the grouping of parameters."""

import pytest
import torch
from torch import nn

from fastvideo.models.text import WordEncoder
from fastvideo.models.wan import WanTransformer3DModel
from fastvideo.training.config import TrainConfig
from fastvideo.training.optim import MasterWeights, Muon, build_optimizers, orthogonalize, set_learning_rates


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_orthogonalised_matrices_keep_their_singular_vectors_and_get_values_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, generator=generator) * 100
    result = orthogonalize(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    core = left.mT @ result @ right.mT
    diagonal = core.diagonal(dim1=1, dim2=2)
    assert 0.5 < diagonal.min() < diagonal.max() < 1.4
    torch.testing.assert_close(core, torch.diag_embed(diagonal), atol=1e-3, rtol=0)


def test_muon_updates_each_matrix_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 8, generator=generator) for _ in range(2)]
    gradients = [[torch.randn(4, 8, generator=generator) for _ in range(2)] for _ in range(3)]
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.5)
    momenta = [torch.zeros(4, 8) for _ in weights]
    for step_gradients in gradients:
        for i, gradient in enumerate(step_gradients):
            parameters[i].grad = gradient.clone()
            momenta[i] = 0.9 * momenta[i] + 0.1 * gradient
            ahead = 0.1 * gradient + 0.9 * momenta[i]
            weights[i] = weights[i] * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 8**0.5 * orthogonalize(ahead[None])[0]
        optimizer.step()
    for parameter, weight in zip(parameters, weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="got a parameter of shape"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_masters_collect_what_narrow_weights_would_round_away():
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    weights = MasterWeights(layer)
    for _ in range(8):
        layer.weight.grad = torch.ones_like(layer.weight)
        weights.take_gradients()
        assert layer.weight.grad is None
        with torch.no_grad():
            weights.masters[0].sub_(weights.masters[0].grad, alpha=2**-10)
        weights.update_average(0.5)
        weights.write()
    assert weights.masters[0].item() == 1 - 2**-7
    assert layer.weight.item() == 1 - 2**-7
    weights.write(average=True)
    average = 1.0
    for i in range(1, 9):
        average = 0.5 * average + 0.5 * (1 - i * 2**-10)
    assert weights.average[0].item() == pytest.approx(average, abs=1e-6)
    assert layer.weight.item() == torch.tensor(average).bfloat16().item()


def test_every_parameter_has_one_optimizer_and_muon_gets_the_matrices_of_blocks():
    config = TrainConfig(dim=16, head_size=16, num_layers=2, text_dim=16)
    module = nn.ModuleDict(
        {
            "transformer": WanTransformer3DModel(config.transformer_config()),
            "text_encoder": WordEncoder(config.text_config()),
        }
    )
    weights = MasterWeights(module)
    optimizers = build_optimizers(config, weights)
    names = {id(master): name for name, master in zip(weights.names, weights.masters, strict=True)}
    grouped = [names[id(p)] for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(weights.names)
    muon = [names[id(p)] for g in optimizers[1].param_groups for p in g["params"]]
    # Four projections of each attention, the gate and two feed-forward layers.
    assert len(muon) == 2 * 11
    assert all("blocks." in name and name.endswith(".weight") for name in muon)
    undecayed = {names[id(p)] for p in optimizers[0].param_groups[1]["params"]}
    assert {"transformer.scale_shift_table", "text_encoder.token_embedding.weight"} <= undecayed
    set_learning_rates(optimizers, 0.5)
    assert optimizers[0].param_groups[0]["lr"] == config.learning_rate / 2
    assert optimizers[1].param_groups[0]["lr"] == config.muon_learning_rate / 2
