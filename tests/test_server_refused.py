"""What a request leaves behind of which the model has refused an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tta
from tests.helpers.nets import tiny
from tests.helpers.served import npy, picture, png, serving

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
GOOD, BAD = png(picture(0)), npy(np.zeros((4, 32, 32), np.float32))  # of four channels
WORDS = "`images` must have 3 channels"


def served(**more: Any) -> Any:
    return serving(tta.wrap(tiny("bn"), "tent.cifar10", guard="watch"), shape=None, **more)


@pytest.mark.parametrize("bodies", [[BAD], [BAD, BAD]])
def test_no_stream_is_begun_for_an_image_that_is_refused(bodies) -> None:
    with served(max_wait=0.05) as server:
        files = [("new", ("x", body)) for body in bodies]
        answer = server.post("/v1/predict?create=true", files=files)
        server.refused(422, f"image 0: {WORDS}", answer)
        assert server.pool.streams() == []
        server.refused(422, WORDS, server.post("/v1/predict?stream=new&create=1", content=BAD))
        assert server.get("/v1/streams").json()["streams"] == []
        assert server.post("/v1/streams/old").status_code == 201  # asked for by itself
        server.refused(422, WORDS, server.post("/v1/predict?stream=old&create=1", content=BAD))
        assert server.pool.streams() == ["old"]
        assert server.predict("new", GOOD)["index"] == 0


def test_a_refused_request_says_which_image_and_how_many_others_count() -> None:
    with served(max_wait=0.05) as server:
        names = [("a", GOOD), ("b", BAD), ("a", GOOD), ("c", GOOD), ("b", GOOD)]
        files = [(name, ("x", body)) for name, body in names]
        text = server.refused(
            422, f"image 1: {WORDS}", server.post("/v1/predict?create=true", files=files)
        )
        assert text.endswith("takes. Of the other images in this request, 4 were predicted.")
        streams = server.get("/v1/streams").json()["streams"]
        assert {one["stream"]: one["images"] for one in streams} == {"a": 2, "b": 1, "c": 1}
