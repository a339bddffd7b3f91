"""The site of these pages, for Sphinx: make docs. It needs no network to be read: formulas are MathML."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import kda_cuda

project, version = "kda_cuda", kda_cuda.__version__
html_title = f"{project} {version}"
html_theme = "furo"
html_math_renderer = "mathml"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
myst_enable_extensions = ["dollarmath"]
autodoc_typehints = "none"  # the docstrings say shapes and dtypes


def visit_inline(translator, node):
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(translator, node):
    translator.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
