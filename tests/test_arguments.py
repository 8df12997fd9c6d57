"""Checks of numbers that users hand in, and of addresses."""

import socket

import numpy as np
import pytest
import torch

from elit.arguments import free_port, real_number, whole_number, whole_numbers


@pytest.mark.parametrize("value", [4, np.int64(4), np.uint8(4), torch.tensor(4), torch.tensor([4])])
def test_integers_of_every_kind(value):
    number = whole_number("steps", value, 1)
    assert (number, type(number)) == (4, int)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 4.0, "4", None, torch.tensor(4.0), [4], 1j])
def test_what_is_no_integer(value):
    with pytest.raises(ValueError, match=r"^steps=.*: give a whole number of at least 1$"):
        whole_number("steps", value, 1)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), torch.tensor(2.0)])
def test_numbers_of_every_kind(value):
    assert real_number("scale", value, least=0) == 2.0


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "2", True, None, -1, 1j, [2.0], 10**400])
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"^scale=.*: give a number of at least 0$"):
        real_number("scale", value, least=0)


def test_bounds_are_said():
    with pytest.raises(ValueError, match=r"^a=3: give a whole number from 1 to 2$"):
        whole_number("a", 3, 1, 2)
    with pytest.raises(ValueError, match=r"^a=0: give a number above 0$"):
        real_number("a", 0, above=0)
    with pytest.raises(ValueError, match=r"^a=2: give a number above 0 and at most 1$"):
        real_number("a", 2, above=0, most=1)


def test_several():
    assert whole_numbers("window", np.array([4, 2]), "(4, 4)") == (4, 2)
    assert whole_numbers("window", [np.int32(4), 4], "(4, 4)") == (4, 4)
    for wrong in (4, "44", [4.5, 4], [True], None, [0]):
        with pytest.raises(ValueError, match="window="):
            whole_numbers("window", wrong, "(4, 4)")


def test_a_port_that_is_taken_and_hosts_that_are_none():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^host='127.0.0.1', port={port}: Address already in use; give others$"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    assert 0 < free_port("127.0.0.1", 0) < 65536
    for host in ("203.0.113.1", "\ufff9", "a\0b", "a" * 70):
        with pytest.raises(ValueError, match=r"^host=.*, port=0: .*; give others$"):
            free_port(host, 0)
