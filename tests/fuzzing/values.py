"""What is drawn: values for arguments of functions and texts for options of commands, most of them wrong."""

import math
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

import elit

# Drawn for every argument.
ANYTHING = st.sampled_from(
    [
        *(None, True, False, 0, 1, 2, 3, 4, -1, 17, 64, 0.0, 0.5, 1.0, 1.5, 2.5, -0.5, math.inf, -math.inf, math.nan),
        *("", "x", "4", "50%", "0%", "150%", "100%@0-0.5,50%@0.5-1", "0.5@0-0.5", "@", "full", "none", "cfg", "nan"),
        *("8", "a\nb", "é", "\x00", "x" * 300, "-1", "1e400", "bfloat16", "euler", "heun", "digits", "seven", "pt"),
        *((), (1,), (4, 4), (1, 1, 1), [], [1], [1, 2, 3], [16, 4], ["x"], [None], [math.nan], {}, {"a": 1}, {1}),
        *(b"x", 1j, object(), int, len, np.int64(2), np.float32(0.5), np.array([1, 2]), np.array(3)),
        *(torch.tensor(2), torch.tensor([1, 2]), torch.tensor(0.5), torch.zeros(0), torch.zeros(2, 1, 8, 8)),
        *(torch.float32, torch.bfloat16, torch.int64, torch.Generator(), Path("nowhere"), Path(), range(2)),
        *(elit.CFG(1.5), elit.CCFG(2.0, 1), torch.nn.Linear(2, 2), torch.nn.Linear, [torch.Generator()] * 2),
        *(["a", "b"], [[1]], [0.5], torch.full((2,), math.nan), np.array([]), np.zeros((2, 2)), "cpu", "meta", "é.pt"),
    ]
)
BIG = st.sampled_from([1 << 63, 1 << 64, 10**30, -(10**30), 1e300])

WORDS = [
    *("", "x", "-1", "0", "1", "2", "3", "8", "16", "17", "1.5", "0.5", "50%", "0%", "150%", "100%@0-0.5,8@0.5-1"),
    *("nan", "inf", "-inf", "1e400", "none", "full", "cfg", "ccfg", "ag", "euler", "heun", "float32", "bfloat16"),
    *("digits", "nowhere", "a/b/c", "..", "/proc/x", "a\nb", "é", "x" * 300, "cpu", "cuda:99", "meta", "True", "None"),
    *("recipe:x", "ELIT-DiT-S/1", "x.png", "x.npz", "x.json", "{}", "[]", "1,2", "🙂", "'", '"', "$HOME", "*", "seven"),
    *("x.jsonl", "x.yaml", "x.safetensors", "idx:x", "http://127.0.0.1:9", "-", "--", "--steps", "~", "x.gif", "."),
]
FEW = st.one_of(st.sampled_from(WORDS), st.text(max_size=6).filter(lambda text: not is_large(text)))
MANY = st.one_of(FEW, st.sampled_from(["70000", "1000000007", "1" + "0" * 30, "-" + "9" * 20, "1e300", "1e-300"]))
"""Also numbers that are right for many options, but would take long as steps or samples."""


def is_large(text: str) -> bool:
    try:
        return not abs(float(text)) <= 17
    except ValueError:
        return False
