"""Self-contained pages from the templates of this package: whatever comes from a run is escaped by Jinja2.

The templates, the style and the script are text that ends in ``.md``: a Flower App Bundle holds no ``.html``, ``.css``
or ``.js``, and a run that Flower's own command started writes its page from there.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmaestro.report.figure import inline_svg
from fedmaestro.report.format import (
    MISSING,
    format_bytes,
    format_count,
    format_privacy,
    format_seconds,
    lost_share,
    lost_text,
)

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Return the page that a template makes of some values; it loads nothing, and its script only sorts tables."""
    return _environment().get_template(f"{template}.html.md").render(values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "by_kind": lambda failed: ", ".join(f"{count} {kind}" for kind, count in failed.items()),
        "bytes": format_bytes,
        "count": format_count,
        "inline_svg": inline_svg,
        "lost": lost_text,
        "lost_share": lost_share,
        # Of a metric of which nobody has said whether it is a share.
        "plain": lambda value: MISSING if value is None else f"{value:.4g}",
        "privacy": format_privacy,
        "seconds": format_seconds,
    }
    return environment
