"""The OpenAPI description, at /openapi.json: bodies are read by hand, so their models are added by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from .protocol import ChatRequest, CompletionRequest

BODIES = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi(app: FastAPI, model: str) -> dict[str, Any]:
    """The document, made once; `model` is the only name that requests may give."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        models = [(body, "validation") for body in BODIES.values()]
        _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        schemas = {**definitions["$defs"], "Error": _ERROR}
        for name in ("Message", "StreamOptions", *(body.__name__ for body in BODIES.values())):
            schemas[name]["additionalProperties"] = False  # but for those without effect
        for body in BODIES.values():
            schemas[body.__name__]["properties"]["model"]["enum"] = [model]
        document["components"] = {"schemas": schemas}
        failure = {
            "description": "An error.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for path, methods in document["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                operation["responses"] |= {"4XX": failure, "503": failure}
                if path in BODIES:
                    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {}}
                    schema = {"$ref": f"#/components/schemas/{BODIES[path].__name__}"}
                    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        app.openapi_schema = document
    return app.openapi_schema
