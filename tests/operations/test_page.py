"""docs/operations.md has every metric as it is declared, names none that there is not, and its snippets can be read."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from tests.docs.blocks import blocks
from vhostuser import devices, measures
from vhostuser.device import Device
from vhostuser.metrics import Metric

PAGE = Path(__file__).parents[2] / "docs/operations.md"
TEXT = PAGE.read_text()


def declared() -> list[Metric]:
    """The runtime's, then those of every device."""
    names = [module.name for module in pkgutil.iter_modules(devices.__path__)]
    modules = [importlib.import_module(f"vhostuser.devices.{name}") for name in names]
    kinds = {kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)}
    return [*measures.ALL, *(metric for kind in kinds if issubclass(kind, Device) for metric in kind.metrics)]


def row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind.value} | {metric.unit} | {labels} | {metric.help} |"


def test_the_tables_have_every_metric_as_it_is_declared() -> None:
    lines = set(TEXT.splitlines())
    missing = [row(metric) for metric in declared() if row(metric) not in lines]
    assert missing == [], "rows that the tables in docs/operations.md must have"
    assert sum(line.startswith("| `vhostuser_") for line in lines) == len(declared())


def test_no_other_metric_is_named() -> None:
    named = set(re.findall(r"\bvhostuser_[a-z_]+\b", TEXT))
    assert named <= {metric.name for metric in declared()}


def test_the_xml_can_be_read() -> None:
    (snippet,) = (block.text for block in blocks("operations.md", TEXT) if block.language == "xml")
    assert ET.fromstring(snippet).find("devices/disk/source") is not None
