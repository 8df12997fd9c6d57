"""The dial beside what others do to a transformer: adapters, quantised storage, caches, layer skip, another dial."""

import copy

import diffusers
import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from peft import LoraConfig
from tiny import SPLIT, build, draw, elastic, elastic_pipeline, inputs, open_branches, output, pipeline
from torch import nn

import elit
from elit.elastic.interface import add_low_rank
from elit.elastic.load import save_add_on

FLUX = "FluxTransformer2DModel"
LORA = {"r": 2, "init_lora_weights": False}


def add_on(folder, kind=FLUX, rank=0):
    model = elastic(kind)
    if rank:
        add_low_rank(model, rank)
        model.elastic_record = type(model.elastic_record)(**vars(model.elastic_record) | {"lora_rank": rank})
        open_branches(model)
    folder.mkdir(exist_ok=True)
    save_add_on(model, {f"elastic.{name}": value for name, value in model.elastic.state_dict().items()}, folder)


@pytest.mark.parametrize("targets", ["all-linear", ["to_q", "to_out.0"], r".*(reader|writer|to_q).*"])
def test_an_adapter_is_on_the_originals_layers_alone(targets):
    model = elastic(FLUX)
    model.add_adapter(LoraConfig(target_modules=targets, **LORA))
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert names
    assert not [name for name in names if name.startswith("elastic.")]
    assert not any(weight.requires_grad for weight in model.elastic.parameters())


@pytest.mark.parametrize("order", ["fused", "fused, then unfused", "before, then fused", "deleted"])
def test_a_lora_is_no_training_of_the_weights(order, tmp_path):
    steps = [
        lambda: elit.elastify(model, **SPLIT),
        lambda: model.add_adapter(LoraConfig(target_modules=["to_q"], **LORA)),
    ]
    model = build(FLUX)
    for step in reversed(steps) if order.startswith("before") else steps:
        step()
    if "fused" in order:
        model.fuse_lora()
    if "unfused" in order:
        model.unfuse_lora()
    if order == "deleted":
        model.delete_adapters("default")
    right = output(model, FLUX)
    model.unload_lora()
    if order == "fused, then unfused":
        right = output(model, FLUX)
    model.save_pretrained(tmp_path)
    assert torch.allclose(output(elit.load_elastic(tmp_path), FLUX), right)
    plain = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)  # a model without its dial, too
    assert torch.equal(plain.transformer_blocks[0].attn.to_q.weight, model.transformer_blocks[0].attn.to_q.weight)


class Packed(nn.Parameter):
    """Weights in bytes, as GGUF and bitsandbytes have them."""


@pytest.mark.parametrize("storage", ["layerwise casting", "half", "bytes"])
def test_the_dial_computes_in_the_dtype_that_the_model_computes_in(storage):
    model, wanted = build(FLUX), torch.bfloat16
    if storage == "layerwise casting":
        model.to(torch.bfloat16).enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    elif storage == "half":
        model.to(torch.bfloat16)
        model.proj_out.float()
    else:
        layer = model.transformer_blocks[0].attn.to_q
        layer.weight, layer.compute_dtype = Packed(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False), wanted
    elit.elastify(model, **SPLIT)
    assert {weight.dtype for weight in model.elastic.parameters()} == {wanted}
    if storage == "layerwise casting":
        floats = {name: value.bfloat16() for name, value in inputs(FLUX).items() if "ids" not in name}
        assert output(model, FLUX, **floats).isfinite().all()


def test_an_add_on_is_checked_against_its_transformer(tmp_path):
    add_on(tmp_path / "dev")
    for changes in ({"in_channels": 32}, {"num_single_layers": 3}, {"guidance_embeds": False}):
        pipe = pipeline("FluxPipeline")
        pipe.transformer = build(FLUX, **changes)
        name, value = next(iter(changes.items()))
        with pytest.raises(ValueError, match=rf"it is for one with {name}=.*, not {value}"):
            elit.load_elastic(pipe, tmp_path / "dev")
        assert type(pipe.transformer) is diffusers.FluxTransformer2DModel
    pipe = pipeline("QwenImagePipeline")
    with pytest.raises(ValueError, match="it is for a FluxTransformer2DModel"):
        elit.load_elastic(pipe, tmp_path / "dev")
    elastic(FLUX).save_pretrained(tmp_path / "whole" / "transformer")  # an add-on of all weights
    with pytest.raises(ValueError, match="it is for a FluxTransformer2DModel"):
        elit.load_elastic(pipe, tmp_path / "whole")


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "DiTPipeline"])
def test_a_dial_is_taken_off_and_swapped(name, tmp_path):
    pipe = pipeline(name)
    kind, right, stock = type(pipe.transformer), draw(pipe), copy.deepcopy(pipe)
    outputs = []
    for number, rank in enumerate((0, 2)):
        add_on(tmp_path / str(number), kind.__name__, rank)
        assert elit.load_elastic(pipe, tmp_path / str(number)) is pipe
        with elit.budget(4):
            outputs.append(draw(pipe))
    fresh = elit.load_elastic(stock, tmp_path / "1")
    with elit.budget(4):
        assert torch.equal(draw(fresh), outputs[1])
    assert not torch.equal(*outputs)
    assert elit.unload_elastic(pipe) is pipe
    assert type(pipe.transformer) is kind
    assert torch.equal(draw(pipe), right)
    assert not [name for name, _ in pipe.transformer.named_parameters() if "elastic" in name]
    with pytest.raises(ValueError, match="cannot take a dial off"):
        elit.unload_elastic(pipe)


