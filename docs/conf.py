"""How the handbook is built: python -m sphinx -W -b html docs docs/_build"""

from importlib.metadata import version as version_of

project = "vhostuser"
author = "the vhostuser project"
version = release = version_of("vhostuser")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
# Pages link to directories of the tree, which are no part of the site; tests/docs/links.py checks all of them.
suppress_warnings = ["myst.xref_missing"]
html_theme = "furo"
html_title = "vhostuser"
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
