"""What the schema at ``/openapi.json`` says of each route, with examples."""

from __future__ import annotations

from typing import Any

__all__ = [
    "CONTROL", "CREATE", "CREATE_BY_ID", "DESCRIPTION", "DROP", "EVENTS", "FRAMES", "HEALTH",
    "HEALTHZ", "LIST", "METRICS", "PREDICT", "READYZ",
]  # fmt: skip

DESCRIPTION = (
    "Predicts images of many streams, and adapts to each of them while it does. Errors are "
    '`{"detail": "..."}` with one sentence: what was expected, what came, and what to do.'
)
EXAMPLE = {
    "stream": "door", "index": 41, "label": 3, "class": "cat",
    "probabilities": [0.01, 0.02, 0.02, 0.9, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005],
    "learned": True, "latency": 0.023,
}  # fmt: skip
SUMMARY = {
    "stream": "door", "images": 42, "learned": 40, "frozen": False, "seen_at": 1764000000.0,
    "latency": {"p50": 0.021, "p95": 0.034, "p99": 0.05}, "actions": {"skip": 2},
    "health": {"entropy": 0.41, "estimated_accuracy": 0.87, "action": "learn", "reason": ""},
}  # fmt: skip
ERRORS = {
    401: "No token, or another one.",
    403: "Asked by a page of another origin, or by a name that is not this server's.",
    404: "There is no such stream.",
    408: "The body did not come in in time.",
    409: "The stream has another owner, or its file is damaged.",
    413: "Too large: bytes, pixels or images of a request.",
    422: "No image that the model takes, or a parameter that is wrong.",
    429: "Too many: images a second, images that wait, streams, or listeners.",
    500: "The model or the server failed; what was learned is as before.",
    503: "The server is stopping.",
    507: "The stream could not be written; it goes on in memory.",
}
PREDICTION: dict[str, Any] = {
    "type": "object",
    "required": ["stream", "index", "label", "class", "learned", "latency"],
    "properties": {
        "stream": {"type": "string"},
        "index": {"type": "integer", "description": "Of the image in its stream, from 0 when the "
                  "server began."},
        "label": {"type": "integer"},
        "class": {"type": "string"},
        "probabilities": {"type": "array", "items": {"type": "number"}},
        "learned": {"type": "boolean", "description": "Whether its batch was learned from."},
        "latency": {"type": "number", "description": "Seconds since the request was whole."},
    },
}  # fmt: skip
OBJECT = {"type": "object"}
BINARY = {"type": "string", "format": "binary"}


def _json(about: str, schema: dict[str, Any], example: Any) -> dict[str, Any]:
    content = {"schema": schema, "example": example}
    return {"description": about, "content": {"application/json": content}}


def _route(
    summary: str, answer: dict[str, Any], *refused: int, also: dict[int, Any] | None = None,
    body: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    detail = {"type": "object", "required": ["detail"],
              "properties": {"detail": {"type": "string"}}}  # fmt: skip
    responses: dict[int, Any] = {200: answer} | (also or {})
    for status in (401, 403, 408, 413, *refused, 500):
        about = ERRORS[status]
        responses[status] = _json(about, detail, {"detail": f"`...` must be ...: {about}"})
    extra = {} if body is None else {"requestBody": {"required": True, "content": body}}
    return {"summary": summary, "responses": responses, "openapi_extra": extra}


ONE_OR_MORE = {"oneOf": [PREDICTION, {"type": "array", "items": PREDICTION}]}
IMAGES = {
    "image/jpeg": {"schema": BINARY},
    "image/png": {"schema": BINARY},
    "application/octet-stream": {"schema": BINARY},
    "multipart/form-data": {
        "schema": {"type": "object", "additionalProperties": BINARY, "minProperties": 1,
                   "description": "A file for each image; the field's name is the stream."},
    },
}  # fmt: skip
PREDICT = _route(
    "Predict one image (JPEG, PNG, .npy or safetensors) as the body, or several as multipart",
    _json("What each image shows; a list for multipart, in order.", ONE_OR_MORE, EXAMPLE),
    404, 409, 422, 429, 503, body=IMAGES,
)  # fmt: skip
LIST = _route(
    "All streams", _json("A summary of each.", OBJECT, {"streams": [SUMMARY]}), 503
)  # fmt: skip
CREATED = _json("It is there now.", OBJECT, {"stream": "door", "created": True})
CREATE = _route(
    "Create a stream", _json("It was there.", OBJECT, {"stream": "door", "created": False}),
    409, 422, 429, 503, also={201: CREATED},
    body={"application/json": {"schema": {
        "type": "object", "required": ["stream"], "properties": {"stream": {"type": "string"}},
    }, "example": {"stream": "door"}}},
)  # fmt: skip
CREATE_BY_ID = _route(
    "Create a stream", CREATE["responses"][200], 409, 422, 429, 503, also={201: CREATED}
)
HEALTH = _route(
    "Health of a stream, and its last events",
    _json("Figures of the last batch and averages; null where there is none.", OBJECT,
          SUMMARY | {"events": []}),
    404, 409, 422, 503,
)  # fmt: skip
FRAMES = _route(
    "Small pictures of a stream's last images, and its history",
    _json("JPEG pictures as data URIs; points [seconds since 1970, then averages of estimated "
          "accuracy, entropy, concentration, agreement and distance], at most one a second.",
          OBJECT, {"stream": "door", "frames": [], "history": []}),
    404, 422,
)  # fmt: skip
DROP = _route(
    "Forget a stream and remove its file",
    _json("It is gone.", OBJECT, {"stream": "door", "dropped": True}), 404, 409, 422, 503,
)  # fmt: skip
CONTROL = _route(
    "Freeze or unfreeze a stream, reset it to its beginning, or save it",
    _json("A summary of the stream.", OBJECT, SUMMARY),
    404,
    409,
    422,
    503,
    507,
)
EVENTS = _route(
    "What happens, as server-sent events: guard, stream, health",
    {"description": "Events without end; `?after=N` or `Last-Event-ID` begins behind one.",
     "content": {"text/event-stream": {"schema": {"type": "string"}, "example": (
         'id: 7\nevent: guard\ndata: {"stream": "door", "action": "reset", "reason": "..."}\n\n'
     )}}},
    429,
)  # fmt: skip
METRICS = _route(
    "Figures for Prometheus",
    {"description": "Text.", "content": {"text/plain": {"schema": {"type": "string"}}}},
)
HEALTHZ = _route("Whether the server lives", _json("It does.", OBJECT, {"status": "ok"}), 503)
READYZ = _route("Whether images are taken", _json("They are.", OBJECT, {"status": "ok"}), 503)
