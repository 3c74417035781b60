"""The schedules and settings of a run."""

import itertools
import json

import pytest

from fastvideo.training.config import TrainConfig


def test_the_configuration_survives_json():
    config = TrainConfig(attention="dense", sparsity_levels=(0.0, 0.5), num_sprites=4)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_configuration_from_before_a_field_has_its_default():
    older = TrainConfig(max_steps=9).to_dict()
    del older["two_sprite_share"]
    assert TrainConfig.from_dict(older) == TrainConfig(max_steps=9, two_sprite_share=0.5)
    with pytest.raises(ValueError, match=r"no fields \['wings'\]"):
        TrainConfig.from_dict({"wings": 2})


def test_the_learning_rate_warms_up_and_falls():
    config = TrainConfig(max_steps=200, warmup_steps=10, final_learning_rate=0.1)
    rates = [config.learning_rate_at(step) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[105] == pytest.approx(0.55)
    assert rates[199] == pytest.approx(0.1, abs=1e-3)
    assert all(later <= sooner for sooner, later in itertools.pairwise(rates[10:]))


def test_sparsity_rises_in_steps_and_returns_to_dense_at_intervals():
    config = TrainConfig(max_steps=100, sparsity_ramp=0.6, dense_interval=10)
    levels = [config.sparsity_at(step) for step in range(100)]
    assert levels[:20] == [0.0] * 20
    assert set(levels[21:40]) - {0.0} == {0.25}
    assert set(levels[41:60]) - {0.0} == {0.5}
    assert set(levels[60:]) == {0.0, 0.75}
    assert levels[60:].count(0.0) == 4
    assert [TrainConfig(attention="dense").sparsity_at(step) for step in (0, 2000)] == [0.0, 0.0]


def test_the_bundled_model_stays_below_20_megabytes_in_16_bits():
    from fastvideo.models.text import WordEncoder
    from fastvideo.models.wan import WanTransformer3DModel

    config = TrainConfig()
    modules = (WanTransformer3DModel(config.transformer_config()), WordEncoder(config.text_config()))
    numbers = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert 7e6 < numbers < 1e7


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dim": 100}, "head_size must divide dim"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"two_sprite_share": 1.5}, r"two_sprite_share must lie in \[0, 1\], got 1.5"),
        ({"two_sprite_share": -0.1}, "two_sprite_share"),
        ({"text_dropout": 1.5}, "text_dropout must lie in"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"sparsity_levels": (0.0, 1.0)}, "sparsity_levels"),
        ({"frame_size": 30}, "multiple of the patch edge"),
    ],
)
def test_settings_out_of_range_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        TrainConfig(**settings)
