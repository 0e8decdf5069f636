"""As much of OpenAPI as holds a request against its schema, tightened: a key the schema does not list is an error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


class OpenApi:
    """One document."""

    def __init__(self, path: Path) -> None:
        self._document: dict[str, Any] = json.loads(path.read_text())

    def problems(
        self, method: str, path: str, body: Any = None, query: dict[str, str] | None = None
    ) -> list[str]:
        """What is wrong with a request to `path` (below the server's URL); empty: nothing."""
        operation, template = self._operation(method, path)
        if operation is None:
            return [f"{method} {path} is not an operation"]
        found = []
        known = {p["name"]: p for p in operation.get("parameters", []) if p["in"] == "query"}
        for name, value in (query or {}).items():
            if name not in known:
                found.append(f"{template}: unknown query parameter {name!r}")
                continue
            kind = known[name]["schema"].get("type")
            if kind == "integer" and not value.isdecimal():
                found.append(f"{template}: {name}={value!r} is no integer")
            if kind == "boolean" and value not in ("true", "false"):
                found.append(f"{template}: {name}={value!r} is no boolean")
        wanted = operation.get("requestBody")
        if wanted is None:
            return found + ([f"{template}: takes no body"] if body is not None else [])
        if body is None:
            return found + ([f"{template}: needs a body"] if wanted.get("required") else [])
        schema = wanted["content"]["application/json"]["schema"]
        return found + self._against(body, schema, "body")

    def _operation(self, method: str, path: str) -> tuple[dict[str, Any] | None, str]:
        for template, operations in self._document["paths"].items():
            if re.fullmatch(re.sub(r"\{[^}]+\}", "[^/]+", template), path) and method.lower() in operations:
                return operations[method.lower()], template
        return None, path

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            target: Any = self._document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            return self._resolved(target)
        if "allOf" in schema:
            whole: dict[str, Any] = {**schema, "properties": dict(schema.get("properties", {}))}
            del whole["allOf"]
            for part in schema["allOf"]:
                resolved = self._resolved(part)
                whole["properties"] |= resolved.get("properties", {})
                whole = {**resolved, **whole}
            return whole
        return schema

    def _against(self, value: Any, schema: dict[str, Any], at: str) -> list[str]:
        schema = self._resolved(schema)
        kind = schema.get("type")
        if kind in TYPES and (
            not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")
        ):
            return [f"{at}: {value!r} is no {kind}"]
        if "enum" in schema and value not in schema["enum"]:
            return [f"{at}: {value!r} is none of {schema['enum']}"]
        found = []
        if isinstance(value, dict):
            properties = schema.get("properties", {})
            extra = schema.get("additionalProperties", not properties)
            found += [f"{at}.{name} is missing" for name in schema.get("required", []) if name not in value]
            for name, item in value.items():
                if name in properties:
                    found += self._against(item, properties[name], f"{at}.{name}")
                elif isinstance(extra, dict):
                    found += self._against(item, extra, f"{at}.{name}")
                elif not extra:
                    found.append(f"{at}.{name} is not in the schema")
        if isinstance(value, list):
            for n, item in enumerate(value):
                found += self._against(item, schema.get("items", {}), f"{at}[{n}]")
        return found
