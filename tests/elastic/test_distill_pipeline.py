"""elit distill on stock pipelines of tiny random parts, by prompts and by pictures."""

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import filter_repo_objects
from parts import PIPELINES as STOCK
from PIL import Image
from prompts import with_prompts
from safetensors.torch import load_file
from tiny import PIPELINES, pipeline, with_text

import elit
from elit.cli.main import main
from elit.config import DistillConfig
from elit.elastic import captioned_images
from elit.elastic.captioned_images import CaptionedImages
from elit.elastic.distill import DistillPipeline, distill
from elit.elastic.pipelines import RecordedCalls, Requests, first_call, layout_of
from elit.evaluate.tables import write_card

pytestmark = pytest.mark.slow

GUIDED = ("guidance_scale=3.0", "negative_prompt=none")
VIDEO = ("num_frames=5", *GUIDED)
CALLS = {
    "QwenImagePipeline": ("true_cfg_scale=3.0", "negative_prompt=none"),
    "FluxPipeline": ("max_sequence_length=5",),
    "StableDiffusion3Pipeline": GUIDED,
    "DiTPipeline": ("guidance_scale=3.0",),
    "ChromaPipeline": GUIDED,
    "ZImagePipeline": GUIDED,
    "Lumina2Pipeline": GUIDED,
    "PixArtAlphaPipeline": (*GUIDED, "use_resolution_binning=False"),
    "WanPipeline": VIDEO,
    "CogVideoXPipeline": VIDEO,
    "LTX2Pipeline": VIDEO,
    "HunyuanVideo15Pipeline": ("num_frames=5", "negative_prompt=none"),
}


def made(name):
    return with_text(name) if name in PIPELINES else with_prompts(STOCK[name].make())


def settings(out, name, prompts=None, **changes):
    sizes = () if name == "DiTPipeline" else ("32x32",) if name in (*PIPELINES, "LTX2Pipeline") else ("64x64",)
    given = {"pipeline": f"tiny/{name}", "prompts": prompts and str(prompts), "sizes": sizes, "call": CALLS[name]}
    given |= {"steps": 2, "batch_size": 2, "teacher_steps": 2, "teacher_batch": 2, "preview_every": 2, "lora_rank": 2}
    given |= {"read_after": 1, "write_after": 3, "preview_prompts": 1, "trackers": (), "learning_rate": 1e-2}
    if name in PIPELINES:
        given["window"] = (2, 2)
    if any(each.startswith("num_frames") for each in CALLS[name]):
        given["teacher_steps"] = 1  # clips take a while
    return DistillConfig(out=str(out), **given | {"warmup_steps": 1} | changes)


def on_pictures(out, name, data, **changes):
    sizes = () if name == "DiTPipeline" else ("32x32", "32x64")
    given = {"data": str(data), "sizes": sizes, "window": (2, 2), "prompt_dropout": 0.25}
    return settings(out, name, **given | changes)


@pytest.fixture
def tiny_pipelines(monkeypatch):
    monkeypatch.setattr(
        "elit.elastic.distill.load_pipeline", lambda config, device: made(config.pipeline.removeprefix("tiny/"))
    )


@pytest.fixture
def prompts(tmp_path, tiny_pipelines):
    path = tmp_path / "prompts.txt"
    path.write_text("a boat\n\na tree\na cat\n")
    return path


@pytest.fixture
def folder(tmp_path, tiny_pipelines):
    (tmp_path / "pictures").mkdir()
    lines = []
    for number in range(6):
        size = (40, 40, 3) if number % 2 else (30, 64, 3)
        pixels = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(number)).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "pictures" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": ("a boat", "a tree", "a cat")[number % 3]}))
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "pictures"


@pytest.mark.parametrize("name", CALLS)
def test_two_steps_a_picture_and_three_budgets_in_a_fresh_pipeline(tmp_path, prompts, name):
    prompts.write_text("7\n8\n9\n" if name == "DiTPipeline" else "a boat\n\na tree\n")
    config = settings(tmp_path / "out", name, prompts)
    result = distill(config)
    assert result["validation"][0]["share"] == 1
    distances = [row["distance"] for row in result["validation"]]
    assert distances[0] < 1e-4 < distances[-1]  # at full budget the original runs
    gflops, faster = ([row[name] for row in result["validation"]] for name in ("gflops", "faster"))
    assert gflops[1:] == sorted(gflops[1:], reverse=True)
    assert (faster[0], all(row["ms"] > 0 for row in result["validation"])) == (1, True)
    write_card(config, result["validation"])
    assert "share | GFLOPs a forward | ms a forward | faster | dist" in (tmp_path / "out" / "README.md").read_text()
    assert ("picture_distance_ccfg" in result["validation"][0]) == any("negative" in each for each in config.call)
    Image.open(tmp_path / "out" / "samples" / "step-00000002.png").verify()

    pipe = made(name)
    kind = "pt" if name == "DiTPipeline" else "latent"
    request = Requests(pipe, config, prompts.read_text().split("\n")[:1]).validation(output_type=kind)

    def sampled():
        output = pipe(**request | {"generator": torch.Generator().manual_seed(0)})
        return output.images if hasattr(output, "images") else output.frames

    right = sampled()
    assert elit.load_elastic(pipe, tmp_path / "out") is pipe
    for budget in (None, 0.25):
        with elit.budget(budget):
            images = sampled()
        assert images.isfinite().all()
        assert torch.equal(images, right) == (budget is None)


