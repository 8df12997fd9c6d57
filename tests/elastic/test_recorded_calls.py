"""Recorded calls: nested trees on disk, and batches of calls that are alike."""

import pickle

import pytest
import torch
from tiny import KINDS, MORE, build, inputs, with_text
from torch import Tensor

from elit.compat import tree_map_only
from elit.config import DistillConfig
from elit.elastic.context import original
from elit.elastic.pipelines import (
    RecordedCalls,
    Requests,
    join_rows,
    layout_of,
    output_tensor,
    record,
    save_calls,
    take_rows,
)


def recorded(folder, sizes):
    """Two batches of a tiny Flux pipeline at each size."""
    pipe = with_text("FluxPipeline")
    config = DistillConfig(sizes=sizes, call=("max_sequence_length=5",), teacher_batch=2, teacher_steps=4)
    requests = Requests(pipe, config, ["a boat", "a tree"] * 2 * len(sizes))
    calls = [record(pipe, request) for request in requests.batches()]
    one = record(pipe, requests.request(["a boat"], number=0, steps=1))
    layout = layout_of(one[0][1], calls[0][0][1], (1, 2))
    for number, of_request in enumerate(calls):
        save_calls(folder / f"{number:06d}.pt", of_request, layout)
    return pipe, calls


@pytest.mark.parametrize("sizes", [("64x32", "32x64"), ("32x32", "64x64"), ("32x32", "64x32", "32x64")])
def test_sizes_with_as_many_tokens_are_never_in_one_batch(tmp_path, sizes):
    """The original gives its recorded outputs again, whichever rows are batched: the coordinates are theirs."""
    pipe, calls = recorded(tmp_path, sizes)
    assert [len(each) for each in calls] == [4] * len(sizes) + [3] * len(sizes)  # each has both numbers of steps
    examples = pickle.loads(pickle.dumps(RecordedCalls(tmp_path)))  # as workers that are spawned get it
    assert len(examples.buckets) == len(sizes)
    for bucket in examples.buckets:
        outputs, call = examples.__getitems__([int(entry) for entry in bucket])
        with torch.no_grad(), original():
            again = output_tensor(pipe.transformer(**call.arguments))
        assert torch.allclose(again, outputs, atol=1e-5)


def test_a_damaged_file_and_an_empty_folder_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="no recorded calls"):
        RecordedCalls(tmp_path)
    (tmp_path / "000000.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"cannot read '.*000000\.pt': damaged") as refusal:
        RecordedCalls(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", KINDS + MORE)
def test_rows_come_apart_and_together_again(kind):
    """Rows of nested dictionaries, tuples, lists with an entry a sample, and what all samples share."""
    one, three = inputs(kind, batch=1), inputs(kind, batch=3)
    layout = layout_of(one, three, (1, 3))
    again = join_rows(layout, [take_rows(layout, three, slice(row, row + 1)) for row in range(3)])
    with torch.no_grad():
        outputs = [output_tensor(build(kind)(**given, return_dict=False)) for given in (three, again)]
    assert torch.equal(*outputs)
    assert repr(tree_map_only(Tensor, Tensor.tolist, again)) == repr(tree_map_only(Tensor, Tensor.tolist, three))


def test_a_mask_that_only_some_texts_have_goes_with_its_rows(tmp_path):
    """One text needs no padding and has no mask, by which the layout was told; texts of two lengths have one."""
    transformer, call = build("QwenImageTransformer2DModel"), inputs("QwenImageTransformer2DModel", batch=2)
    length = call["encoder_hidden_states"].shape[1]
    mask = torch.arange(length) < torch.tensor([[length], [length - 2]])
    one, two = ({**inputs("QwenImageTransformer2DModel", batch=n), "encoder_hidden_states_mask": None} for n in (1, 2))
    given = two | {"encoder_hidden_states_mask": mask}
    with torch.no_grad():
        wanted, unpadded = (output_tensor(transformer(**each, return_dict=False)) for each in (given, two))
    calls = [("all", given, wanted), ("all", two, unpadded)]
    save_calls(tmp_path / "000000.pt", calls, layout_of(one, two, (1, 2)))
    examples = RecordedCalls(tmp_path)
    assert [len(bucket) for bucket in examples.buckets] == [2, 2]
    for rows in ([0], [1], [1, 0, 1], [2, 3]):
        outputs, batch = examples.__getitems__(rows)
        with torch.no_grad():
            again = output_tensor(transformer(**batch.arguments, return_dict=False))
        assert torch.allclose(again, outputs, atol=1e-5)
