"""Registry of data sets on the hub: their short names, hub names and columns."""

from __future__ import annotations

from dataclasses import dataclass

from ds_al.data.splits import Kind


@dataclass(frozen=True)
class Known:
    """One data set on the Hugging Face hub.

    Attributes:
        hub: name on the hub.
        kind: kind of x.
        x, y: names of the columns of image or text, and of the label.
    """

    hub: str
    kind: Kind
    x: str
    y: str = "label"


KNOWN: dict[str, Known] = {
    "fashion-mnist": Known("zalando-datasets/fashion_mnist", "image", "image"),
    "cifar10": Known("uoft-cs/cifar10", "image", "img"),
    "cifar100": Known("uoft-cs/cifar100", "image", "img", "fine_label"),
    "tiny-imagenet": Known("zh-plus/tiny-imagenet", "image", "image"),
    "ag_news": Known("fancyzhx/ag_news", "text", "text"),
    "dbpedia_14": Known("fancyzhx/dbpedia_14", "text", "content"),
    "imdb": Known("stanfordnlp/imdb", "text", "text"),
    "sst2": Known("stanfordnlp/sst2", "text", "sentence"),
}
"""Known values of ``experiment.data.name``; bundled sets and any other name on the hub are valid, too."""