def test_a_resumed_run_is_bit_equal_and_records_nothing_anew(tmp_path, prompts, monkeypatch):
    name, more = "QwenImagePipeline", {"steps": 6, "checkpoint_every": 2, "preview_every": 0, "log_every": 1}
    more |= {"ema_more": (0.5,), "async_checkpoints": True}
    distill(settings(tmp_path / "whole", name, prompts, **more))
    calls = sorted((tmp_path / "whole" / "cache").rglob("calls/*.pt"))
    assert len(calls) == 2

    def stop(self, accelerator, average, log, step):
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(DistillPipeline, "preview", stop)
        with pytest.raises(SystemExit):
            distill(settings(tmp_path / "cut", name, prompts, **more | {"preview_every": 3}))
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.setattr("elit.elastic.distill.record_calls", None)  # all is on disk
    distill(settings(tmp_path / "cut", name, prompts, **more | {"resume": True}))
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    losses = [[json.loads(line)["loss"] for line in of_run] for of_run in lines]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    for file in ("elastic.safetensors", "model-ema-0.5/elastic.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline"])
def test_a_base_in_bfloat16_trains_in_full_precision(tmp_path, prompts, name, monkeypatch):
    """The interface stays in float32, and meets tokens in bfloat16."""

    def in_bfloat16(config, device):
        pipe = with_text(name).to(torch.bfloat16)
        encode = pipe.encode_prompt
        pipe.encode_prompt = lambda **given: tuple(
            part.bfloat16() if part.is_floating_point() else part for part in encode(**given)
        )
        return pipe

    monkeypatch.setattr("elit.elastic.distill.load_pipeline", in_bfloat16)
    result = distill(settings(tmp_path / "out", name, prompts, base_precision="bf16"))
    assert result["validation"][-1]["distance"] > 0


def test_a_run_that_cannot_train_records_nothing_and_validation_has_calls_of_its_own(tmp_path, prompts, monkeypatch):
    def finish(self, *inputs):
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    with monkeypatch.context() as patch:
        patch.setattr("elit.elastic.interface.ElasticInterface.finish", finish)
        with pytest.raises(RuntimeError, match="the same dtype"):
            distill(settings(tmp_path / "out", "FluxPipeline", prompts))
    assert not list((tmp_path / "out").rglob("calls"))
    distill(settings(tmp_path / "out", "FluxPipeline", prompts, preview_every=0))
    (held_out,) = (tmp_path / "out").rglob("held-out/*.pt")
    trained = RecordedCalls(next((tmp_path / "out").rglob("calls")))
    noise = torch.load(held_out)["calls"][0][0]["hidden_states"]
    assert all(not torch.equal(noise[:1], trained.__getitems__([i])[1].arguments["hidden_states"]) for i in range(3))


@pytest.mark.parametrize(
    ("made_of", "source", "precision"),
    [(settings, "prompts", "fp32"), (on_pictures, "folder", "fp32"), (on_pictures, "folder", "bf16")],
)
def test_all_weights_are_a_transformer_of_their_own(tmp_path, request, made_of, source, precision):
    given = {"weights": "all", "precision": precision, "preview_every": 0}
    distill(made_of(tmp_path / "out", "QwenImagePipeline", request.getfixturevalue(source), **given))
    pipe = with_text("QwenImagePipeline")
    before = pipe.transformer
    elit.load_elastic(pipe, tmp_path / "out")
    assert pipe.transformer is not before
    assert pipe.transformer.budgets == (1, 2, 3, 4)
    assert not torch.equal(pipe.transformer.proj_out.weight, before.proj_out.weight)


