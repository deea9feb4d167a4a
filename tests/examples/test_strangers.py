"""Published modules: the page names each, each has an environment, uses are counted twice."""

from __future__ import annotations

import sys

from repository import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / "examples"))
import strangers


def test_the_page_names_each_module():
    page = (ROOT / "docs" / "libraries.md").read_text()
    for name, (package, *_) in strangers.MODULES.items():
        assert package in page
        assert name in page


def test_each_module_has_an_environment():
    assert {package for package, *_ in strangers.MODULES.values()} == strangers.PACKAGES.keys()


def small() -> strangers.Project:
    def make_module():
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        return strangers.classifier(network, 1e-2)

    return strangers.Project(make_module, lambda: strangers.loaders(*strangers.digit_pairs()))


def test_four_uses_agree_with_the_modules_own_counts(monkeypatch, capsys):
    monkeypatch.setitem(strangers.MODULES, "small", ("torch", "pytorch_lightning", small))
    strangers.use("small", max_time=2, verbose=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["fit", "repair", "update", "diagnose"]
    assert all("agrees" in line and "DIFFERS" not in line for line in lines[-4:])
