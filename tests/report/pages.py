"""What the tests read of a page."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict
    inside: str
    """The text of it and of what it holds."""


@dataclass
class Reader(HTMLParser):
    """The elements of a page in the order in which they end, and whether they nest."""

    elements: list = field(default_factory=list)
    open: list = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attributes):
        element = Element(tag, dict(attributes), "")
        (self.elements if tag in VOID else self.open).append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(Element(tag, dict(attributes), ""))

    def handle_endtag(self, tag):
        element = self.open.pop()
        assert element.tag == tag
        self.elements.append(element)

    def handle_data(self, data):
        for element in self.open:
            element.inside += data

    def all(self, tag, **attributes):
        return [
            element
            for element in self.elements
            if element.tag == tag
            and all(element.attributes.get(k) == v for k, v in attributes.items())
        ]

    def section(self, title):
        (section,) = [s for s in self.all("section") if s.inside.strip().startswith(title)]
        return " ".join(section.inside.split())


def read_page(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader
