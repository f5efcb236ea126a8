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


def openapi(app: FastAPI) -> dict[str, Any]:
    """The document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        models = [(model, "validation") for model in BODIES.values()]
        _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        document["components"] = {"schemas": {**definitions["$defs"], "Error": _ERROR}}
        failure = {
            "description": "An error.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for path, methods in document["paths"].items():
            for operation in methods.values():
                operation["responses"] |= {"4XX": failure, "503": failure}
                if path in BODIES:
                    schema = {"$ref": f"#/components/schemas/{BODIES[path].__name__}"}
                    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        app.openapi_schema = document
    return app.openapi_schema
