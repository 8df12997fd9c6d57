"""A transformer prepared for distillation: what is trained of it, and at which budgets."""

from dataclasses import replace

from torch import nn

from elit.budgets import training_budgets
from elit.config import DistillConfig
from elit.elastic.families.family import Model
from elit.elastic.low_rank import add_low_rank
from elit.elastic.surgery import elastify


def prepare_student(network: Model, config: DistillConfig) -> None:
    """Adds interface and low-rank changes to a transformer, and lets gradients reach what is trained."""
    names = ("read_after", "write_after", "window", "mode", "seed")
    elastify(network, **{name: getattr(config, name) for name in names})
    if config.weights == "lora":
        add_low_rank(network, config.lora_rank, seed=config.seed)
    for module in network.modules():  # the teacher drops nothing, and a resumed run repeats itself
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout_prob"):  # DiT's labels
            module.dropout_prob = 0.0
    network.requires_grad_(config.weights == "all")
    network.elastic.requires_grad_()
    network.elastic_record = replace(
        network.elastic_record,
        lora_rank=config.lora_rank if config.weights == "lora" else 0,
        original_at_full=config.weights != "all",
        base=config.pipeline,
    )


def student_budgets(network: Model, config: DistillConfig) -> tuple[int, ...]:
    """The budgets that steps draw from. Raises ValueError for full budget where the original runs there."""
    full = network.budgets[-1]
    highest = full - network.elastic_record.original_at_full if config.budget_max is None else config.budget_max
    if network.elastic_record.original_at_full and highest >= full:
        raise ValueError(f"budget_max must be at most {full - 1}, got {highest}: at full budget the original runs")
    return training_budgets(network.budgets, config.budget_min, highest)
