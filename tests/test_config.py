"""Settings: round trip, YAML as people write it, refusals."""

import pytest

from elit.config import ModelConfig, TrainConfig, load_config, save_config
from elit.files import write_text


def test_round_trip(tmp_path):
    model = ModelConfig(name="DiT-B/2", window=(4, 4), split=(1, 2, 1))
    config = TrainConfig(steps=5, learning_rate=2e-3, budget_min=2, trackers=("tensorboard", "wandb"), model=model)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_yaml_as_written_by_hand(tmp_path):
    write_text(tmp_path / "c.yaml", "steps: 7\nlearning_rate: 1e-3\nmodel:\n  name: DiT-S/1\n  window: [2, 2]\n")
    config = load_config(tmp_path / "c.yaml")
    assert (config.steps, config.learning_rate, config.model.window) == (7, 1e-3, (2, 2))
    write_text(tmp_path / "c.yaml", "")
    assert load_config(tmp_path / "c.yaml") == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 7", "unknown field 'stepz'"),
        ("model: {nam: x}", "model: unknown field 'nam'"),
        ("model: 3", "must be `field: value` lines"),
        ("steps: true", "steps must be int, got True"),
        ("learning_rate: fast", "learning_rate must be float, got 'fast'"),
        ("resume: 1", "resume must be bool, got 1"),
        ("steps: 0", "steps must be at least 1, got 0"),
        ("seed: 9223372036854775808", "seed must be at most 9223372036854775807, got 9223372036854775808"),
        *((f"{name}: -0.1", f"{name} must be") for name in ("learning_rate", "class_dropout", "time_shift")),
        *((f"{name}: -1", f"{name} must be") for name in ("batch_size", "warmup_steps", "image_size")),
        ("ema_decay: 1.0", "ema_decay must be"),
        ("{batch_size: 10, gradient_accumulation: 4}", "batch_size must be a multiple of gradient_accumulation=4, got"),
        ("steps: [", "not YAML"),
        ("\x89PNG\0", "not YAML"),
        ("steps: 1\nseed: 0\nsteps: 2", "'steps' is there twice"),
        ("precision: fp8", "precision must be .*'fp32', 'bf16'., got 'fp8'"),
        ("model: {window: 4}", "model: window must be tuple.int, .* None, got 4"),
        ("budget_min: half", "budget_min must be int . None, got 'half'"),
        ("trackers: [wandbb]", "trackers must be any of tensorboard, wandb, trackio, got 'wandbb'"),
        ("trackers: wandb", "trackers must be tuple.str, .*, got 'wandb'"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    write_text(tmp_path / "c.yaml", text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match="no such file"):
        load_config(tmp_path / "missing.yaml")
