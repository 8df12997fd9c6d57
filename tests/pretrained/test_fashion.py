"""The model in the box: there at once, by name, with its classes, its detector and its statistics."""

import json

import pytest
import torch

import elit
from elit.config import load_config
from elit.data.builtin import FASHION_CLASSES, FASHION_MNIST, fashion_mnist
from elit.evaluate.detectors import FashionDetector
from elit.evaluate.reference import FASHION_REFERENCE, load_reference
from elit.pretrained import HERE, measurements_folder, model_folder

BOX = HERE / "fashion"
COMMANDS = "sample", "evaluate", "sweep"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, empty_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_it_is_small_and_has_the_papers_topology():
    model = elit.load_model("fashion")
    assert sum(file.stat().st_size for file in BOX.glob("*.safetensors")) <= 12 * 2**20
    assert sum(file.stat().st_size for file in BOX.rglob("*") if file.is_file()) <= 15 * 2**20
    assert (model.token_grid(model.sample_size), model.window(model.sample_size)) == ((16, 16), (4, 4))
    assert model.budgets == tuple(range(1, 17))
    assert tuple(model.config.class_names) == FASHION_CLASSES
    assert "_name_or_path" not in json.loads((BOX / "config.json").read_text())


def test_a_folder_of_that_name_comes_first(tmp_path):
    assert model_folder("fashion") == BOX
    (tmp_path / "fashion").mkdir()
    assert str(model_folder("fashion")) == "fashion"
    with pytest.raises(ValueError, match="must be a folder that save_pretrained wrote"):
        elit.load_model("fashion")


def test_what_is_measured_of_it_does_not_go_into_the_package(tmp_path):
    assert measurements_folder(BOX) == tmp_path / "cache" / "elit" / "fashion"
    assert measurements_folder(tmp_path / "run") == tmp_path / "run"


def test_classes_go_by_name_at_any_budget(run, tmp_path):
    line = "sample fashion --labels Sneaker ankle-boot 8 --budget 25% --steps 2 --out out.npz --json"
    assert json.loads(run(*line.split())[1].splitlines()[-1])["count"] == 3
    line = "sample fashion --labels 7 9 bag --budget 4 --steps 2 --out again.npz"
    assert run(*line.split())[0] == 0
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample fashion --labels sneeker", "got 'sneeker'; did you mean 'sneaker'?"),
        *((f"{each} fashion --labels 3 99", "labels must be classes of this model, got '99'") for each in COMMANDS),
    ],
)
def test_a_class_that_is_not_there_is_refused(run, line, message):
    code, _, error = run(*line.split())
    assert (code, message in error, error.count("\n")) == (2, True, 1)


@pytest.mark.slow
def test_its_samples_at_a_quarter_of_the_latents_are_recognised():
    """Ten samples are few: the card has the figure for thousands. This is that the weights are trained ones."""
    model, detector = elit.load_model("fashion"), FashionDetector()
    labels = torch.arange(10)
    images = elit.sample(model, labels, steps=4, budget=0.25, guidance=elit.CCFG(2.0, 1))
    assert (detector(images.clamp(-1, 1)).label == labels).float().mean() >= 0.6


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_detector_is_right_on_92_percent_of_the_test_pictures():
    """Takes all 10,000 by their features, as kept in the statistics; some features are computed anew."""
    detector, data = FashionDetector(), fashion_mnist("test")
    reference = load_reference(FASHION_REFERENCE, detector)
    features = reference.tensors["features"]
    assert len(features) == reference.origin["count"] == len(data) == 10_000
    assert (detector.classifier.head(features).argmax(1) == data.labels).float().mean() >= 0.92
    some = list(range(0, 10_000, 100))
    torch.testing.assert_close(features[some], detector(data.__getitems__(some)[0]).features, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_sweep_of_it_needs_no_data_and_writes_nothing_into_the_package(run, tmp_path):
    before = sorted((path, path.stat().st_mtime_ns) for path in BOX.rglob("*"))
    line = "sweep fashion --reference fashion-mnist --detector fashion-mnist --budgets 25% --steps 1 --guidance none"
    result = json.loads(run(*f"{line} --count 4 --chunk 4 --out out --json".split())[1].splitlines()[-1])
    assert result["quality"] == "fd"
    assert sorted((path, path.stat().st_mtime_ns) for path in BOX.rglob("*")) == before
    assert (tmp_path / "cache" / "elit" / "fashion" / "README.md").is_file()


def test_the_log_is_of_the_recipe():
    log = [json.loads(line) for line in (BOX / "training-log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log[:200]] == list(range(1, 201))
    recipe = load_config(BOX.parents[3] / "recipes" / "fashion-mnist" / "elit-dit.yaml")
    assert (recipe.budget_min, recipe.budget_max) == (1, 16)
    assert {row["budget"] for row in log} <= set(range(1, 17))
