"""Griffe extensions: how the reference reads what this package writes in a way of its own."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Integrations(griffe.Extension):
    """The folder integrations/ is read as `listener_reward.integrations`, as an install maps it."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        if pkg.path == "listener_reward" and "integrations" not in pkg.members:
            integrations = loader.load("integrations")
            assert isinstance(integrations, griffe.Module)
            pkg.set_member("integrations", integrations)


class FieldHelp(griffe.Extension):
    """The `help` of a configuration's field, which trl's parser prints, is the field's docstring."""

    def on_attribute_instance(self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any) -> None:
        call = node.value if isinstance(node, ast.AnnAssign) else None
        if not isinstance(call, ast.Call) or not isinstance(attr.value, griffe.ExprCall):
            return
        for keyword in call.keywords:
            if keyword.arg == "metadata" and attr.docstring is None:
                attr.docstring = griffe.Docstring(ast.literal_eval(keyword.value)["help"], parent=attr)
        for argument in attr.value.arguments:
            if isinstance(argument, griffe.ExprKeyword) and argument.name == "default":
                attr.value = argument.value
                break