@pytest.mark.parametrize(
    ("made_of", "source", "weights"),
    [(settings, "prompts", "lora"), (settings, "prompts", "interface"), (on_pictures, "folder", "lora")],
)
def test_training_goes_on_from_an_add_on(tmp_path, request, made_of, source, weights):
    """Its weights come back from a step that changes nothing; its place and rank are its own."""
    given, common = request.getfixturevalue(source), {"weights": weights, "preview_every": 0}
    distill(made_of(tmp_path / "one", "FluxPipeline", given, **common))
    more = common | {"init": str(tmp_path / "one"), "steps": 1, "learning_rate": 1e-12, "read_after": None}
    distill(made_of(tmp_path / "two", "FluxPipeline", given, **more))
    one, two = (load_file(tmp_path / name / "elastic.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert one["latents"].any()
    assert json.loads((tmp_path / "two" / "elastic.json").read_text())["size"] == [32, 32]
    wrong = {"read_after": 2, "window": (4, 4)} | ({"lora_rank": 3} if weights == "lora" else {})
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"{name} must be .*, as init has it, got"):
            distill(made_of(tmp_path / "three", "FluxPipeline", given, **more | {name: value}))


def assert_refused(words, message, capsys):
    assert main(["distill", *words]) == 2, words
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1], error
    assert error[-1].startswith("elit distill: ")


def test_wrong_calls_are_one_line(tmp_path, capsys, monkeypatch):
    pipe, prompts, out = tmp_path / "flux", tmp_path / "prompts.txt", str(tmp_path / "out")
    pipeline("FluxPipeline").save_pretrained(pipe)

    def load(name, **kwargs):
        if name == str(pipe):
            return with_text("FluxPipeline")
        if name == str(tmp_path / "other"):
            return diffusers.DDPMPipeline(diffusers.UNet2DModel(8, 3, 3, block_out_channels=(32,) * 4), None)
        raise OSError("no file named model.safetensors")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)
    prompts.write_text("a boat\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("unet", "other"):
        (tmp_path / name).mkdir()
        shutil.copy(pipe / "model_index.json", tmp_path / name)
    (tmp_path / "addon").mkdir()
    good = ["--prompts", str(prompts)]
    for words, message in (
        ([], "pipeline must be given"),
        ([str(pipe), out], "prompts must be a text file"),
        ([str(pipe), out, "--prompts", str(tmp_path / "empty.txt")], "prompts must have a prompt a line"),
        ([str(pipe), out, "--prompts", str(tmp_path / "binary.txt")], "must be UTF-8"),
        ([str(tmp_path / "unet"), out, *good], "cannot load pipeline"),
        ([str(tmp_path / "other"), out, *good], "pipeline must have a transformer, got a DDPMPipeline"),
        ([str(pipe), out, *good, "--call", "prompt=x"], "call must name arguments of FluxPipeline"),
        ([str(pipe), out, *good, "--read-after", "9", "--write-after", "2"], "read_after and write_after must"),
        ([str(pipe), out, *good, "--window", "2", "2", "--budget-max", "4"], "<= budget_max <= 3, got 1 and 4"),
        ([str(pipe), out, *good, "--push-to-hub", "name"], "push_to_hub must be USER/NAME, got 'name'"),
    ):
        assert_refused(words, message, capsys)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"no elastic\.json in it"):
        elit.load_elastic(pipeline("FluxPipeline"), tmp_path / "addon")


def command(out, prompts, *, steps, preview_every):
    options = "--sizes 32x32 --window 2 2 --batch-size 2 --teacher-steps 1 --call max_sequence_length=5 --lora-rank 2"
    words = ["distill", "tiny/FluxPipeline", str(out), "--prompts", str(prompts), *options.split()]
    return [*words, "--steps", str(steps), "--preview-every", str(preview_every)]


