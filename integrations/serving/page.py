"""`GET /docs`: the server's OpenAPI description as a page that a browser shows with nothing fetched from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import Environment

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ info.title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { border-top: 1px solid #ccc; padding-top: 1rem; }
code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { background: #8881; padding: .7rem; overflow-x: auto; }
td { padding: .1rem 1rem .1rem 0; vertical-align: top; }
</style>
<h1>{{ info.title }} {{ info.version }}</h1>
<p>{{ info.description }} The same as JSON: <a href="openapi.json">openapi.json</a>.</p>
{% for route in routes %}
<h2><code>{{ route.method }} {{ route.path }}</code></h2>
<p>{{ route.summary }}</p>
{% if route.fields %}<table>{% for field in route.fields %}
<tr><td><code>{{ field.name }}</code></td><td>{{ field.type }}</td><td>{{ field.description }}</td></tr>
{% endfor %}</table>{% endif %}
{% if route.example %}<pre>{{ route.example }}</pre>{% endif %}
<table>{% for status, why in route.responses %}
<tr><td><code>{{ status }}</code></td><td>{{ why }}</td></tr>
{% endfor %}</table>
{% endfor %}
</html>
"""


def docs_page(openapi: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description: of each route its fields, its first example and its answers."""
    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(info=openapi["info"], routes=[*_routes(openapi)])


def _routes(openapi: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            example = body.get("examples", [None])[0]
            yield {
                "method": method.upper(),
                "path": path,
                "summary": route.get("description") or route.get("summary", ""),
                "fields": [
                    {"name": name, "type": _type(field), "description": field.get("description", "")}
                    for name, field in body.get("properties", {}).items()
                ],
                "example": None if example is None else json.dumps(example, indent=2),
                "responses": [(status, one.get("description", "")) for status, one in route["responses"].items()],
            }


def _type(field: Mapping[str, Any]) -> str:
    """In words: `string or null`, `array of string`."""
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    kind = field.get("type", "any")
    return f"array of {_type(field['items'])}" if kind == "array" and "items" in field else kind
