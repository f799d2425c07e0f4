"""Reads event files back: scalars, pictures, texts as TensorBoard renders them, chart layouts, documents."""

from __future__ import annotations

import html.parser
import io
import json
import re
import zlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR
from tensorboard.plugins.custom_scalar import layout_pb2


class Events(NamedTuple):
    scalars: dict
    images: dict
    texts: dict
    layouts: list
    documents: dict

    def at(self, tag):
        """The steps of a tag of any kind."""
        (kind,) = [kind for kind in (*self[:3], self.documents) if tag in kind]
        return [step for step, _ in kind[tag]]

    def categories(self):
        return [category.title for category in self.layouts[-1].category]


def events(folder) -> Events:
    """Everything in the event files of one directory, in the order written; anything else is an error."""
    found = Events(defaultdict(list), defaultdict(list), defaultdict(list), [], defaultdict(list))
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                if value.tag == "custom_scalars__config__":
                    found.layouts.append(layout_pb2.Layout.FromString(value.tensor.string_val[0]))
                elif kind == "simple_value":
                    found.scalars[value.tag].append((event.step, value.simple_value))
                elif kind == "image":
                    found.images[value.tag].append((event.step, value.image.encoded_image_string))
                elif value.metadata.plugin_data.plugin_name == "batchnorm":
                    assert value.metadata.data_class == DATA_CLASS_TENSOR
                    assert json.loads(value.metadata.plugin_data.content) == {"format": 2}
                    (data,) = value.tensor.string_val
                    found.documents[value.tag].append((event.step, json.loads(zlib.decompress(data))))
                elif value.metadata.plugin_data.plugin_name == "text":
                    (text,) = value.tensor.string_val
                    found.texts[value.tag.removesuffix("/text_summary")].append((event.step, text.decode()))
                else:
                    raise AssertionError(f"what is {value.tag}?")
    return found


def pixels(png):
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def matched(pattern, tags):
    """As TensorBoard matches them (`custom_scalars_plugin.download_data_impl`)."""
    return {tag for tag in tags if re.compile(pattern).match(tag)}


class Page(html.parser.HTMLParser):
    """What a page shows: the tags in it, the text of all, of each table row and of each list item."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.items, self.strong, self.order = set(), [], [], [], []
        self.into = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("p", "table", "ul"):
            self.order.append(tag)
        if tag == "tr":
            self.rows.append([])
        target = {"td": self.rows and self.rows[-1], "th": self.rows and self.rows[-1]}
        target |= {"li": self.items, "strong": self.strong}
        if tag in target:
            target[tag].append("")
            self.into.append(target[tag])

    def handle_endtag(self, tag):
        if tag in ("td", "th", "li", "strong"):
            self.into.pop()

    def handle_data(self, text):
        for target in self.into:
            target[-1] += text


def rendered(text):
    return Page(plugin_util.markdown_to_safe_html(text))


def charts_of(layout):
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }
