"""What a run starts from: the weights of a finished model, or its own checkpoint, also one of an older version."""

import argparse

import pytest
import torch

from fastvideo.models.sprites.pipeline import WEIGHTS_NAME, SpriteVideoModel, bundled_model
from fastvideo.training.checkpoint import CHECKPOINT_NAME, load_initial_weights
from fastvideo.training.cli import add_arguments, run
from fastvideo.training.config import TrainConfig
from fastvideo.training.curves import read_metrics
from fastvideo.training.trainer import RunOptions, Trainer

TINY = {
    "attention": "dense",
    "dim": 32,
    "head_size": 16,
    "num_layers": 1,
    "text_dim": 16,
    "num_frames": 4,
    "frame_size": 16,
    "num_sprites": 8,
    "max_steps": 6,
    "batch_size": 4,
    "warmup_steps": 2,
    "precision": "float32",
}


def trainer(folder, init=None, *, resume=False, **settings):
    options = RunOptions(folder, torch.device("cpu"), log_interval=2, eval_clips=4, resume=resume, initial_weights=init)
    return Trainer(TrainConfig(**{**TINY, **settings}), options)


def stop_at(job, step):
    """Leave the run as a kill after `step` steps would."""
    for index in range(step):
        job.train_step(index)
    job.finished_steps = step
    job.save_checkpoint()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 60 steps, whose loss is well below that of random weights."""
    folder = tmp_path_factory.mktemp("finished")
    settings = {"max_steps": 60, "batch_size": 8, "learning_rate": 5e-3, "ema_decay": 0.5, "warmup_steps": 5}
    return trainer(folder, **settings).run()


@pytest.fixture(scope="module")
def model(finished):
    return finished.options.folder / "model"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_starts_at_the_loss_of_the_model(tmp_path, finished, model, precision):
    job = trainer(tmp_path / "run", model, precision=precision, seed=3)
    stored = SpriteVideoModel.load(model)
    expected = {f"transformer.{name}": value for name, value in stored.transformer.state_dict().items()}
    expected |= {f"text_encoder.{name}": value for name, value in stored.text_encoder.state_dict().items()}
    assert set(expected) == set(job.weights.names)
    for name, master, average in zip(job.weights.names, job.weights.masters, job.weights.average, strict=True):
        assert torch.equal(master, expected[name]), name
        assert torch.equal(average, expected[name]), name
    job = trainer(tmp_path / "run", model, precision=precision)
    tolerance = 1e-3 if precision == "float32" else 2e-2  # the model's weights are rounded to 16 bits
    reached = finished.evaluate()["dense"]
    assert job.evaluate()["dense"] == pytest.approx(reached, rel=tolerance)
    # The trained weights start there too, not the averaged ones alone.
    batch = finished.source.batch(0)
    finished.weights.write(average=True)
    with torch.no_grad():
        found, wanted = (run.loss(batch, 0.0).mean().item() for run in (job, finished))
    finished.weights.write()
    assert found == pytest.approx(wanted, rel=tolerance)
    assert trainer(tmp_path / "random", precision=precision).evaluate()["dense"] > 1.3 * reached


def test_a_run_records_what_it_started_from(tmp_path, model):
    trainer(tmp_path / "run", str(model)).run()
    [found] = [line["initial_weights"] for line in read_metrics(tmp_path / "run") if line["kind"] == "config"]
    name, dash, digest = found.partition("-")
    assert (name, dash, len(digest)) == ("model", "-", 8)
    assert SpriteVideoModel.load(tmp_path / "run" / "model").notes["initial_weights"] == found
    # Other weights in a folder of the same name have another name.
    other = trainer(tmp_path / "next", tmp_path / "run" / "model")
    assert other.initial_weights.startswith("model-")
    assert other.initial_weights != found
    assert SpriteVideoModel.load(model).notes["initial_weights"] is None


def test_the_bundled_model_has_a_name(tmp_path):
    config = TrainConfig()
    for word in ("bundled", bundled_model()):
        modules = SpriteVideoModel.load(bundled_model())
        for parameter in (*modules.transformer.parameters(), *modules.text_encoder.parameters()):
            parameter.data.zero_()
        holder = torch.nn.ModuleDict({"transformer": modules.transformer, "text_encoder": modules.text_encoder})
        assert load_initial_weights(word, config, holder) == "bundled"
        expected = SpriteVideoModel.load(bundled_model())
        assert torch.equal(modules.transformer.proj_out.weight, expected.transformer.proj_out.weight)
        assert all(map(torch.equal, modules.text_encoder.parameters(), expected.text_encoder.parameters()))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_layers": 2}, r"num_layers \(it has 1, the run 2\)"),
        ({"text_dim": 32}, r"text_dim \(it has 16, the run 32\), text_encoder\.dim \(it has 16, the run 32\)"),
        ({"head_size": 32}, r"num_attention_heads \(it has 2, the run 1\), attention_head_dim \(it has 16, the run 32\)"),
        ({"num_frames": 2}, r"video_tyx \(it has \(4, 16, 16\), the run \(2, 16, 16\)\)"),
        ({"attention": "vsa"}, r"attention \(it has 'dense', the run 'vsa'\)"),
    ],
)
def test_a_model_of_other_sizes_is_refused(tmp_path, model, settings, reason):
    with pytest.raises(ValueError, match=reason):
        trainer(tmp_path / "run", model, **settings)


def test_the_bundled_model_is_no_start_of_a_dense_run(tmp_path):
    with pytest.raises(ValueError, match=r"attention \(it has 'vsa', the run 'dense'\)"):
        trainer(tmp_path, "bundled", **{name: getattr(TrainConfig, name) for name in TINY if name != "attention"})


def test_a_folder_without_a_model_is_refused(tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        trainer(tmp_path / "run", tmp_path / "nothing")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=WEIGHTS_NAME):
        trainer(tmp_path / "run", tmp_path / "half")


def test_a_run_from_a_model_resumes_exactly(tmp_path, model):
    whole = trainer(tmp_path / "whole", model).run()
    stop_at(trainer(tmp_path / "parts", model), 4)
    second = trainer(tmp_path / "parts", model, resume=True)
    assert second.finished_steps == 4
    second.run()
    pairs = [(whole.weights.masters, second.weights.masters), (whole.weights.average, second.weights.average)]
    for expected, resumed in pairs:
        assert all(map(torch.equal, expected, resumed))
    assert SpriteVideoModel.load(tmp_path / "parts" / "model").notes["initial_weights"] == whole.initial_weights


def test_a_run_resumes_only_with_the_start_it_had(tmp_path, model):
    stop_at(trainer(tmp_path / "from_model", model), 1)
    with pytest.raises(ValueError, match=r"initial_weights \(was 'model-[0-9a-f]{8}', is None\)"):
        trainer(tmp_path / "from_model", resume=True)
    stop_at(trainer(tmp_path / "from_random"), 1)
    with pytest.raises(ValueError, match=r"initial_weights \(was None, is 'model-[0-9a-f]{8}'\)"):
        trainer(tmp_path / "from_random", model, resume=True)


def test_a_checkpoint_of_before_these_settings_resumes(tmp_path):
    stop_at(trainer(tmp_path), 2)
    path = tmp_path / CHECKPOINT_NAME
    state = torch.load(path, weights_only=True)
    del state["initial_weights"], state["config"]["two_sprite_share"]
    torch.save(state, path)
    assert trainer(tmp_path, resume=True).finished_steps == 2
    with pytest.raises(ValueError, match=r"two_sprite_share \(was 0\.5, is 0\.75\)"):
        trainer(tmp_path, resume=True, two_sprite_share=0.75)


def test_the_verb_hands_its_options_on(tmp_path, model):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    where = [f"--out={tmp_path}", "--device=cpu", "--eval-clips=2", f"--init={model}", "--two-sprite-share=1"]
    assert run(parser.parse_args([*where, *words])) == 0
    [config] = [line for line in read_metrics(tmp_path) if line["kind"] == "config"]
    assert config["initial_weights"].startswith("model-")
    assert config["two_sprite_share"] == 1.0
    state = torch.load(tmp_path / CHECKPOINT_NAME, weights_only=True)
    assert state["initial_weights"] == config["initial_weights"]


def test_a_folder_without_a_model_is_refused_by_what_it_lacks(tmp_path) -> None:
    module = torch.nn.ModuleDict()
    with pytest.raises(FileNotFoundError, match=r"nowhere/\S+ is missing: give a folder that `fastvideo train` wrote"):
        load_initial_weights(tmp_path / "nowhere", TrainConfig(), module)
