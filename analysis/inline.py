"""Figures as part of a page: SVG without style attributes, in the colours of the page around it."""

from __future__ import annotations

from xml.etree import ElementTree

from markupsafe import Markup

from analysis import theme

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"


def inline(svg: bytes, name: str, label: str) -> Markup:
    """The SVG, ready to stand in HTML: no style attributes (the page's security policy forbids them), ids
    that begin with `name`, and ink in the colour of the page's text, so that it follows dark mode.

    `label` is what a screen reader says of it.
    """
    root = ElementTree.fromstring(svg)  # noqa: S314  our own bytes, made a moment ago
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata", f"{{{_SVG}}}title"):
                parent.remove(child)
    for element in root.iter():
        _declarations_to_attributes(element)
        _name_ids(element, name)
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": label, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    ElementTree.register_namespace("", _SVG)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704  serialised XML is escaped


def _name_ids(element: ElementTree.Element, name: str) -> None:
    target = element.attrib.pop(_XLINK, None)
    if target:
        element.set("href", f"#{name}-{target[1:]}" if target.startswith("#") else target)
    for key, value in element.attrib.items():
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif value.startswith("url(#"):
            element.set(key, value.replace("url(#", f"url(#{name}-"))


def _declarations_to_attributes(element: ElementTree.Element) -> None:
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = declaration.partition(":")
        if value:
            element.set(key.strip(), value.strip())
    for key in ("fill", "stroke"):
        colour = element.get(key)
        if colour == theme.PAPER:
            element.set(key, "none")
        elif colour == theme.INK:
            element.set(key, "currentColor")
        elif colour == theme.RULE:
            element.set(key, "currentColor")
            element.set(f"{key}-opacity", "0.16")