def test_projections_with_low_rank_changes_are_not_fused(tmp_path):
    add_on(tmp_path / "low", rank=2)
    pipe = elit.load_elastic(pipeline("FluxPipeline"), tmp_path / "low")
    with pytest.raises(ValueError, match="cannot fuse projections"):
        pipe.transformer.fuse_qkv_projections()
    model = elastic(FLUX)
    model.fuse_qkv_projections()  # nothing is lost
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        add_low_rank(model, 2)
    fused = pipeline("FluxPipeline")
    fused.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        elit.load_elastic(fused, tmp_path / "low")
    assert type(fused.transformer) is diffusers.FluxTransformer2DModel


CACHES = {
    "TaylorSeer": lambda: diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1),
    "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline"])
def test_a_cache_is_reset_where_the_budget_switches(name, cache):
    pipe = elastic_pipeline(name, opened=True)
    pipe.transformer.enable_cache(CACHES[cache]())
    for switch in range(1, 6):
        with elit.budget([4] * switch + [8] * (6 - switch)):
            assert draw(pipe, steps=6).isfinite().all()
    with elit.budget(4):
        assert draw(pipe, steps=3).isfinite().all()


def test_faster_cache_refuses_a_switch_in_words():
    pipe = elastic_pipeline("FluxPipeline")
    config = diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        current_timestep_callback=lambda: 950 if pipe.current_timestep is None else int(pipe.current_timestep),
        attention_weight_callback=lambda _: 0.3,
        is_guidance_distilled=True,
        tensor_format="BCHW",
    )
    pipe.transformer.enable_cache(config)
    with elit.budget([4, 4, 8]), pytest.raises(ValueError, match="must stay the same in a run with FasterCache"):
        draw(pipe, steps=3)
    pipe.maybe_free_model_hooks()
    for budget in (4, 8):
        with elit.budget(budget):
            assert draw(pipe, steps=3).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 69, 69), (69, 69), (1, 1, 1, 69)])
def test_masks_among_attentions_arguments_are_of_the_kept_tokens(shape):
    model = elastic(FLUX)
    given, right = {"attention_mask": torch.zeros(shape)}, output(model, FLUX)
    assert torch.allclose(output(model, FLUX, joint_attention_kwargs=given), right, atol=1e-5)
    given["attention_mask"][..., 3:5] = -1e9
    assert not torch.allclose(output(model, FLUX, joint_attention_kwargs=given), right, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "fqn", "index"),
    [
        (FLUX, "single_transformer_blocks", 0),
        ("QwenImageTransformer2DModel", "transformer_blocks", 2),
        ("WanTransformer3DModel", "blocks", 2),
    ],
)
def test_the_block_that_writes_is_not_skipped(kind, fqn, index):
    model = elastic(kind)
    apply_layer_skip(model, LayerSkipConfig(indices=[index], fqn=fqn))
    with pytest.raises(ValueError, match="skip_layers must leave out 2, the block that Write comes behind"):
        output(model, kind)


def test_what_replaces_a_forward_is_refused_without_a_circle():
    for part in (lambda model: model, lambda model: model.transformer_blocks[0]):
        model = build(FLUX)
        part(model).forward = lambda *args: args
        with pytest.raises(ValueError, match=r"whose forward was replaced: .*enable_cache does"):
            elit.elastify(model, **SPLIT)
    for kind in ("QwenImageTransformer2DModel", "SD3Transformer2DModel"):  # cache-dit swaps the list in each forward
        model = elastic(kind)
        for count in (1, 4):
            model.transformer_blocks = nn.ModuleList(nn.Identity() for _ in range(count))
            with pytest.raises(ValueError, match=r"another list of blocks: .*enable_cache does"):
                output(model, kind)
    with pytest.raises(ValueError, match="elastify it first, then compile"):
        elit.elastify(torch.compile(build(FLUX)), **SPLIT)


@pytest.mark.parametrize("storage", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Q8_0"])
@pytest.mark.parametrize("kind", ["QwenImageTransformer2DModel", "SD3Transformer2DModel"])
def test_weights_as_torchao_and_gguf_store_them(kind, storage):
    """Equal to the quantised original at full budget, also with low-rank changes, adapters, and the dial taken off."""
    model = build(kind, attention_head_dim=16, caption_projection_dim=32) if kind[0] == "S" else build(kind)
    if storage == "Q8_0":
        gguf, utils = pytest.importorskip("gguf"), pytest.importorskip("diffusers.quantizers.gguf.utils")
        for layer in (layer for layer in model.modules() if isinstance(layer, nn.Linear)):
            if layer.in_features % 32 == 0:
                code = gguf.GGMLQuantizationType[storage]
                packed = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), code))
                layer.__class__, layer.compute_dtype = utils.GGUFLinear, torch.float32
                layer.weight = utils.GGUFParameter(packed, quant_type=code)
    else:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, storage)())
    right = model(**inputs(kind), return_dict=False)[0]
    elit.elastify(model, **SPLIT)
    add_low_rank(model, 2)
    assert torch.equal(model(**inputs(kind), return_dict=False)[0], right)
    open_branches(model)
    assert output(model, kind).isfinite().all()
    assert not model.weights_changed()
    elit.unload_elastic(model)
    model.add_adapter(LoraConfig(target_modules=["to_q"], **LORA))
    elit.elastify(model, **SPLIT)
    assert output(model, kind).isfinite().all()
