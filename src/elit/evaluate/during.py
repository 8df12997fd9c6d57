"""Scores of a run's averaged weights while it trains: in its scores.jsonl, its trackers, and a curve, scores.png."""

import json
import shutil
from pathlib import Path

from accelerate import PartialState

from elit.budgets import resolve_budget
from elit.config import TrainConfig
from elit.data.encode import load_encoder
from elit.data.images import LatentSet
from elit.evaluate.chunks import Work
from elit.evaluate.detectors import default_detector, open_detector
from elit.evaluate.inspect.attention import Probe, losses
from elit.evaluate.metrics import METRICS
from elit.evaluate.plots import new_figure, quality_label
from elit.evaluate.reference import open_reference
from elit.evaluate.samples import Sampler
from elit.evaluate.score import MetricGroup, score
from elit.files import Json
from elit.models.transformer import Transformer
from elit.sampling.settings import Sampling
from elit.training import train as training
from elit.training.logger import SCORES, RunLog

VALIDATED, LOSS = 64, "validation_loss"  # most held-out samples behind a loss, each at every time of a probe
WANTED = ("fid", "fdd", "fvd", "fd", "accuracy")


def train(config: TrainConfig) -> Transformer:
    """Trains as `elit.training.train` does, with scores where `score_every` asks for them."""
    return training.train(config, RunScores)


class RunScores:
    """The scores of a run; all processes sample and detect together. The reference is measured once and kept."""

    def __init__(self, task: training.TrainNetwork):
        config, data = task.config, task.data
        self.config, self.conditions, self.vae, self.probe = config, task.prompts, None, None
        self.device = device = PartialState().device
        self.work = Work(out=Path(config.out) / "scores", state=PartialState())
        if len(task.held_out):
            rows = task.held_out[:: -(-len(task.held_out) // VALIDATED)].tolist()
            x, y = task.examples.__getitems__(rows)
            x = x[:, 0] if isinstance(data, LatentSet) else x  # the means
            self.probe = Probe(x=x, y=y, draws=1, seed=config.seed)
        if not config.score_samples:
            return
        name = config.score_detector or default_detector(config.data)
        reference, size = config.score_reference or config.data, data.shape[-1]
        if isinstance(data, LatentSet):
            if config.score_reference is None:
                raise ValueError("score_reference must be given: the data are latents, not pictures")
            size = data.settings["image_size"]
            self.vae = load_encoder(data.settings["vae"], data.settings["vae_subfolder"], device=device)
        detector = open_detector(name, device=device)
        options = {"image_size": size, "skip_unreadable": config.skip_unreadable}
        real = open_reference(Path(reference), detector, self.work, **options)
        self.group = MetricGroup(name, detector, real, tuple(each for each in detector.offers if each in WANTED))

    def __call__(self, network: Transformer, log: RunLog, step: int) -> None:
        shares = (None, 0.25) if network.budgets else (None,)
        budgets = dict.fromkeys(resolve_budget(share, network.budgets) for share in shares)
        network.to(self.device)
        rows: list[Json] = [{"budget": budget} for budget in budgets]
        if self.probe is not None:
            rows = [row | {LOSS: losses(network, self.probe, row["budget"]).mean().item()} for row in rows]
        if self.config.score_samples:
            sampler = Sampler(network, self.work, vae=self.vae, conditions=self.conditions)
            samples = [sampler.make(Sampling(budget=budget), self.config.score_samples) for budget in budgets]
            for row, each in zip(rows, samples, strict=True):
                result = score(each, self.group, self.work)
                row |= result.scores if result else {}
        if self.work.main:
            log.scores(rows, step)
            plot_scores(log.out)
            for name in ("sets", "features", "scores"):  # a network of the past is not scored again
                shutil.rmtree(self.work.out / name, ignore_errors=True)


def plot_scores(out: Path) -> None:
    """A panel a metric, a line a budget, over the steps of the run."""
    rows = [json.loads(line) for line in (out / SCORES).read_text(encoding="utf-8").splitlines()]
    metrics = [name for name in rows[0] if name in (LOSS, *METRICS)]
    budgets = dict.fromkeys(row["budget"] for row in rows)
    with new_figure(out / "scores.png", 5.0 * len(metrics), 3.6) as figure:
        for ax, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            for budget in budgets:
                line = [(row["step"], row[metric]) for row in rows if row["budget"] == budget]
                ax.plot(*zip(*line, strict=True), marker="o", label=f"{budget or 'all'} latent{'s' * (budget != 1)}")
            ax.set(xlabel="step", ylabel="validation loss" if metric == LOSS else quality_label(metric))
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
