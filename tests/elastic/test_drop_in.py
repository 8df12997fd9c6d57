"""An elastified transformer where diffusers expects its own class: pipelines of others, saving, loading, placing."""

import diffusers
import pytest
import torch
from tiny import SPLIT, autoencoder, build, elastic, elastic_pipeline, output, pipeline

import elit


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


class CustomPipeline(diffusers.DiffusionPipeline):
    """With a part whose default is None, as the base class drops."""

    _optional_components = ("vae", "transformer")

    def __init__(self, scheduler, vae=None, transformer=None):
        super().__init__()
        self.register_modules(scheduler=scheduler, vae=vae, transformer=transformer)


def test_a_pipeline_of_ones_own_is_loaded_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers, "CustomPipeline", CustomPipeline, raising=False)
    scheduler, transformer = diffusers.DDIMScheduler(), elastic("DiTTransformer2DModel")
    CustomPipeline(scheduler, autoencoder(), transformer).save_pretrained(tmp_path)
    again = elit.load_elastic(tmp_path)
    assert torch.equal(output(again.transformer, "DiTTransformer2DModel"), output(transformer, "DiTTransformer2DModel"))
    stock = pipeline("DiTPipeline").transformer
    assert elit.load_elastic(tmp_path, transformer=stock).transformer is stock  # what is given goes first
