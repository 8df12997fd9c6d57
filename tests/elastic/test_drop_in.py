"""An elastified transformer or pipeline where diffusers expects its own: called, saved, loaded, placed."""

import inspect
import pickle
import subprocess
import sys

import diffusers
import pytest
import torch
from tiny import KINDS, MORE, SPLIT, Spy, build, draw, elastic, elastic_pipeline, inputs, output, pipeline, with_text

import elit
from elit.cli.main import main
from elit.elastic.engine import PipelineEngine
from elit.elastic.families import FAMILIES
from elit.elastic.load import open_pipeline, save_add_on
from elit.elastic.surgery import default_blocks


class MyFlux(diffusers.FluxTransformer2DModel):
    """Somebody's own, as many have."""


class MyDiT(diffusers.DiTTransformer2DModel):
    """Another."""


@pytest.fixture
def folder(tmp_path):
    elastic_pipeline("DiTPipeline").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("FluxPipeline", diffusers.FluxImg2ImgPipeline),
        ("StableDiffusion3Pipeline", diffusers.AutoPipelineForImage2Image),
        ("QwenImagePipeline", diffusers.QwenImageInpaintPipeline),
    ],
)
def test_a_pipeline_made_of_another_keeps_the_dial(name, other):
    pipe = elastic_pipeline(name)
    assert other.from_pipe(pipe).transformer is pipe.transformer
    assert type(pipe.transformer) is not type(pipeline(name).transformer)


@pytest.mark.parametrize("mine", [MyFlux, MyDiT])
def test_a_subclass_is_saved_loaded_and_takes_the_add_on_of_its_class(mine, tmp_path):
    kind = mine.__mro__[1].__name__
    own = mine.from_config(build(kind).config).eval()
    own.load_state_dict(build(kind).state_dict())
    elit.elastify(own, **SPLIT).save_pretrained(tmp_path)
    again = elit.load_elastic(tmp_path)
    assert isinstance(again, mine)
    assert torch.equal(output(again, kind), output(own, kind))
    record = (tmp_path / "elastic.json").read_text()
    (tmp_path / "elastic.json").write_text(record.replace(mine.__name__, "Elsewhere"))
    with pytest.raises(ValueError, match="its class Elsewhere is not known; import it first"):
        elit.load_elastic(tmp_path)


SAVED = [{"variant": "fp16"}, {"max_shard_size": "20KB"}, {"safe_serialization": False}]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("options", SAVED, ids=str)
def test_options_of_saving_reach_an_elastified_transformer(options, trained, tmp_path):
    pipe = elastic_pipeline("DiTPipeline", opened=True)
    if trained:
        with torch.no_grad():
            pipe.transformer.transformer_blocks[1].attn1.to_q.weight.mul_(1.01)
    pipe.save_pretrained(tmp_path, **options)
    names = {path.name for path in (tmp_path / "transformer").iterdir()}
    assert "diffusion_pytorch_model.safetensors" not in names
    assert "max_shard_size" not in options or sum("-of-" in name for name in names) > 1
    variant = {"variant": "fp16"} if "variant" in options else {}
    again = elit.load_elastic(tmp_path, **variant)
    alone = elit.load_elastic(tmp_path / "transformer", **variant)
    right = output(pipe.transformer, "DiTTransformer2DModel")
    assert all(torch.equal(output(each, "DiTTransformer2DModel"), right) for each in (again.transformer, alone))
    if not trained:
        own = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "transformer", **variant)
        assert torch.equal(own.pos_embed.proj.weight, alone.pos_embed.proj.weight)


@pytest.mark.parametrize("dtypes", [{"transformer": torch.bfloat16}, {"default": torch.float16}, torch.float64])
def test_dtypes_by_part_reach_the_transformer(dtypes, folder):
    wanted = next(iter(dtypes.values())) if isinstance(dtypes, dict) else dtypes
    transformer = elit.load_elastic(folder, torch_dtype=dtypes).transformer
    assert {weight.dtype for weight in transformer.parameters()} == {wanted}
    assert transformer.budgets == tuple(range(1, 17))


