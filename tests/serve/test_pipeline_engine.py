"""Stock diffusers pipelines with a dial behind the API: pixels of the pipeline called alone, sizes, batches."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import torch
import yaml
from PIL import Image
from service import served
from tiny import open_branches, pipeline, with_text

import elit
from elit.cli.main import main
from elit.elastic.engine import PipelineEngine
from elit.serve.ladder import measure_costs
from elit.serve.replica import Replica, load_replica
from elit.serve.settings import ServiceSettings

pytestmark = pytest.mark.slow

SPLIT = {"read_after": 1, "write_after": 3, "window": (4, 4)}


@pytest.fixture(scope="module")
def pipe():
    pipe = with_text("StableDiffusion3Pipeline")
    open_branches(elit.elastify(pipe.transformer, **SPLIT))
    return pipe


@pytest.fixture(scope="module")
def service(pipe):
    settings = ServiceSettings(model="boats", name="boats", steps=4, deadline_ms=60_000, max_batch=4)
    engine = PipelineEngine(pipe, "boats")
    with served(settings, replica=Replica(engine, measure_costs(engine, seconds=0), settings)) as (url, replica, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), replica


def alone(pipe, prompt, seed, report, **call):
    guidance = report["guidance"]
    weak = {} if guidance is None or guidance["budget"] is None else {"guidance": guidance["budget"]}
    call["guidance_scale"] = 1.0 if guidance is None else guidance["scale"]
    with elit.budget(report["budget"], **weak):
        generator = torch.Generator().manual_seed(seed)
        call |= {"generator": generator, "num_inference_steps": report["steps"]}
        return np.asarray(pipe(prompt=[prompt], **call).images[0])


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json))))


def test_answers_are_the_pipelines_own_pixels_whatever_is_beside_them(service, pipe):
    client, _ = service
    asked = [
        ("a red boat", {"seed": 1, "budget": 2}, {}, {"negative_prompt": " "}),
        ("a kite", {"seed": 2, "budget": "50%", "guidance_scale": 1}, {}, {}),
        ("a kite", {"seed": 3, "guidance_scale": 2.5, "guidance_budget": 1, "num_inference_steps": 3}, {}, {}),
        ("a tree", {"seed": 4, "negative_prompt": "dull"}, {"size": "32x64"}, {"width": 32, "height": 64}),
    ]

    def ask(case):
        prompt, extra, more, _ = case
        return client.images.generate(prompt=prompt, extra_body=extra, **more)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    for answer, (prompt, extra, more, call) in zip(answers, asked, strict=True):
        report = answer.model_extra["elit"]
        if extra.get("guidance_scale") != 1:
            call = {"negative_prompt": [extra.get("negative_prompt", " ")]} | call
        assert np.array_equal(pixels(answer.data[0]), alone(pipe, prompt, extra["seed"], report, **call))
        assert answer.size == more.get("size", "64x64")
        assert report["gflops"] > 0
    assert answers[3].model_extra["elit"]["guidance"] == {"scale": 7.0, "budget": None}  # the pipeline's own
    both = client.images.generate(prompt="a red boat", n=2, extra_body={"seed": 0, "budget": 2})
    assert both.data[1].b64_json == answers[0].data[0].b64_json


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": "33x64"}, "multiples of 8"),
        ({"size": "128x64"}, "at most 4096 pixels"),
        ({"size": "x"}, "WIDTHxHEIGHT"),
        ({"extra_body": {"negative_prompt": "dull", "guidance_scale": 1}}, "a guidance_scale above 1"),
        ({"extra_body": {"budget": 17}}, "got 17"),
    ],
)
def test_what_the_pipeline_does_not_take_is_one_line(service, wrong, message):
    with pytest.raises(openai.BadRequestError, match=message):
        service[0].images.generate(prompt="a boat", **wrong)


def test_a_saved_pipeline_is_served_by_its_folder(tmp_path, capsys):
    pipe = pipeline("DiTPipeline")
    open_branches(elit.elastify(pipe.transformer, **SPLIT))
    pipe.save_pretrained(tmp_path / "whole")
    assert main(["serve", str(tmp_path / "whole"), "--steps", "2", "--build", str(tmp_path / "app.yaml")]) == 0
    (app,) = yaml.safe_load((tmp_path / "app.yaml").read_text())["applications"]
    service = ServiceSettings(**app["args"])
    with served(service, replica=load_replica(service)) as (url, _, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.images.generate(prompt="7", extra_body={"seed": 5, "budget": 4, "guidance_scale": 1})
        with pytest.raises(openai.BadRequestError, match="a class, 0 to 999"):
            client.images.generate(prompt="1000")
    with elit.budget(4):
        right = pipe([7], 1.0, torch.Generator().manual_seed(5), num_inference_steps=2).images[0]
    assert np.array_equal(pixels(answer.data[0]), np.asarray(right))
    pipe.transformer.save_pretrained(tmp_path / "alone")
    capsys.readouterr()
    assert main(["serve", str(tmp_path / "alone"), "--build", str(tmp_path / "other.yaml")]) == 2
    assert "give the folder of its pipeline" in capsys.readouterr().err
