"""A Sphinx extension: what stands in backticks in a docstring is a link where it names something public, else code."""

from __future__ import annotations

from typing import Any, cast

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement) -> nodes.Node | None:
    """A link to the one object whose name ends so; the text itself where there is none, or it is another library's."""
    if node.get("refdomain") != "py":
        return None
    domain = cast(PythonDomain, env.get_domain("py"))
    target = node["reftarget"].removesuffix("()")
    found = [name for name in domain.objects if name == target or name.endswith(f".{target}")]
    if not found:
        return text
    name = min(found, key=lambda each: (each.count("."), len(each)))
    return domain.resolve_xref(env, node["refdoc"], cast(Any, app.builder), "obj", name, node, text) or text


def setup(app: Sphinx) -> dict[str, bool]:
    """Enter it in Sphinx."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
