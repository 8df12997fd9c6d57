"""Looking inside is for networks that do no work for dropped latents; the published SiT uses all of them."""

import pytest
from conftest import ELIT, opened

from elit.models.transformer import Transformer


@pytest.fixture(params=[kind for kind in ELIT if kind != "elit-sit"])
def elit_model(request: pytest.FixtureRequest) -> Transformer:
    return opened(request.param)