def test_a_quantisation_of_other_parts_leaves_the_transformer(folder, monkeypatch):
    seen = []
    config = diffusers.PipelineQuantizationConfig(quant_mapping={"text_encoder": diffusers.GGUFQuantizationConfig()})
    load = diffusers.DiTTransformer2DModel.from_pretrained
    noted = lambda *args, **kwargs: (seen.append(kwargs.get("quantization_config")), load(*args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(diffusers.DiTTransformer2DModel, "from_pretrained", noted)
    elit.load_elastic(folder, quantization_config=config)
    elit.load_elastic(folder / "transformer")
    assert seen == [None, None]


@pytest.mark.parametrize("device_map", ["auto", "sequential", "by hand"])
def test_a_transformer_spread_by_a_map_keeps_its_dial(device_map, tmp_path):
    kind = "FluxTransformer2DModel"
    model = elastic(kind)
    model.save_pretrained(tmp_path / "model")
    if device_map == "by hand":
        device_map = {name: "cpu" for name, _ in model.named_children()} | {"transformer_blocks": "disk"}
    options = {"max_memory": {"cpu": "60KB"}, "offload_folder": str(tmp_path / "offload")}
    again = elit.load_elastic(tmp_path / "model", device_map=device_map, **options)
    assert any(weight.is_meta for weight in again.parameters())
    assert torch.equal(output(again, kind), output(model, kind))


CALL = {"class_labels": [1], "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}


def picture(pipe, **budgets):
    return torch.from_numpy(pipe(**CALL, generator=torch.Generator().manual_seed(0), **budgets).images)


@pytest.fixture(scope="module", params=[False, True], ids=["", "trained"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dial")
    pipe = elastic_pipeline("DiTPipeline", opened=True)
    if request.param:  # weights that are no model alone
        with torch.no_grad():
            pipe.transformer.transformer_blocks[1].attn1.to_q.weight.mul_(1.01)
    pipe.save_pretrained(folder)
    pictures = [picture(pipe)]
    for guidance in ({}, {"guidance": 1}):
        with elit.budget(4, **guidance):
            pictures.append(picture(pipe))
    return folder, {"variant": "elastic"} if request.param else {}, pictures


def check(pipe, pictures):
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(picture(pipe), pictures[0])
    assert torch.equal(picture(pipe, budget=0.25), pictures[1])
    assert torch.equal(picture(pipe, budget=4, guidance_budget=1), pictures[2])
    with elit.budget(4):
        assert torch.equal(picture(pipe), pictures[1])
    assert {"class_labels", "budget", "guidance_budget"} <= set(inspect.signature(pipe.__call__).parameters)
    with pytest.raises(ValueError, match="budget"):
        picture(pipe, budget=99)


def test_loaded_by_diffusers_with_the_file_in_the_folder(saved, tmp_path):
    folder, more, pictures = saved
    for name in ("pipeline", str(folder / "pipeline.py")):
        options = {"custom_pipeline": name, "trust_remote_code": True, **more}
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), **options)
        check(pipe, pictures)
    pipe.save_pretrained(tmp_path)  # and again
    assert (tmp_path / "pipeline.py").read_text() == (folder / "pipeline.py").read_text()
    for each in (folder, tmp_path):
        pipe = elit.load_elastic(each)
        assert isinstance(pipe, diffusers.DiTPipeline)
        check(pickle.loads(pickle.dumps(pipe)), pictures)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False], indirect=True)
def test_in_a_process_that_never_imports_elit(saved):
    folder, more, pictures = saved
    code = f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, custom_pipeline="pipeline", trust_remote_code=True, **{more})
image = pipe(**{CALL}, generator=torch.Generator().manual_seed(0), budget=0.25).images
print(float(image.sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(float(pictures[1].numpy().sum()), rel=1e-5)


def test_read_and_write_lie_in_the_papers_proportion():
    assert default_blocks(60) == (8, 52)
    assert default_blocks(57) == (8, 49)  # Flux
    assert [default_blocks(depth) for depth in (1, 2, 3, 4)] == [(0, 1), (0, 2), (1, 2), (1, 3)]


@pytest.mark.parametrize("kind", KINDS + MORE)
def test_every_class_has_a_window_that_suits_it(kind):
    record = elit.elastify(build(kind)).elastic_record
    assert (len(record.window), record.read_after, record.write_after) == (FAMILIES[kind].axes, 1, 3)


def test_a_pipeline_is_elastified_in_place_and_is_what_it_was():
    right = draw(pipeline("FluxPipeline"))
    pipe = pipeline("FluxPipeline")
    assert elit.elastify(pipe) is pipe
    assert torch.equal(draw(pipe), right)
    with elit.budget(0.25):
        assert not torch.equal(draw(pipe), right)
    with pytest.raises(ValueError, match="cannot elastify a transformer twice"):
        elit.elastify(pipe)
    with pytest.raises(ValueError, match="context parallel is not supported"):
        pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ring_degree=2))
    pipe.transformer = None
    with pytest.raises(ValueError, match="got a FluxPipeline without one"):
        elit.elastify(pipe)