def test_a_full_disk_and_other_settings_are_one_line(tmp_path, prompts, capsys, monkeypatch):
    words = command(tmp_path / "out", prompts, steps=2, preview_every=0)

    def full(*args):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        assert main(words) == 1
    assert "file write failed; make room, or give another folder" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.pt"))
    assert main(words) == 0  # with room, over what is there
    capsys.readouterr()
    for more, message in (
        ([], "holds a run at step 2; set resume to go on, or give another folder"),
        (["--resume", "--lora-rank", "4"], "lora_rank 2 → 4 cannot change within a run"),
        (["--resume", "--prompts", str(tmp_path / "others.txt")], "others.txt': No such file"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_add_on_and_its_card_go_to_the_hub(tmp_path, prompts, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **settings: calls.append((repo_id, settings)))

    def upload(self, **settings):
        folder = Path(settings["folder_path"])
        paths = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        calls.append(list(filter_repo_objects(paths, allow_patterns=settings["allow_patterns"])))
        return CommitInfo("https://huggingface.co/me/dial/commit/0", "", "", "0")

    assert inspect.signature(HfApi.upload_folder).parameters.keys() >= {"folder_path", "repo_id", "allow_patterns"}
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    words = [*command(tmp_path / "out", prompts, steps=1, preview_every=1), "--push-to-hub", "me/dial", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["url"] == "https://huggingface.co/me/dial"
    assert calls[0][0] == "me/dial"
    assert calls[1] == ["README.md", "elastic.json", "elastic.safetensors", "samples.png"]

    def refuse(self, **settings):
        raise OSError("no route to the hub")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    words[2] = str(tmp_path / "again")
    assert main(words) == 2
    assert "push_to_hub='me/dial': the hub refused (no route to the hub)" in capsys.readouterr().err
    assert (tmp_path / "again" / "elastic.safetensors").is_file()


@pytest.mark.parametrize("name", [*PIPELINES, "ZImagePipeline"])
def test_pictures_train_a_dial(tmp_path, folder, name, capsys):
    if name == "DiTPipeline":
        for number, label in enumerate(("7", "8")):
            (folder / label).mkdir()
            (folder / f"{number}.png").rename(folder / label / "0.png")
    result = distill(on_pictures(tmp_path / "out", name, folder))
    buckets = 1 if name == "DiTPipeline" else 2
    assert f"examples in {buckets} buckets" in capsys.readouterr().err
    distances = [row["distance"] for row in result["validation"]]
    assert distances[0] < 1e-4 < distances[-1]
    assert (tmp_path / "out" / "samples" / "step-00000002.png").is_file()
    elit.load_elastic(made(name), tmp_path / "out")


def test_wrong_calls_with_pictures_are_one_line(tmp_path, folder, prompts, capsys):
    (tmp_path / "empty").mkdir()
    good, out = ["--data", str(folder)], str(tmp_path / "out")
    flux = ["tiny/FluxPipeline", out, "--sizes", "32x32"]
    for words, message in (
        ([*flux, *good, "--prompts", str(prompts)], "cannot learn from prompts and data at once"),
        ([*flux, "--data", "nowhere"], "data must be a folder, a file or one of"),
        ([*flux, "--data", str(tmp_path / "empty")], "no pictures in it"),
        (["tiny/LTX2Pipeline", out, *good], "data is not supported for a LTX2Pipeline"),
        ([*flux[:2], "--sizes", "0x8", *good], "sizes must be HEIGHTxWIDTH in pixels"),
        ([*flux, *good, "--time-shift", "0"], "time_shift must be above 0, got 0.0"),
        ([*flux, *good, "--prompt-dropout", "1"], "prompt_dropout must be"),
    ):
        assert_refused(words, message, capsys)


@pytest.mark.parametrize(("name", "files"), [("ZImagePipeline", 1), ("FluxPipeline", 2), ("DiTPipeline", 0)])
def test_captions_and_pictures_stay_together_after_a_kill_and_some_are_held_out(
    tmp_path, folder, name, files, monkeypatch
):
    """However many files were written before the kill; validation has pictures that no step trains on."""
    if name == "DiTPipeline":
        for number in range(6):
            (folder / str(7 + number % 3)).mkdir(exist_ok=True)
            (folder / f"{number}.png").rename(folder / str(7 + number % 3) / f"{number}.png")
    save, written = captioned_images.save_calls, []

    def killed(path, *content):
        if len(written) == files:
            raise KeyboardInterrupt
        written.append(save(path, *content))

    def prepared(out):
        pipe = made(name)
        images = CaptionedImages(config, pipe)
        requests = Requests(pipe, config, images.prompts)
        one, two = (first_call(pipe, requests.request(requests.prompts[:1] * count)) for count in (1, 2))
        rows = len(one[images.family.sample]), len(two[images.family.sample])
        images.prepare(out, requests, lambda: layout_of(one, two, rows), Accelerator())
        return images

    config = on_pictures(tmp_path / "out", name, folder, teacher_batch=1)
    whole = prepared(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(captioned_images, "save_calls", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "cut")
    again = prepared(tmp_path / "cut")
    for entry in range(len(whole.entries)):
        trees = [images.__getitems__([entry]) for images in (whole, again)]
        assert repr(trees[0]) == repr(trees[1])
    trained = {whole.entries[entry][:2] for bucket in whole.buckets for entry in bucket}
    assert trained
    assert trained.isdisjoint(whole.entries[entry][:2] for entry in whole.held_out)
