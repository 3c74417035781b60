"""The word encoder: values, gradients, errors and the round trip of its configuration."""

import copy

import pytest
import torch

from fastvideo.models.sprites.prompts import MAX_TOKENS, VOCABULARY, tokenize
from fastvideo.models.text import WordEncoder, WordEncoderConfig


def encoder(num_layers=1, dim=32):
    torch.manual_seed(0)
    return WordEncoder(WordEncoderConfig(len(VOCABULARY), MAX_TOKENS, dim=dim, num_heads=2, num_layers=num_layers))


def eager_layer(layer, x):
    """The layer's arithmetic with torch alone."""
    batch, length, dim = x.shape
    normed = torch.nn.functional.layer_norm(x, (dim,), layer.norm1.weight, layer.norm1.bias)
    query, key, value = (
        part.view(batch, length, 2, dim // 2).transpose(1, 2) for part in layer.to_qkv(normed).split(dim, dim=-1)
    )
    scores = (query @ key.transpose(-1, -2)) * (dim // 2) ** -0.5
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, dim)
    x = x + layer.to_out(mixed)
    normed = torch.nn.functional.layer_norm(x, (dim,), layer.norm2.weight, layer.norm2.bias)
    return x + layer.narrow(torch.nn.functional.gelu(layer.widen(normed), approximate="tanh"))


@pytest.mark.parametrize("num_layers", [0, 2])
def test_it_equals_its_arithmetic(num_layers):
    model = encoder(num_layers).double()
    ids = tokenize(["heart moving left, tree moving up", "pig moving down", None])
    x = model.token_embedding(ids) + model.slot_embedding.weight
    for layer in model.layers:
        x = eager_layer(layer, x)
    torch.testing.assert_close(model(ids), model.norm(x))


def test_swapped_clauses_and_directions_have_other_embeddings():
    model = encoder()
    first, swapped, exchanged = model(
        tokenize(
            [
                "heart moving left, tree moving up",
                "tree moving up, heart moving left",
                "heart moving up, tree moving left",
            ]
        )
    )
    assert (first - swapped).abs().max() > 0.1
    assert (first - exchanged).abs().max() > 0.1


def test_every_parameter_gets_a_gradient():
    model = encoder()
    ids = torch.arange(len(VOCABULARY) // MAX_TOKENS * MAX_TOKENS).view(-1, MAX_TOKENS)
    weights = torch.randn(len(ids), MAX_TOKENS, 32)
    (model(ids) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_the_state_holds_parameters_only_and_copies_agree():
    model = encoder()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    ids = tokenize(["pig moving down"])
    torch.testing.assert_close(copy.deepcopy(model)(ids), model(ids), rtol=0, atol=0)


def test_wrong_tokens_are_refused():
    with pytest.raises(ValueError, match=r"integers \[B, 7\], got \(1, 3\)"):
        encoder()(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"of torch\.float32"):
        encoder()(torch.zeros(1, 7))


def test_the_configuration_survives_its_dictionary_and_refuses_nonsense():
    config = WordEncoderConfig(9, 7, dim=48, num_heads=3, num_layers=2)
    assert WordEncoderConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"no fields \['depth'\]"):
        WordEncoderConfig.from_dict({**config.to_dict(), "depth": 1})
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        WordEncoderConfig(9, 7, dim=10, num_heads=3)
    with pytest.raises(ValueError, match="vocab_size must be at least 1"):
        WordEncoderConfig(0, 7)
