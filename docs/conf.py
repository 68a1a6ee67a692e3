"""The site: `make docs`. Pages are Markdown and run as they are built; see `_site/`."""

import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_site")]

import flowpost  # noqa: E402

project = "flowpost"
release = flowpost.__version__
copyright = "the authors of flowpost, MIT license"  # noqa: A001

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "executed", "docstrings", "llms"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_site", "_outputs", "_pictures"]
nitpicky = True

# The equations of a page stand between dollars; a heading has the anchor that GitHub gives it.
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_fence_as_directive = []

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Their interop is described where they are not installed, too.
autodoc_mock_imports = [name for name in ("pyro", "arviz_base") if find_spec(name) is None]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes", "Reference"]
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
default_role = "py:obj"

html_theme = "furo"
html_title = f"flowpost {release}"

# MathJax comes with the site, for readers without a network. Of its package this one file is enough: it has the fonts.
MATHJAX = distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax/tex-svg.js")
html_static_path = ["_static", str(MATHJAX)]
mathjax_path = Path(str(MATHJAX)).name
html_css_files = ["site.css"]
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
