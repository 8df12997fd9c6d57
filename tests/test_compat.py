"""Private names of other packages whose loss no other test would name are there in what is installed."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, PixArtAlphaPipeline, StableDiffusion3Pipeline
from torch import nn

from elit import compat


def test_torch_counts_writes():
    value = torch.zeros(2)
    before = compat.write_count(value)
    value.add_(1)
    assert compat.write_count(value) == before + 1


def test_torch_warns_of_a_lone_process_in_these_words(tmp_path):
    import torch.distributed.checkpoint as dcp

    with pytest.warns(UserWarning, match=compat.LONE_PROCESS):
        dcp.save({"a": torch.zeros(1)}, checkpoint_id=tmp_path / "a", no_dist=False)
    with warnings.catch_warnings(), compat.lone_process():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", compat.LONE_PROCESS)
        dcp.load({"a": torch.zeros(1)}, checkpoint_id=tmp_path / "a", no_dist=True)


def test_diffusers_registers_blocks_by_class():
    from diffusers.hooks._helpers import TransformerBlockRegistry
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    made = type("FluxTransformerBlock", (FluxTransformerBlock,), {})
    compat.register_block_like(made, FluxTransformerBlock)
    known, like = TransformerBlockRegistry.get(made), TransformerBlockRegistry.get(FluxTransformerBlock)
    assert known.return_hidden_states_index == like.return_hidden_states_index
    compat.register_block_like(nn.Linear, nn.Linear)  # no block of diffusers: nothing to register


def test_diffusers_pipelines_have_the_names_that_are_read():
    """`elit.budget` asks the pipeline that calls a transformer; these are its own variables and properties."""
    assert isinstance(inspect.getattr_static(DiffusionPipeline, "_execution_device"), property)
    assert isinstance(inspect.getattr_static(StableDiffusion3Pipeline, "do_classifier_free_guidance"), property)
    for kind, names in (
        (DiTPipeline, {"self", "guidance_scale", "t"}),
        (PixArtAlphaPipeline, {"self", "do_classifier_free_guidance", "t"}),
        (StableDiffusion3Pipeline, {"t"}),
    ):
        assert names <= set(inspect.unwrap(kind.__call__).__code__.co_varnames)


def test_torch_fidelity_has_its_inception():
    pytest.importorskip("torch_fidelity", reason="the extra eval is not installed")
    code = "import inspect, torch_fidelity.feature_extractor_inceptionv3 as t; "
    code += "source = inspect.getsource(t.FeatureExtractorInceptionV3); "
    code += "assert all(n in source for n in ('Mixed_6d', 'feature_extractor_weights_path', 'logits_unbiased'))"
    subprocess.run([sys.executable, "-c", code], check=True)