WAN = "WanTransformer3DModel"


def wan(**parts):
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, **parts)


@pytest.mark.parametrize("names", [("transformer",), ("transformer_2",), ("transformer", "transformer_2")])
def test_a_video_pipeline_keeps_its_dials_when_it_is_loaded(tmp_path, names):
    """diffusers' base class drops parts whose default is None, as both transformers of Wan are."""
    pipe = elit.elastify(wan(**{name: build(WAN) for name in names}), window=(2, 2, 4))
    pipe.save_pretrained(tmp_path)
    again = elit.load_elastic(tmp_path, tokenizer=None, text_encoder=None, vae=None)
    for name in names:
        assert getattr(again, name).budgets == getattr(pipe, name).budgets == tuple(range(1, 17))


def test_an_add_on_for_one_of_two_transformers_is_refused(tmp_path):
    transformer = elit.elastify(build(WAN), window=(2, 2, 4))
    save_add_on(transformer, {f"elastic.{name}": w for name, w in transformer.elastic.state_dict().items()}, tmp_path)
    parts = {name: build(WAN) for name in ("transformer", "transformer_2")}
    with pytest.raises(ValueError, match="pipeline must have one transformer, got a WanPipeline with two"):
        elit.load_elastic(wan(**parts), tmp_path)
    assert elit.load_elastic(wan(transformer=parts["transformer"]), tmp_path).transformer.budgets == tuple(range(1, 17))


@pytest.mark.parametrize("kind", ["QwenImageTransformer2DModel", "FluxTransformer2DModel"])
def test_references_have_a_budget_of_their_own(kind, monkeypatch):
    x, model = inputs(kind), elit.elastify(build(kind), window=(4, 4))
    x["hidden_states"] = torch.cat((x["hidden_states"],) * 2, 1)
    if kind.startswith("Qwen"):
        x["img_shapes"] = [[(1, 8, 8), (1, 8, 8)]] * 2
    else:
        x["img_ids"] = torch.cat((x["img_ids"], x["img_ids"] + torch.tensor([1.0, 0, 0])))
    spy = Spy(model, monkeypatch)
    with torch.no_grad():
        with elit.budget(0.5, reference=0.25):
            assert model(**x).sample.isfinite().all()
        with elit.budget(0.5):
            model(**x)
        with elit.budget(1.0, reference=1):
            low = model(**x).sample
        assert not torch.equal(low, model(**x).sample)
    assert spy.plans[:3] == [[8, 4], [8, 8], [16, 1]]
    with pytest.raises(ValueError, match="got 0"), elit.budget(0.5, reference=0):
        pass


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"revision": "refs/pr/1"}, {}])
def test_the_base_is_loaded_in_its_variant_and_revision_and_found_from_anywhere(tmp_path, options, monkeypatch):
    seen = []

    def load(name, **given):
        seen.append((name, {key: value for key, value in given.items() if key in ("variant", "revision") and value}))
        return with_text("FluxPipeline")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    pipeline("FluxPipeline").save_pretrained("flux")
    (tmp_path / "prompts.txt").write_text("a boat\n")
    words = "distill flux dial --prompts prompts.txt --sizes 32x32 --window 2 2 --batch-size 2 --teacher-steps 1"
    words += " --call max_sequence_length=5 --lora-rank 2 --steps 1 --preview-every 0"
    assert main([*words.split(), *(f"--{name}={value}" for name, value in options.items())]) == 0
    monkeypatch.chdir("/")
    opened = open_pipeline(tmp_path / "dial")
    engine = PipelineEngine(opened.load(device="cpu", dtype=torch.float32))
    assert engine.size == (32, 32)
    assert seen == [("flux", options), (str(tmp_path / "flux"), options)]
