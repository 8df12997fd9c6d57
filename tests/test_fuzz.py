"""Properties of every parser: whatever it is given, it reads it, or refuses it in one line.

Command lines, bodies of HTTP requests, YAML, JSON and saved files: each a valid one with changes, or anything at all.
ELIT_FUZZ=5000 tries so many of each, and other ones every time.
"""

import asyncio
import contextlib
import copy
import dataclasses
import io
import json
import os
import shutil
from importlib import import_module

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from serve.service import saved_model

import elit
from elit.cli.main import COMMANDS, parse
from elit.config import DistillConfig, TrainConfig, load_config
from elit.evaluate.sweep import read_table
from elit.planner.profile import read_profile
from elit.sampling.pictures import PictureRecord
from elit.sampling.settings import Sampling
from elit.serve.replica import load_replica
from elit.serve.requests import ApiError, read_request
from elit.serve.settings import ServiceSettings

pytestmark = pytest.mark.slow
MORE = int(os.environ.get("ELIT_FUZZ", "0"))
HOW = {"deadline": None, "derandomize": not MORE, "suppress_health_check": list(HealthCheck)}
WORDS = st.sampled_from(
    [
        *("", "x", "-1", "0", "1", "2", "8", "17", "1.5", "0.5", "50%", "0%", "150%", "100%@0-0.5,8@0.5-1", "8@0-2"),
        *("nan", "inf", "1e400", "none", "full", "cfg", "ccfg", "ag", "euler", "heun", "float32", "bfloat16", "seven"),
        *("digits", "nowhere", "a/b/c", "..", ".", "/proc/x", "a\nb", "é", "x" * 300, "cpu", "cuda:99", "meta", "True"),
        *("recipe:x", "DiT-S/1", "x.png", "x.npz", "x.json", "{}", "[]", "🙂", "'", "*", "-", "--", "--steps", "a=b"),
        *("None", "idx:x", "http://127.0.0.1:9", "\0", "1" + "0" * 30, "1e300", "1024x1024", "4x", "runs/x"),
    ]
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-3, 70), st.just(1 << 70), st.floats(), WORDS)
VALUES = st.one_of(LEAVES, st.lists(LEAVES, max_size=3), st.dictionaries(WORDS, LEAVES, max_size=2))


@st.composite
def changed(draw, document):
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from([document, *(each for each in document.values() if isinstance(each, dict))]))
        key = draw(st.sampled_from([*place, "x"]))
        if draw(st.integers(0, 3)):
            place[key] = draw(VALUES)
        else:
            place.pop(key, None)
    return document


@contextlib.contextmanager
def one_line(*kinds):
    """Lets ValueErrors of one line pass; says nothing."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        except (ValueError, *kinds) as error:
            message = str(error).strip()
            assert "\n" not in message


@settings(max_examples=MORE or 10, **HOW)
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("empty_folder")
def test_command_lines_are_parsed_or_refused(name, data):
    module, code = import_module(f"elit.cli.{name}{'_' * (name == 'import')}"), 0
    words = data.draw(lines(module.Args))
    with one_line(OSError):
        try:
            module.parse(words) if hasattr(module, "parse") else parse(module.Args, name, words)
        except SystemExit as stop:  # --help
            code = stop.code
    assert code == 0


def options_of(kind):
    for each in dataclasses.fields(kind):
        inner = each.default_factory() if each.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(inner):
            yield from (("model." if each.name == "model" else "") + name for name in options_of(type(inner)))
        else:
            yield each.name


@st.composite
def lines(draw, kind):
    words, options = draw(st.lists(WORDS, max_size=2)), sorted(options_of(kind))
    for option in draw(st.lists(st.sampled_from(options), max_size=4)):
        flag = f"--{draw(st.sampled_from(['', '', '', 'no-']))}{option.replace('_', '-')}"
        words += [flag, *draw(st.lists(WORDS, max_size=2))]
    return words


BODY = {
    **{"prompt": "3", "model": "m", "n": 1, "size": "auto", "response_format": "b64_json", "output_format": "png"},
    **{"quality": "low", "stream": False, "partial_images": 1, "budget": "50%", "deadline_ms": 1000, "seed": 7},
    **{"num_inference_steps": 4, "guidance_scale": 1.5, "guidance_budget": 1, "negative_prompt": ""},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = saved_model(tmp_path_factory.mktemp("served") / "model")
    service = ServiceSettings(model=str(folder), name="m", device="cpu")
    return service, asyncio.run(load_replica(service).describe())


@settings(max_examples=MORE or 120, **HOW)
@given(body=st.one_of(changed(BODY).map(lambda body: json.dumps(body).encode()), st.binary(max_size=20)))
def test_bodies_of_requests_are_read_or_refused(body, served):
    status, message = 400, ""
    try:
        read_request(body, *served, now=0.0)
    except ApiError as error:
        status, message = error.status, json.loads(json.dumps(error.body()))["error"]["message"]
    assert 400 <= status < 500
    assert "\n" not in message


@settings(max_examples=MORE or 120, **HOW)
@given(
    content=st.one_of(
        changed(json.loads(json.dumps(dataclasses.asdict(TrainConfig())))).map(yaml.safe_dump),
        st.text("ab:- []{}&*!|>'\"\n\t#?,%@`01.e", max_size=30),
        st.binary(max_size=20),
    ),
    kind=st.sampled_from([TrainConfig, DistillConfig]),
)
def test_settings_files_are_read_or_refused(content, kind, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with one_line():
        assert isinstance(load_config(path, kind), kind)


SETTING = Sampling(budget="50%", guidance=elit.CCFG(2.0, 1)).to_dict()
READERS = {
    "profile": (read_profile, {"recipe": {"device": "cpu"}, "cost": {"prices": {}}, "rows": [], "rounds": 1}),
    "table": (read_table, {"detector": "digits", "count": 8, "fd": 1.0, "gflops": 1.0, "ms": 1.0} | SETTING),
    "record": (
        lambda path: PictureRecord.from_text(path.read_text()),
        {"model": "m", "weights": "w", "row": None, "made_with": {"torch": "2"}, "settings": SETTING},
    ),
}


@settings(max_examples=MORE or 60, **HOW)
@given(data=st.data())
@pytest.mark.parametrize("name", READERS)
def test_files_of_json_are_read_or_refused(name, data, tmp_path):
    read, document = READERS[name]
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(data.draw(st.one_of(changed(document), VALUES))))
    with one_line():
        read(path)


@settings(max_examples=MORE or 25, **HOW)
@given(data=st.data())
def test_damaged_models_are_refused(data, models, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(models / "model", folder, dirs_exist_ok=True)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    if path.suffix == ".json" or data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        content[data.draw(st.integers(0, min(len(content) - 1, 2000)))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with one_line(OSError):
        elit.load_model(folder)
